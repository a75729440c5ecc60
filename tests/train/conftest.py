"""Small shard sets, written from the format's definition alone, and a server of folders."""

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cfld.images import encode_jpeg, encode_png
from cfld.pose import draw_skeleton
from shards.format import (
    INDEX_FILE,
    INDEX_SCHEMA,
    MANIFEST_FILE,
    PAIRS_FILE,
    PAIRS_SCHEMA,
    REJECTS_FILE,
    REJECTS_SCHEMA,
    Manifest,
    ShardFile,
    SplitCounts,
    TableFile,
    member_name,
    shard_name,
)


def draw_noise(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A random image, and random keypoints one of which is missing."""
    keypoints = np.ones((18, 3), np.float32)
    keypoints[:, :2] = rng.uniform(0, (size[1], size[0]), (18, 2))
    keypoints[rng.integers(18)] = np.nan, np.nan, 0
    return rng.integers(0, 255, (*size, 3), dtype=np.uint8), keypoints


def write_shards(
    folder: Path,
    *,
    persons: int = 12,
    views: int = 3,
    persons_per_shard: int = 2,
    size: tuple[int, int] = (32, 24),
    seed: int = 0,
    latent_shape: tuple[int, ...] | None = None,
    split: str = "train",
    image_format: str = "jpg",
    draw: Callable[..., tuple[np.ndarray, np.ndarray]] = draw_noise,
) -> Path:
    """Write a complete shard set of drawn images; all ordered pairs of each person."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows, pairs, shards = [], [], []
    for number, first in enumerate(range(0, persons, persons_per_shard)):
        buffer, name = io.BytesIO(), shard_name(split, number)
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for person in range(first, min(first + persons_per_shard, persons)):
                start = len(rows)
                for view in range(views):
                    key = f"s{seed}p{person:04d}v{view}"
                    image, keypoints = draw(rng, size)
                    members = _encode(key, image, keypoints, image_format)
                    if latent_shape:
                        members["latent"] = _save(rng.normal(size=latent_shape))
                    row = _describe(key, image, keypoints, image_format)
                    row |= _write_members(tar, buffer, key, members, image_format)
                    rows.append(row | {"person": f"{person:04d}", "split": split, "shard": name})
                within = range(start, len(rows))
                pairs += [(a, b, split) for a in within for b in within if a != b]
        data = buffer.getvalue()
        (folder / name).write_bytes(data)
        num_images = sum(row["shard"] == name for row in rows)
        shards.append(ShardFile(name=name, split=split, num_images=num_images,
                                size_bytes=len(data), sha256=_sha256(data)))  # fmt: skip
    tables = {
        INDEX_FILE: pa.Table.from_pylist(rows, INDEX_SCHEMA),
        PAIRS_FILE: pa.Table.from_pylist(
            [dict(zip(PAIRS_SCHEMA.names, pair, strict=True)) for pair in pairs], PAIRS_SCHEMA
        ),
        REJECTS_FILE: REJECTS_SCHEMA.empty_table(),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / name)
    counts = SplitCounts(images=len(rows), persons=persons, valid=len(rows), pairs=len(pairs))
    manifest = Manifest(
        dataset="drawn", input_sha256=f"{seed:064d}", settings={}, counts={split: counts},
        rejects={}, shards=tuple(shards),
        tables=tuple(
            TableFile(name=name, num_rows=table.num_rows,
                      size_bytes=(folder / name).stat().st_size,
                      sha256=_sha256((folder / name).read_bytes()))
            for name, table in tables.items()
        ),
    )  # fmt: skip
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return folder


def _encode(key, image, keypoints, image_format) -> dict[str, bytes]:
    return {
        "image": encode_jpeg(image) if image_format == "jpg" else encode_png(image),
        "pose": encode_png(draw_skeleton(keypoints, image.shape[:2])),
        "json": json.dumps({"key": key}).encode(),
    }


def _save(latent: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, latent.astype(np.float16))
    return file.getvalue()


def _describe(key, image, keypoints, image_format) -> dict:
    return {
        "key": key, "name": f"{key}.{image_format}", "view": None, "image_extension": image_format,
        "height": image.shape[0], "width": image.shape[1], "keypoints": keypoints.reshape(-1),
        "num_people": None, "is_valid": True, "latent_offset": None, "latent_size": None,
    }  # fmt: skip


def _write_members(tar, buffer, key, members, image_format) -> dict[str, int]:
    places = {}
    for member, data in members.items():
        header = tarfile.TarInfo(member_name(key, member, image_format))
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))
        places[f"{member}_offset"] = buffer.tell() - len(data) - (-len(data) % 512)
        places[f"{member}_size"] = len(data)
    return places


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 pairs in 6 shards."""
    return write_shards(tmp_path_factory.mktemp("sets") / "plain")


@pytest.fixture(scope="session")
def latent_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with latents."""
    return write_shards(tmp_path_factory.mktemp("sets") / "latents", latent_shape=(8, 4, 4))


@dataclass
class Server:
    """An HTTP server of one folder whose answers to requests for tars can be spoilt."""

    url: str
    faults: list[str] = field(default_factory=list)
    """What befalls the next requests for tars, first to last: `error`, `cut`, `flip`, `ok`."""
    requests: list[str] = field(default_factory=list)
    """Names of the tars asked for, one entry per request."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args, server_state: Server, **kwargs) -> None:
        self.server_state = server_state
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        path = Path(self.translate_path(self.path))
        if path.suffix != ".tar" or not path.exists():
            return super().do_GET()
        self.server_state.requests.append(name)
        fault = self.server_state.faults.pop(0) if self.server_state.faults else "ok"
        data = bytearray(path.read_bytes())
        if fault == "error":
            return self.send_error(503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "flip":
            data[len(data) // 2] ^= 1
        if fault == "cut":
            self.close_connection = True
            data = data[: len(data) // 2]
        self.wfile.write(data)
        return None

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    """Start a server of a folder."""
    servers = []

    def start(folder: Path) -> Server:
        state = Server("")
        handler = partial(_Handler, server_state=state, directory=str(folder))
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{server.server_port}"
        return state

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
