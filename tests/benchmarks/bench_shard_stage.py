"""The shard stage against a bare decode-resize-encode loop over a pool of two processes.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_shard_stage.py

Both have their processes started and warm; ours also draws skeletons, writes tars and records.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import ray
from drawn_photos import draw_photos, keypoint_rows, write_photos

from cfld.images import decode_image, encode_jpeg, resize_image
from preprocessing.job import run_job
from preprocessing.job_settings import JobSettings
from preprocessing.ray_session import ray_session

PHOTO_SIZE, STORED_SIZE, NOISE = (1101, 750), (512, 512), 0.5
NUM_DISTINCT, IMAGES_PER_PERSON, NUM_PROCESSES = 300, 4, 2


def convert(path: str) -> int:
    photo = decode_image(Path(path).read_bytes())
    return len(encode_jpeg(resize_image(photo, STORED_SIZE), 95))


class StoreWatch:
    """Looks at what the object store holds, ten times a second."""

    def __init__(self) -> None:
        self.peak_bytes = 0.0
        self._total = ray.cluster_resources()["object_store_memory"]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "StoreWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.1):
            used = self._total - ray.available_resources().get("object_store_memory", 0)
            self.peak_bytes = max(self.peak_bytes, used)


def write_root(root: Path, num_images: int) -> list[str]:
    """A folder dataset and its keypoints; return the photos' paths."""
    names = [
        f"p{number // IMAGES_PER_PERSON:05d}/{number % IMAGES_PER_PERSON}.jpg"
        for number in range(num_images)
    ]
    write_photos(root / "photos", names, draw_photos(NUM_DISTINCT, PHOTO_SIZE, NOISE))
    (root / "keypoints.csv").write_text("".join(keypoint_rows(names, (256, 176))))
    return [str(root / "photos" / name) for name in names]


def seconds_of_job(root: Path, output: Path, shard_size_bytes: int) -> float:
    settings = JobSettings(
        dataset="folder",
        root=str(root / "photos"),
        output=str(output),
        image_size=STORED_SIZE,
        shard_size_bytes=shard_size_bytes,
        keypoints=(str(root / "keypoints.csv"),),
        keypoints_frame=(256, 176),
    )
    return run_job(settings, num_workers=NUM_PROCESSES).seconds["shards"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shard-size", type=int, default=8_000_000, help="bytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = write_root(root, options.images)
        pool = get_context("spawn").Pool(NUM_PROCESSES)
        pool.map(convert, paths[:100])
        with ray_session(None, NUM_PROCESSES), pool:
            seconds_of_job(root, root / "warm", options.shard_size)
            bare, ours, peaks = [], [], []
            for number in range(options.rounds):
                start = time.perf_counter()
                num_bytes = sum(pool.imap_unordered(convert, paths, chunksize=16))
                bare.append(options.images / (time.perf_counter() - start))
                with StoreWatch() as watch:
                    seconds = seconds_of_job(root, root / f"out{number}", options.shard_size)
                ours.append(options.images / seconds)
                peaks.append(watch.peak_bytes)
    ratios = [b / a for a, b in zip(bare, ours, strict=True)]
    decoded = options.images * PHOTO_SIZE[0] * PHOTO_SIZE[1] * 3
    photo, stored = len(draw_photos(1, PHOTO_SIZE, NOISE)[0]), num_bytes / options.images
    sys.stdout.write(
        f"{options.images} photos {PHOTO_SIZE}, first one {photo / 1e3:.0f} kB, stored "
        f"{stored / 1e3:.0f} kB, {options.rounds} interleaved rounds\n"
        f"bare loop, pool of 2:  {statistics.median(bare):7.1f} images/s ({min(bare):.1f} to "
        f"{max(bare):.1f})\n"
        f"shard stage:           {statistics.median(ours):7.1f} images/s ({min(ours):.1f} to "
        f"{max(ours):.1f})\n"
        f"ratio of each round:   {statistics.median(ratios):7.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f})\n"
        f"object store, peak:    {max(peaks) / 1e6:7.2f} MB of {decoded / 1e6:,.0f} MB decoded\n"
    )


if __name__ == "__main__":
    main()
