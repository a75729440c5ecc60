"""Score a folder of generated images, from any method, by the paper's protocol."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from cfld.frechet import FeatureStatistics
from cfld.metric_networks import NETWORK_METRICS, MetricNetworks, load_metric_networks
from cfld.metrics import PAIR_METRICS
from cfld.paper_tables import format_score, markdown_table
from cfld.photo_source import Pair, PhotoSource, SourceError, open_photos
from cfld.report import Evaluation, write_report
from cfld.result_files import (
    KNOWN_PATTERNS,
    Panel,
    ResultError,
    ResultFiles,
    find_results,
    inspect_results,
    name_of,
    read_panel,
)
from cfld.scoring import (
    ImagePair,
    Pixels,
    map_ahead,
    protocol_images,
    protocol_target,
    reference_statistics,
    score,
)

logger = logging.getLogger(__name__)

FIDS = ("fid_paper", "fid")
NUM_NAMES_SHOWN = 10

_EXAMPLE = """\
example, a row of the paper's Table 2 from a released result set:
  python -m cfld.evaluate --generated results/PIDM --targets shards/deepfashion \\
      --reference shards/deepfashion --size 256 176 --output scores/PIDM

known file names: """ + "; ".join(f"{pattern} ({who})" for pattern, who in KNOWN_PATTERNS.items())


@dataclass(frozen=True, kw_only=True)
class ResultReader:
    """Reads a result set at the protocol's size; a target is decoded once for all its pairs."""

    results: ResultFiles
    targets: PhotoSource
    size: tuple[int, int]
    panel: Panel

    def read_all(self) -> Iterator[ImagePair]:
        """Yield all pairs, those of one target together, decoded ahead on all cores."""
        of_target = defaultdict(list)
        for pair in self.results.files:
            of_target[pair[1]].append(pair)
        groups = map_ahead(lambda item: self._read(*item), of_target.items())
        yield from chain.from_iterable(groups)

    def read(self, name: str) -> ImagePair:
        """Read one pair by the name it is scored under."""
        pair = next(pair for pair in self.results.files if name_of(pair) == name)
        return self._read(pair[1], [pair])[0]

    def _read(self, target: str, pairs: Sequence[Pair]) -> list[ImagePair]:
        photo = protocol_target(self.targets, target, self.size)
        return [ImagePair(name_of(pair), self._generated(pair), photo) for pair in pairs]

    def _generated(self, pair: Pair) -> Pixels:
        image = read_panel(self.results.files[pair], self.panel)
        if image.shape[:2] == self.size:
            return image
        batch = rearrange(torch.from_numpy(image.copy()), "h w c -> 1 c h w").float() / 255
        return np.asarray(rearrange(protocol_images(batch, self.size), "1 c h w -> h w c"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parse(arguments)
    try:
        evaluation, reader = evaluate_results(args)
    except (ResultError, SourceError) as error:
        logger.error("%s", error)
        return 2
    write_report(args.output, evaluation, reader.read)
    rows = [[name, format_score(name, value)] for name, value in evaluation.means().items()]
    sys.stdout.write(markdown_table(["metric", "value"], rows))
    for name, reason in evaluation.scores.missing.items():
        logger.warning("no %s: %s", name, reason)
    logger.info("report: %s", args.output / "report.html")
    return 0


def evaluate_results(args: argparse.Namespace) -> tuple[Evaluation, ResultReader]:
    """Check a folder of generated images, then score it.

    Raises:
        ResultError, SourceError: If it can't be scored as it is; nothing has been computed then.
    """
    size = (args.size[0], args.size[1])
    targets = open_photos(args.targets, args.split, args.pairs)
    reference = open_photos(args.reference, args.reference_split) if args.reference else None
    results = find_results(args.generated, targets, args.pattern)
    notes = _check_results(results, args)
    networks = _load_networks(args, reference)
    reader = ResultReader(results=results, targets=targets, size=size, panel=args.panel)
    metrics = [name for name in PAIR_METRICS if name in args.metrics]
    scores = score(reader.read_all(), networks, metrics)
    references: dict[str, FeatureStatistics] = {}
    if reference is not None:
        references = reference_statistics(reference, size, networks, args.cache)
    evaluation = Evaluation(
        title=f"Scores of {args.generated.name}",
        size=size,
        settings={
            "generated": str(args.generated),
            "file names": results.pattern,
            "targets": f"{args.targets} ({args.split})",
            "targets sha256": targets.sha256,
            "FID reference": reference.where if reference else None,
            "FID reference sha256": reference.sha256 if reference else None,
            "FID reference images": len(reference.places) if reference else None,
        },
        scores=scores,
        fids=scores.fids(references),
        missing_images=results.missing,
        surplus_images=results.surplus,
        notes=(*notes, *filter(None, [targets.note])),
    )
    return evaluation, reader


def _check_results(results: ResultFiles, args: argparse.Namespace) -> tuple[str, ...]:
    """Refuse a result set that cannot be scored as it is; return what must be mentioned."""
    problems = inspect_results(results, args.panel)
    size = (args.size[0], args.size[1])
    faults = []
    if problems.unreadable:
        faults.append(_listed("are no readable images", sorted(problems.unreadable)))
    if problems.transparent:
        faults.append(
            _listed("have transparent pixels; lay them over a background", problems.transparent)
        )
    wrong = {each: names for each, names in problems.sizes.items() if each != size}
    if wrong and not args.resize:
        for (height, width), names in wrong.items():
            hint = f"are {height}x{width}, not {size[0]}x{size[1]}; --resize brings them there"
            if height == size[0] and width % size[1] == 0:
                count = width // size[1]
                hint = f"are strips of {count} images; --panel {count}/{count} takes the last"
            faults.append(_listed(hint, names))
    if not args.allow_missing:
        for kind, names in (("are missing", results.missing), ("fit no pair", results.surplus)):
            if names:
                faults.append(_listed(f"{kind}; --allow-missing scores the others", names))
    if len(results.files) < 2 and args.reference and set(FIDS) & set(args.metrics):
        faults.append("FID needs at least 2 generated images, this is 1; leave it out of --metrics")
    if faults:
        raise ResultError("\n".join(f"{results.folder}: {fault}" for fault in faults))
    if wrong:
        count = sum(map(len, wrong.values()))
        return (*problems.notes, f"{count} generated images were resized from {sorted(wrong)}")
    return problems.notes


def _listed(what: str, names: Sequence[str]) -> str:
    shown = "".join(f"\n  {name}" for name in names[:NUM_NAMES_SHOWN])
    rest = len(names) - NUM_NAMES_SHOWN
    return f"{len(names)} {what}:{shown}" + (f"\n  … and {rest} more" if rest > 0 else "")


def _load_networks(args: argparse.Namespace, reference: PhotoSource | None) -> MetricNetworks:
    wanted = [name for name in NETWORK_METRICS if name in args.metrics]
    without = [] if reference is not None else [name for name in wanted if name in FIDS]
    networks = load_metric_networks(
        [name for name in wanted if name not in without], args.metric_weights, args.device
    )
    reasons = dict.fromkeys(without, "it needs the photos of --reference")
    return replace(networks, missing=networks.missing | reasons)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cfld.evaluate",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to score")
    what.add_argument("--generated", type=Path, required=True, metavar="DIR")
    what.add_argument("--pattern", help="how files are named, such as '{source}_to_{target}.png'")
    what.add_argument(
        "--panel",
        type=Panel.parse,
        default=Panel(),
        metavar="K/N",
        help="files are strips of N images",
    )
    what.add_argument(
        "--resize", action="store_true", help="accept other sizes and resize as the protocol does"
    )
    what.add_argument(
        "--allow-missing", action="store_true", help="go on with images missing or left over"
    )
    against = parser.add_argument_group("against what")
    against.add_argument("--targets", required=True, metavar="SHARDS|DIR", help="the real photos")
    against.add_argument("--split", default="test", help="of shards (default: %(default)s)")
    against.add_argument("--pairs", type=Path, metavar="CSV", help="published list: from,to")
    against.add_argument("--reference", metavar="SHARDS|DIR", help="photos FID compares with")
    against.add_argument(
        "--reference-split", default="train", metavar="SPLIT", help="(default: %(default)s)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--size", type=int, nargs=2, default=[256, 176], metavar=("HEIGHT", "WIDTH"),
        help="256 176 (default), 512 352 or 128 64",
    )  # fmt: skip
    how.add_argument(
        "--metrics", nargs="+", choices=(*PAIR_METRICS, *NETWORK_METRICS),
        default=(*PAIR_METRICS, *NETWORK_METRICS), metavar="NAME",
        help=f"of {', '.join((*PAIR_METRICS, *NETWORK_METRICS))} (default: all)",
    )  # fmt: skip
    how.add_argument(
        "--metric-weights", type=Path, metavar="DIR", help="folder of the networks' published files"
    )
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--cache", type=Path, default=_cache_dir(), help="(default: %(default)s)")
    how.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    for name in ("generated", "metric_weights", "pairs"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            parser.error(f"--{name.replace('_', '-')}: {path} does not exist")
    return args


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cfld" / "fid"


if __name__ == "__main__":
    sys.exit(main())
