"""All 52,712 names of DeepFashion from files and published keypoints to a shard set; driver memory.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_end_to_end.py NAMES

NAMES holds train.lst.gz and test.lst.gz. Photos are drawn, 256x176, and stored so. Memory is the
largest resident size of the command's own process, for 5,000 images and for 50,000.
"""

import argparse
import gzip
import json
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


def write_root(names_folder: Path, root: Path) -> None:
    photos = draw_photos(NUM_DISTINCT, SIZE, 0.5)
    for split in ("train", "test"):
        names = gzip.decompress((names_folder / f"{split}.lst.gz").read_bytes()).decode().split()
        write_photos(root / f"{split}_highres", names, photos)
        (root / f"{split}.lst").write_text("\n".join(names))
        annotation = root / f"fasion-resize-annotation-{split}.csv"
        annotation.write_text("".join(keypoint_rows(names, SIZE)))


def run(root: Path, output: Path, *options: str) -> tuple[float, float, str]:
    """Run the command; return seconds, the largest resident size of its process, its summary."""
    command = [sys.executable, "-m", "preprocessing.build_shards", "--dataset", "deepfashion"]
    command += ["--root", str(root), "--output", str(output), "--image-size", *map(str, SIZE)]
    start = time.monotonic()
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
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
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "root"
        write_root(options.names, root)
        for limit in (None, 5_000, 50_000):
            output = Path(work) / f"out-{limit}"
            words = [] if limit is None else ["--limit", str(limit)]
            seconds, peak_mb, summary = run(root, output, *words)
            manifest = json.loads((output / "manifest.json").read_text())
            images = sum(counts["images"] for counts in manifest["counts"].values())
            sys.stdout.write(
                f"{images:,} images: {seconds:.0f} s, {images / seconds:.0f} images/s, "
                f"driver's peak {peak_mb:.0f} MB, {os.cpu_count()} cores\n"
            )
            sys.stdout.write(summary if limit is None else "")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
