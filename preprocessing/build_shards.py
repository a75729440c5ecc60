"""Command: a folder of person photos becomes WebDataset shards, an index and pairs."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

from fsspec.core import url_to_fs
from ray.exceptions import RayError

from cfld.keypoints import KeypointsError
from cfld.openpose import PoseNetworkError
from preprocessing.assembly import NoImagesError
from preprocessing.check import check
from preprocessing.datasets import DATASETS
from preprocessing.files import list_folder, resolve
from preprocessing.job import JobResult, run_job
from preprocessing.job_settings import (
    ORIGINAL,
    JobSettings,
    SettingsError,
    explain,
    require_access,
)
from preprocessing.latent_actor import LatentError
from preprocessing.latent_stage import LatentSettings
from preprocessing.photo_reader import PhotoStoreError
from preprocessing.store import OutputError
from shards.format import FormatError

logger = logging.getLogger(__name__)

_BAD_INPUT = (SettingsError, OutputError, FormatError, KeypointsError, PoseNetworkError, OSError)

_EXAMPLE = """\
example:
  python -m preprocessing.build_shards --dataset folder --root photos --output shards

Run it again to go on where it was stopped; the result is the same to the byte."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("preprocessing").setLevel(logging.INFO)
    try:
        if options.output is None and not options.check:
            parser.error("--output is needed (or --check)")
        settings = _read_settings(options)
        if options.check:
            return _check(settings)
        result = run_job(settings, num_workers=options.num_workers, ray_address=options.ray_address)
    except _BAD_INPUT as error:
        logger.error("%s", explain(error))
        return 2
    except NoImagesError as error:
        logger.error("%s", error)
        return 1
    except (PhotoStoreError, LatentError, RayError) as error:
        logger.error("stopped: %s; what is finished is kept, run the same command again", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; what is finished is kept, run the same command to go on")
        return 1
    sys.stdout.write(_summarize(result, settings.output))
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.build_shards",
        usage="%(prog)s --dataset NAME --root ROOT --output OUTPUT [options]",
        description="Make WebDataset shards, an index and pairs of a folder of person photos.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, choices=sorted(DATASETS))
    parser.add_argument("--root", required=True, help="where the photos are: folder or URL")
    parser.add_argument("--output", help="where the shards go: folder or URL (s3://...)")
    parser.add_argument("--check", action="store_true", help="say what is in the root, and stop")
    _add_images(parser)
    _add_selection(parser)
    _add_keypoints(parser)
    _add_running(parser)
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--image-size",
        nargs="+",
        metavar="PIXELS",
        help="HEIGHT WIDTH, or 'original' for untouched files (default: 512 512, test: original)",
    )
    group.add_argument("--jpeg-quality", type=int, default=95, metavar="1..100")
    group.add_argument("--shard-size", type=float, default=64.0, metavar="MB")
    group.add_argument(
        "--latents",
        metavar="VAE",
        help="store the latents of resized images too, now or in shards that are complete: folder "
        "or hub name of an AutoencoderKL or its pipeline ('tiny' needs none)",
    )


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("selection")
    group.add_argument("--splits", nargs="+", metavar="SPLIT")
    group.add_argument("--limit", type=int, metavar="N", help="about N photos: whole persons")
    group.add_argument("--seed", type=int, default=0, help="which persons (default: 0)")


def _add_keypoints(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("keypoints and pairs (default: what lies in the root)")
    group.add_argument(
        "--pose-network",
        metavar="FILE",
        help="ONNX, or OpenPose's weights: .pth or a hub repository (default: controlnet-aux's)",
    )
    group.add_argument(
        "--keypoints",
        nargs="+",
        default=[],
        metavar="FILE",
        help="PATN csv, OpenPose or COCO JSON; photos that they lack go to the --pose-network, if "
        "one is named",
    )
    group.add_argument(
        "--keypoints-frame",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="what their coordinates refer to (default: of deepfashion's and market1501's csv "
        "what was published, else each photo)",
    )
    group.add_argument(
        "--pairs", nargs="+", metavar="SPLIT=FILE", help="csv from,to instead of all pairs"
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--num-workers", type=int, metavar="N", help="default: all cores")
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="a running Ray cluster, whose nodes all see root and output (default: RAY_ADDRESS)",
    )


def _read_settings(options: argparse.Namespace) -> JobSettings:
    settings = JobSettings(
        dataset=options.dataset,
        root=options.root,
        output=options.output or "",
        jpeg_quality=options.jpeg_quality,
        shard_size_bytes=_read_shard_size(options.shard_size),
        splits=tuple(options.splits) if options.splits else None,
        limit=options.limit,
        seed=options.seed,
        keypoints=tuple(file for path in options.keypoints for file in _files(path)),
        keypoints_frame=tuple(options.keypoints_frame) if options.keypoints_frame else None,
        pairs=_read_pairs(options.pairs) if options.pairs else None,
        pose_network=options.pose_network,
        latents=options.latents,
    )
    if options.image_size is None:
        return settings
    size = _read_image_size(options.image_size)
    return replace(settings, image_size=size, test_image_size=size)


def _read_image_size(words: Sequence[str]) -> tuple[int, int] | None:
    if list(words) == [ORIGINAL]:
        return None
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise SettingsError(f"--image-size {' '.join(words)}: give HEIGHT WIDTH or {ORIGINAL!r}")
    return int(words[0]), int(words[1])


def _read_shard_size(megabytes: float) -> int:
    if not 0 < megabytes < math.inf:
        raise SettingsError(f"--shard-size {megabytes}: must be a positive number of megabytes")
    return int(megabytes * 1e6)


def _read_pairs(words: Sequence[str]) -> dict[str, str]:
    pairs = dict(word.split("=", 1) for word in words if "=" in word)
    if len(pairs) != len(words):
        raise SettingsError(f"--pairs {' '.join(words)}: give SPLIT=FILE, each split once")
    return pairs


def _files(path: str) -> list[str]:
    """Return the JSON files of a folder, or the file itself."""
    fs, place = url_to_fs(path)
    if not fs.isdir(place):
        return [path]
    names = [name for name in list_folder(path)[1] if name.lower().endswith(".json")]
    if not names:
        raise SettingsError(f"--keypoints {path}: there is no .json file in this folder")
    return [f"{resolve(path)}/{name}" for name in names]


def _check(settings: JobSettings) -> int:
    require_access(settings.root)
    found = check(DATASETS[settings.dataset], settings.root)
    sys.stdout.write(found.report + _describe_latents(settings))
    return 0 if found.num_images else 2


def _describe_latents(settings: JobSettings) -> str:
    """Say what latents would take; empty if none are asked for."""
    if settings.latents is None:
        return ""
    sizes = settings.latent_image_sizes
    latents = LatentSettings.of(settings.latents, sizes)
    each = ", ".join(
        f"{latents.num_bytes(size) / 1e3:,.1f} kB for each image of {size[0]}x{size[1]}"
        for size in sorted(sizes)
    )
    return f"\nlatents of {settings.latents}: {each}; photos kept as they are have none\n"


def _summarize(result: JobResult, output: str) -> str:
    manifest = result.manifest
    lines = [f"{output} is complete" + ("" if result.seconds else " already: nothing was done")]
    header = ("", "images", "persons", "valid", "pairs")
    rows = [header] + [
        (split, *(f"{n:,}" for n in (counts.images, counts.persons, counts.valid, counts.pairs)))
        for split, counts in manifest.counts.items()
    ]
    lines += ["".join(f"{cell:>12}" for cell in row) for row in rows]
    lines.append(f"{len(manifest.shards):,} shards, {manifest.size_bytes / 1e6:,.1f} MB in all")
    if unpaired := [split for split, counts in manifest.counts.items() if not counts.pairs]:
        lines.append(f"no pair in {', '.join(unpaired)}: nothing to train on or to score there")
    if manifest.rejects:
        lines.append("left out of the shards or of all pairs (see rejects.parquet):")
        lines += [f"{count:>12,}  {reason}" for reason, count in manifest.rejects.items()]
    if result.seconds:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
        lines.append(f"seconds: {stages}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
