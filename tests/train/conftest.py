"""Small shard sets, written from the format's definition alone, a server of folders, and runs."""

import hashlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import tarfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

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

REPOSITORY = Path(__file__).parents[2]


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


# The smallest model of the paper's wiring; what is said here is different from `tiny`.
SMALL_RUN = {
    "preset": "tiny",
    "steps": 4,
    "order": {"global_batch": 12},
    "loader": {"flip_source": 0.5, "num_workers": 0},
    "optimizer": {"rate_per_pair": 1e-4, "part_factors": {"source_encoder": 0.5}},
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "engine": {"precision": "fp32", "micro_batch": 3, "zero_stage": 0},
    "model": {
        "source_encoder": {
            "width": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 1, 1],
        },
        "prompt_decoder": {"depth": 1, "dim": 16, "num_heads": 1, "num_queries": 2},
        "appearance": {"widths": [8, 8, 8], "head_dim": 8},
        "pose_adapter": {"num_groups": 4},
        "unet": {"channels": [16, 16, 16, 16], "num_groups": 4, "is_frozen": True},
    },
    "log": {"tensorboard": False},
    "pictures": {"every_steps": 0},
}


@dataclass
class Runs:
    """Runs the training command in ranks forked from here, which need not import anything."""

    folder: Path
    config: Path

    def start(
        self, *overrides: str, output: str = "run", ranks: int = 1, said: int | None = None
    ) -> list[int]:
        """Start a run that writes to the file descriptor `said`; return its ranks' process ids."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = ["--config", str(self.config), "--set", f"output={self.folder / output}"]
        arguments += overrides
        pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                self._be_rank(rank, ranks, port, arguments, said)
            pids.append(pid)
        return pids

    def launch(self, *overrides: str, output: str = "run", ranks: int = 1) -> subprocess.Popen:
        """Start a run by DeepSpeed's launcher, as a process group of its own."""
        command = [
            *(Path(sys.executable).with_name("deepspeed"), "--num_accelerators", str(ranks)),
            *("train/main.py", "--deepspeed", "--config", self.config),
            *("--set", f"output={self.folder / output}", *overrides),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)

    def start_and_watch(
        self, *overrides: str, output: str = "run", ranks: int = 1
    ) -> tuple[list[int], Iterator[str]]:
        """Start a run; return its ranks' process ids and the lines it writes, as they come."""
        reading, writing = os.pipe()
        pids = self.start(*overrides, output=output, ranks=ranks, said=writing)
        os.close(writing)
        return pids, iter(os.fdopen(reading))

    def run(self, *overrides: str, output: str = "run", ranks: int = 1) -> list[int]:
        """Run to the end; return the exit code of each rank."""
        return self.wait(self.start(*overrides, output=output, ranks=ranks))

    def wait(self, pids: list[int]) -> list[int]:
        """Exit codes, negative ones for signals."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    def check(self, *overrides: str, output: str = "run", ranks: int = 1) -> list[float]:
        """Run to the end and return the losses, failing with what was said if it failed."""
        codes = self.run(*overrides, output=output, ranks=ranks)
        assert codes == [0] * ranks, self.said()
        return self.losses(output)

    def losses(self, output: str = "run") -> list[float]:
        """The loss of each step so far."""
        return [line["loss"] for line in self.lines("metrics.jsonl", output)]

    def lines(self, name: str, output: str = "run") -> list[dict]:
        """What a file of JSON lines holds."""
        return [json.loads(line) for line in (self.folder / output / name).open()]

    def said(self) -> str:
        """All that the ranks of all runs have written to the terminal."""
        path = self.folder / "said.txt"
        return path.read_text() if path.exists() else ""

    def _be_rank(
        self, rank: int, ranks: int, port: int, arguments: list[str], said: int | None
    ) -> None:
        code = 1
        try:
            if said is None:
                said = os.open(self.folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - until the end
            logging.getLogger().handlers.clear()  # pytest's
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
            if ranks > 1:
                names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                values = (rank, rank, ranks, "127.0.0.1", port)
                os.environ |= dict(zip(names, map(str, values), strict=True))
            from train.main import main

            code = main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


@pytest.fixture
def runs(tmp_path: Path, shard_set: Path) -> Runs:
    """Runs of a very small model on 72 pairs, 6 steps an epoch."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, here, instead of in every rank

    import train.main  # noqa: F401

    config = tmp_path / "small.yaml"
    settings = SMALL_RUN | {"data": {"drawn": {"url": str(shard_set)}}}
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return Runs(tmp_path, config)
