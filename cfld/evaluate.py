"""Scores by the paper's protocol: of a model on a split, or of any method's generated images."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cfld.command import finite, make_parser, positive, run_command
from cfld.evaluation.image_workers import choose_devices, run_job
from cfld.evaluation.pair_images import (
    ImageSettings,
    choose_pairs,
    plan_job,
    read_identity,
    reserved,
)
from cfld.evaluation.paper_tables import TABLE_3, TABLE_5, PaperTable, format_score, markdown_table
from cfld.evaluation.photo_source import PhotoSource, SourceError, open_photos
from cfld.evaluation.protocol import (
    METRICS,
    ScoringProtocol,
    check_number,
    check_oneself,
    evaluate,
    open_protocol,
)
from cfld.evaluation.report import Evaluation, write_report
from cfld.evaluation.result_files import (
    KNOWN_PATTERNS,
    PATTERN,
    Panel,
    ResultError,
    ResultFiles,
    check_results,
    find_results,
)
from cfld.evaluation.result_reader import ResultReader
from cfld.evaluation.studies import GUIDANCE_SCALES, StudyRow, write_study
from cfld.generation_options import add_sampling_options
from cfld.sampling import Sampling
from cfld.saved_pipeline import WeightsError, read_device, read_dtype

logger = logging.getLogger("cfld.evaluate")  # run as a command, __name__ is another

_EXAMPLE = """\
examples:
  python -m cfld.evaluate --weights weights --shards shards/deepfashion --output scores/ours
  python -m cfld.evaluate --weights weights --shards shards/deepfashion --sweep guidance \\
      --output scores/guidance
  python -m cfld.evaluate --ablations B1=weights/b1 CFLD=weights/full --shards shards/deepfashion \\
      --output scores/ablations
  python -m cfld.evaluate --generated results/PIDM --targets shards/deepfashion \\
      --reference shards/deepfashion --output scores/PIDM

The same command run again goes on where it was stopped. Known file names of --generated:
  """ + "\n  ".join(f"{pattern} ({who})" for pattern, who in KNOWN_PATTERNS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = _parse(arguments)
    return run_command(lambda: _run(args), ResultError, SourceError, WeightsError)


@dataclass(frozen=True, kw_only=True)
class _Generation:
    """What makes images of pairs, how, and the folder that they and their scores go to."""

    weights: Path
    output: Path
    sampling: Sampling
    scheduler: str | None
    """None: as saved with the weights."""
    dtype: str
    devices: Sequence[str]
    num_pairs: int | None
    """Only so many; None: all."""


def _run(args: argparse.Namespace) -> int:
    device = read_device(args.device)
    photos, protocol = _open(args, device)
    if args.generated:
        table = _means_table(_evaluate_generated(args, photos, protocol))
    elif args.ablations or args.sweep:
        paper_table = TABLE_5 if args.sweep else TABLE_3
        table = _run_study(args.output, paper_table, _variants(args, device), photos, protocol)
    else:
        generation = _read_generation(args, device, args.weights)
        table = _means_table(_evaluate_weights(generation, photos, protocol).evaluation)
    sys.stdout.write(table)
    logger.info("report: %s", args.output / "report.html")
    return 0


def _evaluate_generated(
    args: argparse.Namespace, photos: PhotoSource, protocol: ScoringProtocol
) -> Evaluation:
    results = find_results(args.generated, photos, args.pattern)
    notes = check_results(
        results, protocol.size, args.panel, resize=args.resize, allow_missing=args.allow_missing
    )
    check_number(len(results.files), protocol)
    reader = ResultReader(files=results.files, photos=photos, size=protocol.size, panel=args.panel)
    evaluation = evaluate(
        f"Scores of {args.generated.name}",
        reader,
        protocol,
        settings={"generated": str(args.generated), "file names": results.pattern},
        notes=notes,
    )
    evaluation = replace(evaluation, missing_images=results.missing, surplus_images=results.surplus)
    write_report(args.output, evaluation, reader.read)
    return evaluation


def _variants(args: argparse.Namespace, device: str) -> dict[str, _Generation]:
    """The rows of a study: one pipeline with several scales, or several; each with its folder."""
    if not args.sweep:
        for _, weights in args.ablations:  # what is wrong is to be found before hours of work
            read_identity(weights)
        each = {label: _read_generation(args, device, weights) for label, weights in args.ablations}
        return {label: replace(one, output=args.output / label) for label, one in each.items()}
    scales = GUIDANCE_SCALES | {f"{pose}, {app}": (pose, app) for pose, app in args.scales}
    one = _read_generation(args, device, args.weights)
    return {
        label: replace(
            one,
            output=args.output / f"pose_{pose}_appearance_{appearance}",
            sampling=replace(one.sampling, pose_scale=pose, appearance_scale=appearance),
        )
        for label, (pose, appearance) in scales.items()
    }


def _run_study(
    output: Path,
    paper_table: PaperTable,
    variants: Mapping[str, _Generation],
    photos: PhotoSource,
    protocol: ScoringProtocol,
) -> str:
    rows: dict[str, StudyRow] = {}
    self_checks = None
    for label, generation in variants.items():
        logger.info("row %r", label)
        rows[label] = _evaluate_weights(generation, photos, protocol, self_checks)
        self_checks = rows[label].evaluation.self_checks
    return write_study(output, paper_table, rows)


def _evaluate_weights(
    generation: _Generation,
    photos: PhotoSource,
    protocol: ScoringProtocol,
    self_checks: Mapping[str, Mapping[str, float]] | None = None,
) -> StudyRow:
    """Generate what is not there yet, then score it; self-checks are computed if not given."""
    pairs = choose_pairs(photos.pairs or (), generation.num_pairs)
    check_number(len(pairs), protocol)
    job = plan_job(
        generation.output, generation.weights, photos, pairs, _image_settings(generation, photos),
        batch_size=generation.sampling.batch_size, reconstruct=self_checks is None,
    )  # fmt: skip
    with reserved(job):
        run_job(job, generation.devices)
        results = ResultFiles(
            folder=job.folder / "images", pattern=PATTERN,
            files={pair: job.image_path(pair) for pair in pairs}, missing=(), surplus=(),
        )  # fmt: skip
        notes = check_results(results, protocol.size, Panel(), resize=True, allow_missing=False)
        if len(pairs) < (num_pairs := len(photos.pairs or ())):
            part = f"{len(pairs)} of the {num_pairs} pairs, chosen by a hash of their names"
            notes = (*notes, f"Only {part}, were generated")
        reader = ResultReader(files=results.files, photos=photos, size=protocol.size)
        evaluation = evaluate(
            f"Scores of {job.weights.name or job.weights}",
            reader,
            protocol,
            settings={"weights": str(job.weights), **asdict(job.settings)},
            notes=notes,
            self_checks=self_checks or check_oneself(job, protocol),
        )
        write_report(job.folder, evaluation, reader.read)
    return StudyRow(evaluation, job.folder.name, reader)


def _image_settings(generation: _Generation, photos: PhotoSource) -> ImageSettings:
    weights_sha256, scheduler = read_identity(generation.weights)
    sampling = generation.sampling
    return ImageSettings(
        weights_sha256=weights_sha256,
        photos_sha256=photos.sha256,
        scheduler=generation.scheduler or scheduler,
        num_steps=sampling.num_steps,
        pose_scale=sampling.pose_scale,
        appearance_scale=sampling.appearance_scale,
        seed=sampling.seed,
        dtype=generation.dtype,
    )


def _read_generation(args: argparse.Namespace, device: str, weights: Path) -> _Generation:
    return _Generation(
        weights=weights,
        output=args.output,
        sampling=Sampling(
            num_steps=args.steps,
            pose_scale=args.pose_scale,
            appearance_scale=args.appearance_scale,
            seed=args.seed,
            batch_size=args.batch_size,
        ),
        scheduler=args.scheduler,
        dtype=read_dtype(args.dtype, device),
        devices=choose_devices(device, args.workers),
        num_pairs=args.num_pairs,
    )


def _open(args: argparse.Namespace, device: str) -> tuple[PhotoSource, ScoringProtocol]:
    photos = open_photos(args.targets, args.split, args.pairs)
    if not (args.generated or photos.pairs):
        raise SourceError(f"{photos.where}: there are no pairs of split {args.split!r}")
    reference = None
    if args.reference:
        reference = open_photos(args.reference, args.reference_split)
    elif not args.generated and args.reference_split in photos.splits:
        reference = open_photos(args.targets, args.reference_split)
    protocol = open_protocol(
        (args.size[0], args.size[1]),
        args.metrics,
        reference,
        weights_dir=args.metric_weights,
        device=device,
        cache=args.cache,
    )
    return photos, protocol


def _means_table(evaluation: Evaluation) -> str:
    rows = [[name, format_score(name, value)] for name, value in evaluation.means().items()]
    return markdown_table(["metric", "value"], rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("cfld.evaluate", __doc__, _EXAMPLE)
    what = parser.add_argument_group("what to score, one of").add_mutually_exclusive_group(
        required=True
    )
    what.add_argument("--weights", type=Path, metavar="DIR", help="a pipeline: generate, score")
    what.add_argument(
        "--ablations", type=_named_folder, nargs="+", metavar="NAME=DIR",
        help="several pipelines, beside Table 3 (B1 to B5, CFLD)",
    )  # fmt: skip
    what.add_argument("--generated", type=Path, metavar="DIR", help="a folder of any images")
    against = parser.add_argument_group("against what")
    against.add_argument(
        "--shards", "--targets", dest="targets", required=True, metavar="SHARDS|DIR",
        help="photos and pairs; for --generated a folder of photos will do",
    )  # fmt: skip
    against.add_argument("--split", default="test", help="of shards (default: %(default)s)")
    against.add_argument("--pairs", type=Path, metavar="CSV", help="published list: from,to")
    against.add_argument(
        "--reference", metavar="SHARDS|DIR",
        help="photos FID compares with (default: --shards, if they have the split)",
    )  # fmt: skip
    against.add_argument(
        "--reference-split", default="train", metavar="SPLIT", help="(default: %(default)s)"
    )
    _add_generation(parser.add_argument_group("generation"))
    add_sampling_options(parser, seed_help="each pair's noise has its own from it")
    _add_files(parser.add_argument_group("files of --generated"))
    _add_scores(parser.add_argument_group("scores"))
    args = parser.parse_args(arguments)
    if args.sweep and not args.weights:
        parser.error("--sweep needs --weights")
    if args.scales and not args.sweep:
        parser.error("--scales needs --sweep guidance")
    if not args.generated and (args.pattern or args.resize or args.allow_missing):
        parser.error("--pattern, --resize and --allow-missing need --generated")
    names = [name for name, _ in args.ablations or ()]
    if len(set(names)) < len(names):
        parser.error(f"--ablations: {names} has a name twice")
    for name in ("generated", "metric_weights", "pairs"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            parser.error(f"--{name.replace('_', '-')}: {path} does not exist")
    return args


def _add_generation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sweep", choices=("guidance",), help="the rows of Table 5")
    group.add_argument(
        "--scales", type=_scale_pair, nargs="+", default=[], metavar="POSE,APPEARANCE",
        help="more rows of the sweep",
    )  # fmt: skip
    group.add_argument("--num-pairs", type=positive, metavar="N", help="only so many, for a trial")
    group.add_argument("--batch-size", type=positive, default=8, metavar="N")
    group.add_argument(
        "--workers", type=positive, metavar="N", help="processes (default: one for each GPU)"
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--pattern", help="how they are named, such as '{source}_to_{target}.png'")
    group.add_argument(
        "--panel", type=Panel.parse, default=Panel(), metavar="K/N", help="they are strips of N"
    )
    group.add_argument("--resize", action="store_true", help="accept other sizes than --size")
    group.add_argument(
        "--allow-missing", action="store_true", help="go on with images missing or left over"
    )


def _add_scores(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--size", type=positive, nargs=2, default=[256, 176], metavar=("HEIGHT", "WIDTH"),
        help="256 176 (default), 512 352 or 128 64",
    )  # fmt: skip
    group.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=METRICS, metavar="NAME",
        help=f"of {', '.join(METRICS)} (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--metric-weights", type=Path, metavar="DIR", help="folder of the networks' published files"
    )
    group.add_argument("--cache", type=Path, default=_cache_dir(), help="(default: %(default)s)")
    group.add_argument("--output", type=Path, required=True, metavar="DIR")


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cfld" / "fid"


def _named_folder(word: str) -> tuple[str, Path]:
    name, separator, folder = word.partition("=")
    if not separator or not folder or not re.fullmatch(r"\w[\w.+-]*", name):
        raise argparse.ArgumentTypeError(f"{word!r} is not NAME=DIR, such as B1=weights/b1")
    return name, Path(folder)


def _scale_pair(word: str) -> tuple[float, float]:
    try:
        pose, appearance = map(finite, word.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is not POSE,APPEARANCE, as 1.5,2") from error
    return pose, appearance


if __name__ == "__main__":
    sys.exit(main())
