"""All 52,712 names of DeepFashion from files and published keypoints to a shard set; driver memory.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_end_to_end.py NAMES

NAMES holds train.lst.gz and test.lst.gz. Photos are drawn, 256x176, and stored so. Memory is the
largest resident size of the command's own process, for 5,000 images and for 50,000.
"""

import argparse
import gzip
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from drawn_photos import draw_photos, keypoint_rows, write_photos

NUM_DISTINCT = 400
SIZE = (256, 176)


def write_root(names_folder: Path, root: Path, num_images: int) -> None:
    photos = draw_photos(NUM_DISTINCT, SIZE, 0.5)
    for split in ("test", "train"):
        names = gzip.decompress((names_folder / f"{split}.lst.gz").read_bytes()).decode().split()
        names = names[:num_images]
        num_images -= len(names)
        write_photos(root / f"{split}_highres", names, photos)
        (root / f"{split}.lst").write_text("\n".join(names))
        annotation = root / f"fasion-resize-annotation-{split}.csv"
        annotation.write_text("".join(keypoint_rows(names, SIZE)))


def run(root: Path, output: Path) -> tuple[float, float, str]:
    """Run the command; return seconds, the largest resident size of its process, its summary."""
    command = [sys.executable, "-m", "preprocessing.build_shards", "--dataset", "deepfashion"]
    command += ["--root", str(root), "--output", str(output), "--image-size", *map(str, SIZE)]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak_kb = 0
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            if match := re.search(r"VmHWM:\s+(\d+)", status.read_text()):
                peak_kb = int(match[1])
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        summary = process.stdout.read() if process.stdout else ""
    if process.returncode != 0:
        raise SystemExit("the job failed")
    return time.monotonic() - start, peak_kb / 1024, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", type=Path, help="folder of train.lst.gz and test.lst.gz")
    options = parser.parse_args()
    for num_images in (5_000, 50_000, 52_712):
        with tempfile.TemporaryDirectory() as work:
            root, output = Path(work) / "root", Path(work) / "out"
            write_root(options.names, root, num_images)
            seconds, peak_mb, summary = run(root, output)
        sys.stdout.write(
            f"{num_images:,} images: {seconds:.0f} s, {num_images / seconds:.0f} images/s on "
            f"{os.cpu_count()} cores, the driver's peak {peak_mb:.0f} MB\n{summary}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
