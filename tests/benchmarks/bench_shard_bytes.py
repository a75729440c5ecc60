"""Bytes of the shards of DeepFashion and Market-1501, against storing every pair on its own.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_shard_bytes.py NAMES

NAMES holds train.lst.gz and test.lst.gz of DeepFashion. The photos are drawn, of the real ones'
size; a few hundred distinct ones take turns. Market-1501's names are not public in a list: its
published numbers of images, persons and pairs are met by drawn persons of as many images.
"""

import argparse
import gzip
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from drawn_photos import draw_photos, keypoint_rows, write_photos

from preprocessing.build_shards import main as build_shards
from shards.format import MEMBER_SUFFIXES, ShardSet, open_shards

BLOCK = 512
NUM_DISTINCT = 400
MARKET_IMAGES, MARKET_PERSONS, MARKET_PAIRS = 12_936, 751, 263_632


def build_deepfashion(names_folder: Path, work: Path) -> ShardSet:
    photos = draw_photos(NUM_DISTINCT, (1101, 750), 0.3)
    root = work / "deepfashion"
    for split in ("train", "test"):
        packed = (names_folder / f"{split}.lst.gz").read_bytes()
        names = gzip.decompress(packed).decode().split()
        write_photos(root / f"{split}_highres", names, photos)
        (root / f"{split}.lst").write_text("\n".join(names))
        annotation = root / f"fasion-resize-annotation-{split}.csv"
        annotation.write_text("".join(keypoint_rows(names, (256, 176))))
    return build("deepfashion", root, work / "deepfashion-shards")


def build_market(work: Path) -> ShardSet:
    sizes = market_sizes()
    names = [
        f"{person + 2:04d}_c{image % 6 + 1}s1_{image:06d}_00.jpg"
        for person, size in enumerate(sizes)
        for image in range(size)
    ]
    root = work / "market"
    write_photos(root / "bounding_box_train", names, draw_photos(NUM_DISTINCT, (128, 64), 0.5))
    annotation = root / "market-annotation-train.csv"
    annotation.write_text("".join(keypoint_rows(names, (128, 64))))
    return build("market1501", root, work / "market-shards", "--image-size", "original")


def market_sizes() -> list[int]:
    """Images of each person: as many persons and images as published, pairs as near as possible."""
    mean = MARKET_IMAGES / MARKET_PERSONS
    variance = (MARKET_PAIRS + MARKET_IMAGES) / MARKET_PERSONS - mean**2
    spread = np.random.default_rng(0).gamma(mean**2 / variance, variance / mean, MARKET_PERSONS)
    sizes = np.maximum(2, np.round(spread * mean / spread.mean())).astype(int)
    while (missing := MARKET_IMAGES - sizes.sum()) != 0:
        sizes[: abs(missing) % MARKET_PERSONS] += np.sign(missing)
    return sizes.tolist()


def build(dataset: str, root: Path, output: Path, *options: str) -> ShardSet:
    start = time.monotonic()
    words = ["--dataset", dataset, "--root", str(root), "--output", str(output), *options]
    if build_shards(words) != 0:
        raise SystemExit("the job failed")
    sys.stdout.write(f"built in {time.monotonic() - start:.0f} s\n")
    return open_shards(str(output))


def report(shards: ShardSet, name: str) -> None:
    manifest, index = shards.manifest, shards.read_index()
    members = [column for column in MEMBER_SUFFIXES if index[f"{column}_size"].null_count == 0]
    sizes = {member: index[f"{member}_size"].to_numpy() for member in members}
    tars = sum(shard.size_bytes for shard in manifest.shards)
    total = tars + sum(table.size_bytes for table in manifest.tables)
    own = sum(int(size.sum()) for size in sizes.values())
    in_tar = sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes.values())
    pairs = shards.read_pairs()
    pair_wise = sum(int(in_tar[pairs[side].to_numpy()].sum()) for side in ("source", "target"))
    means = ", ".join(f"{member} {size.mean():,.0f}" for member, size in sizes.items())
    sys.stdout.write(
        f"\n{name}: {index.num_rows:,} images, each once ({pc.count_distinct(index['key'])} keys), "
        f"{pairs.num_rows:,} pairs\n"
        f"mean bytes of a member: {means}\n"
        f"tars / members' own bytes:       {tars / own:.4f} ({tars / 1e6:,.0f} MB)\n"
        f"everything / members' own bytes: {total / own:.4f} ({total / 1e6:,.0f} MB)\n"
        f"pair-wise layout / everything:   {pair_wise / total:.2f} ({pair_wise / 1e9:,.2f} GB)\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", type=Path, help="folder of train.lst.gz and test.lst.gz")
    parser.add_argument("--work", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        market = build_market(Path(work))
        report(market, "Market-1501, original 128x64")
        deepfashion = build_deepfashion(options.names, Path(work))
        report(deepfashion, "DeepFashion, train 512x512, test original")


if __name__ == "__main__":
    main()
