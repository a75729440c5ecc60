"""The loader against one that does per pair what the authors' does, and reading against webdataset.

python tests/benchmarks/bench_loader.py [FOLDER]     drawn photos and shards are kept in FOLDER
"""

import io
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cfld.images import encode_jpeg, resize_image
from cfld.pose import canvas_points, draw_skeleton
from shards.format import open_shards
from tests.train.conftest import write_shards
from tests.train.nginx import has_nginx, slow_server
from train.loader import Loader, LoaderConfig
from train.order import OrderConfig, PairSet
from train.pair_table import PairTable, SetConfig, read_pairs
from train.shard_cache import CacheConfig
from train.shard_files import ShardFiles

PHOTO, PERSONS, VIEWS, BATCH, NUM_ROUNDS = (1101, 750), 150, 4, 16, 5
SMALL_PERSONS, NUM_PHOTOS, NUM_WARM_UP = 500, 60, 6
DEEPFASHION_PAIRS = 101_966
STEP_PAIRS, STEP_S, NUM_STEPS = 48, 48 / 150, 40

JOINT_X = (50, 50, 41, 38, 37, 59, 62, 63, 45, 44, 44, 55, 56, 56, 48, 52, 46, 54)
JOINT_Y = (12, 20, 20, 34, 46, 20, 34, 46, 50, 70, 90, 50, 70, 90, 10, 10, 11, 11)


def draw_photo(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A textured figure before a plain wall as large as DeepFashion's, resized; its keypoints."""
    rows, columns = np.mgrid[: PHOTO[0], : PHOTO[1]]
    figure = ((rows - 600) / 480) ** 2 + ((columns - 375) / 170) ** 2 < 1
    coarse = Image.fromarray(rng.integers(0, 255, (92, 63, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize(PHOTO[::-1], Image.Resampling.BICUBIC))
    noise = rng.integers(-3, 4, texture.shape, dtype=np.int8)
    photo = np.where(figure[..., None], texture.astype(np.int16) + noise, 236)
    points = np.stack([JOINT_X, JOINT_Y], axis=1) / 100 + rng.normal(0, 0.02, (18, 2))
    keypoints = np.hstack([points * size[::-1], np.ones((18, 1))]).astype(np.float32)
    return resize_image(photo.clip(0, 255).astype(np.uint8), size), keypoints


class PerPairDataset(Dataset):
    """The baseline: everything anew for every pair, by Pillow and full grids, in float32."""

    def __init__(self, photos: list[bytes], table: PairTable) -> None:
        self.photos, self.table = photos, table

    def __len__(self) -> int:
        return len(self.table.source)

    def __getitem__(self, pair: int) -> dict[str, np.ndarray]:
        source, target = int(self.table.source[pair]), int(self.table.target[pair])
        photos = [
            Image.open(io.BytesIO(self.photos[row % NUM_PHOTOS])).convert("RGB")
            for row in (source, target)
        ]
        return {
            "source_image": to_floats(photos[0], 512),
            "target_image": to_floats(photos[1], 512),
            "condition": to_floats(photos[0], 256),
            "source_pose": self.pose_map(source),
            "target_pose": self.pose_map(target),
        }

    def pose_map(self, row: int) -> np.ndarray:
        keypoints, frame = self.table.keypoints[row], tuple(self.table.frame[row].tolist())
        maps = np.zeros((256, 256, 18), np.float32)
        for joint, (x, y) in enumerate(canvas_points(keypoints, frame)):
            columns, rows = np.meshgrid(np.arange(256), np.arange(256))
            maps[..., joint] = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 6**2))
        skeleton = draw_skeleton(keypoints, frame) / np.float32(255)
        return np.concatenate([skeleton, maps], axis=-1).transpose(2, 0, 1)


def to_floats(photo: Image.Image, side: int) -> np.ndarray:
    pixels = np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC))
    return (pixels.astype(np.float32) / 255 * 2 - 1).transpose(2, 0, 1)


def per_pair_batches(photos: list[bytes], table: PairTable, num_workers: int) -> Iterator[dict]:
    return iter(DataLoader(PerPairDataset(photos, table), BATCH, shuffle=True,
                           num_workers=num_workers))  # fmt: skip


def our_batches(
    table: PairTable, num_workers: int, pairs: int = BATCH, use_latents: bool = False
) -> Iterator:
    """Globally shuffled: all shards are one block."""
    order = OrderConfig(global_batch=pairs, block_shards=10**6)
    config = LoaderConfig(num_workers=num_workers, use_latents=use_latents)
    return iter(Loader(table, order, config, micro_batch=pairs, image_size=(512, 512)))


@dataclass(frozen=True)
class Speed:
    """Of one run: by the clock, and CPU time of the workers (of this process without any)."""

    pairs_per_s: float
    cpu_ms: float


def measure(batches: Iterator, num: int, num_warm_up: int = NUM_WARM_UP) -> Speed:
    """Steady speed: batches that workers had ready before the clock started do not count."""
    for _ in itertools.islice(batches, num_warm_up):
        pass
    processes = psutil.Process().children() or [psutil.Process()]
    start, cpu_s = time.perf_counter(), cpu_seconds(processes)
    for _ in itertools.islice(batches, num):
        pass
    pairs = num * BATCH
    return Speed(
        pairs / (time.perf_counter() - start), (cpu_seconds(processes) - cpu_s) / pairs * 1e3
    )


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def compare_loaders(photos: list[bytes], table: PairTable) -> None:
    contenders: dict[str, Callable[[], Speed]] = {
        "per pair, 1 worker": lambda: measure(per_pair_batches(photos, table, 1), 4, 3),
        "ours, 1 worker": lambda: measure(our_batches(table, 1), 100),
        "ours, 2 workers": lambda: measure(our_batches(table, 2), 160),
        "ours in a thread": lambda: measure(our_batches(table, 0), 100),
        "ours with latents, 1 worker": lambda: measure(
            our_batches(table, 1, use_latents=True), 160
        ),
    }
    runs: dict[str, list[Speed]] = {name: [] for name in contenders}
    for _ in range(NUM_ROUNDS):
        for name, run in contenders.items():
            runs[name].append(run())
    base = runs["per pair, 1 worker"]
    for name, speeds in runs.items():
        values = [speed.pairs_per_s for speed in speeds]
        both = list(zip(speeds, base, strict=True))
        sys.stdout.write(
            f"{name}: {median(values):.1f} pairs/s ({min(values):.1f}-{max(values):.1f}), "
            f"x {median(speed.pairs_per_s / other.pairs_per_s for speed, other in both):.1f}; "
            f"CPU {median(speed.cpu_ms for speed in speeds):.2f} ms a pair, "
            f"x {median(other.cpu_ms / speed.cpu_ms for speed, other in both):.1f}\n"
        )
    two = zip(runs["ours, 1 worker"], runs["ours, 2 workers"], strict=True)
    sys.stdout.write(
        f"two workers against one: x {median(b.pairs_per_s / a.pairs_per_s for a, b in two):.2f}\n"
    )


def megabytes_per_pair(batches: Iterator) -> float:
    batch = next(batches)
    values = batch.values() if isinstance(batch, dict) else (
        getattr(batch, field.name) for field in fields(batch))  # fmt: skip
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / BATCH / 1e6


def wait_share(batches: Iterator) -> float:
    """Part of the time that a trainer waits whose steps last as long as at 150 pairs/s.

    The first batches, for which workers start and first shards are fetched, do not count.
    """
    for _ in itertools.islice(batches, NUM_WARM_UP):
        pass
    waited = 0.0
    start = time.perf_counter()
    for _ in range(NUM_STEPS):
        time.sleep(STEP_S)
        asked = time.perf_counter()
        following = next(batches)
        waited += time.perf_counter() - asked
        batch = following  # frees the last one now, as a trainer does, not while it waits
    del batch
    return waited / (time.perf_counter() - start)


def stream_from_far(folder: Path) -> None:
    """The same wait when shards come from nginx 50 ms away, one connection in seven breaking."""
    shard_bytes = max(path.stat().st_size for path in folder.glob("*.tar"))
    with (
        tempfile.TemporaryDirectory() as work,
        slow_server(folder, Path(work) / "nginx", latency_s=0.05, cut_every=7) as url,
    ):
        cache = CacheConfig(
            folder=f"{work}/cache", size_bytes=5 * shard_bytes, backoff_s=0.05, lookahead_steps=8
        )
        table = read_pairs([SetConfig(url=url)])
        order = OrderConfig(global_batch=STEP_PAIRS, block_shards=2)
        config = LoaderConfig(num_workers=2, use_latents=False, cache=cache)
        share = wait_share(
            iter(Loader(table, order, config, micro_batch=STEP_PAIRS, image_size=(512, 512)))
        )
    sys.stdout.write(
        f"data wait from nginx, cache of 5 of {len(table.shards)} shards of "
        f"{shard_bytes / 1e6:.1f} MB: {share:.2%} of the time\n"
    )


def time_first_batch(table: PairTable) -> None:
    """From nothing to the first batch, at random steps of a run on as many pairs as DeepFashion."""
    repeats = math.ceil(DEEPFASHION_PAIRS / len(table.source))
    pairs = np.tile(table.sets[0].shards, repeats)
    large = replace(
        table,
        source=np.tile(table.source, repeats),
        target=np.tile(table.target, repeats),
        sets=(PairSet(shards=pairs),),
    )
    order = OrderConfig(global_batch=224)
    seconds = []
    for step in np.random.default_rng(0).integers(0, 100 * len(pairs) // 224, 7).tolist():
        start = time.perf_counter()
        loader = Loader(
            large, order, LoaderConfig(use_latents=False), micro_batch=28, image_size=(512, 512)
        )
        epoch, step = divmod(step, loader.steps_per_epoch)
        loader.load_state_dict(loader.state_dict() | {"epoch": epoch, "step": step})
        batch = next(iter(loader))
        seconds.append(time.perf_counter() - start)
        assert (batch.epoch, batch.step) == (epoch, step)
    sys.stdout.write(
        f"first batch after a resume at a random step, {len(pairs):,} pairs: "
        f"{median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})\n"
    )


def compare_small_reads(folder: Path) -> None:
    """Image and record of every 64x128 sample: by place in random order, or streamed."""
    table = read_pairs([SetConfig(url=str(folder))])
    records = open_shards(str(folder)).read_index(["json_offset", "json_size"])
    json_offset, json_size = (column.to_numpy() for column in records.columns)
    order = np.random.default_rng(0).permutation(len(table.row_shard)).tolist()

    def by_place() -> float:
        files = ShardFiles(table.shards, CacheConfig())
        for shard in range(len(table.shards)):
            files.read(shard, 0, 1)  # opened and its hash checked, once per run
        start = time.perf_counter()
        for row in order:
            for offset, size in ((table.image.offset, table.image.size), (json_offset, json_size)):
                files.read(int(table.row_shard[row]), int(offset[row]), int(size[row]))
        seconds = time.perf_counter() - start
        files.close()
        return seconds

    def streamed() -> float:
        urls = [shard.url for shard in table.shards]
        start = time.perf_counter()
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            sample["jpg"], sample["json"]
        return time.perf_counter() - start

    rounds = [(by_place(), streamed()) for _ in range(NUM_ROUNDS)]
    ours, theirs = (median(column) / len(order) * 1e6 for column in zip(*rounds, strict=True))
    ratio = median(b / a for a, b in rounds)
    sys.stdout.write(
        f"a sample of 64x128: by place {ours:.1f} us, webdataset {theirs:.1f} us, x {ratio:.1f}\n"
    )


def main(folder: Path) -> None:
    if not (folder / "small" / "manifest.json").exists():
        write_shards(folder / "large", persons=PERSONS, views=VIEWS, persons_per_shard=15,
                     size=(512, 512), draw=draw_photo, latent_shape=(8, 64, 64))  # fmt: skip
        write_shards(folder / "small", persons=SMALL_PERSONS, views=VIEWS,
                     persons_per_shard=SMALL_PERSONS, size=(128, 64))  # fmt: skip
    rng = np.random.default_rng(0)
    photos = [encode_jpeg(draw_photo(rng, PHOTO)[0]) for _ in range(NUM_PHOTOS)]
    table = read_pairs([SetConfig(url=str(folder / "large"))])
    sys.stdout.write(
        f"photos of {np.mean([len(photo) for photo in photos]) / 1e3:.0f} kB, resized to 512x512 "
        f"{table.image.size.mean() / 1e3:.0f} kB\n"
    )
    compare_loaders(photos, table)
    sys.stdout.write(
        "MB per pair from worker to trainer: per pair "
        f"{megabytes_per_pair(per_pair_batches(photos, table, 1)):.2f}, "
        f"ours {megabytes_per_pair(our_batches(table, 1)):.2f}, "
        f"with latents {megabytes_per_pair(our_batches(table, 1, use_latents=True)):.2f}\n"
    )
    time_first_batch(table)
    compare_small_reads(folder / "small")
    for use_latents in (False, True):
        shares = [wait_share(our_batches(table, 2, STEP_PAIRS, use_latents)) for _ in range(3)]
        sys.stdout.write(
            f"data wait at 150 pairs/s, 2 workers, {'with' if use_latents else 'without'} latents: "
            f"{median(shares):.2%} of the time\n"
        )
    if has_nginx():
        stream_from_far(folder / "large")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
