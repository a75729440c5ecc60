"""nginx serving a folder behind a proxy that adds latency and cuts some connections."""

import asyncio
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG = """
daemon off; master_process off; pid {work}/pid; error_log {work}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {work}; proxy_temp_path {work};
  fastcgi_temp_path {work}; uwsgi_temp_path {work}; scgi_temp_path {work};
  server {{ listen 127.0.0.1:{port}; root {folder}; keepalive_requests 1; }}
}}
"""


def has_nginx() -> bool:
    return find_nginx() is not None


def find_nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


@contextmanager
def slow_server(folder: Path, work: Path, latency_s: float, cut_every: int) -> Iterator[str]:
    """Serve a folder; every answer is late, and one in `cut_every` connections breaks."""
    port = _free_port()
    work.mkdir(parents=True, exist_ok=True)
    config = work / "nginx.conf"
    config.write_text(CONFIG.format(work=work, port=port, folder=folder))
    command = [find_nginx(), "-p", str(work), "-c", str(config), "-e", str(work / "error.log")]
    nginx = subprocess.Popen(command)
    loop, front = asyncio.new_event_loop(), _free_port()
    proxy = asyncio.run_coroutine_threadsafe(
        _serve(front, port, latency_s, cut_every), loop
    )  # fmt: skip
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        proxy.result()
        yield f"http://127.0.0.1:{front}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        nginx.terminate()
        nginx.wait()


async def _serve(front: int, port: int, latency_s: float, cut_every: int) -> asyncio.Server:
    num_connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        is_cut = num_connections % cut_every == 0
        for _ in range(100):  # nginx may not be listening yet
            try:
                upstream, request = await asyncio.open_connection("127.0.0.1", port)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
        await asyncio.gather(
            _pipe(reader, request, 0, None),
            _pipe(upstream, writer, latency_s, 1 << 16 if is_cut else None),
        )

    return await asyncio.start_server(handle, "127.0.0.1", front)


async def _pipe(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float, limit: int | None
) -> None:
    """Pass bytes on, the first of them after a delay, all or up to a limit."""
    num = 0
    try:
        while data := await reader.read(1 << 20):
            if not num:
                await asyncio.sleep(delay_s)
            num += len(data)
            writer.write(data)
            await writer.drain()
            if limit is not None and num > limit:
                break
    except ConnectionError:
        pass
    writer.close()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
