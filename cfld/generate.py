"""Command: the person of a photo in the pose of another photo, a keypoint file or a drawing."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cfld.command import make_parser, positive
from cfld.generation_jobs import (
    FailureTable,
    Job,
    generate_batch,
    read_inputs,
    read_table,
    run_jobs,
)
from cfld.generation_options import (
    POSE_HELP,
    add_pose_options,
    add_sampling_options,
    add_weights,
    load_chosen,
    make_estimator,
    read_sampling,
    run_on_inputs,
)
from cfld.user_inputs import LazyEstimator, save_image

logger = logging.getLogger("cfld.generate")  # run as a command, __name__ is another

_EXAMPLE = f"""\
examples:
  python -m cfld.generate --weights weights --image a.jpg --pose b.jpg --output out.png
  python -m cfld.generate --weights weights --table jobs.csv

{POSE_HELP} The table has the columns image,pose,output; outputs that
exist are skipped, so that the same command goes on where it was stopped."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    one = (options.image, options.pose, options.output)
    if bool(options.table) == any(one) or (any(one) and not all(one)):
        parser.error("give --image, --pose and --output, or --table")
    work = _generate_table if options.table else _generate_one
    return run_on_inputs(lambda: work(options, make_estimator(options)))


def _generate_one(options: argparse.Namespace, estimator: LazyEstimator) -> int:
    sampling = read_sampling(options)
    inputs = read_inputs(Job(options.image, options.pose, options.output), sampling, estimator)
    (image,) = generate_batch(load_chosen(options), [inputs], sampling)
    save_image(image, Path(options.output))
    logger.info("%s is written", options.output)
    return 0


def _generate_table(options: argparse.Namespace, estimator: LazyEstimator) -> int:
    table = Path(options.table)
    jobs = read_table(table)
    failures = FailureTable(table.with_suffix(".failed.csv"))
    pipeline = load_chosen(options)
    pipeline.set_progress_bar_config(disable=True)
    run_jobs(pipeline, jobs, read_sampling(options), estimator, failures)
    if failures.count:
        found = (failures.count, len(jobs), failures.path)
        logger.error("%d of %d rows failed; they are listed in %s", *found)
    return 1 if failures.count else 0


def _make_parser() -> argparse.ArgumentParser:
    parser = make_parser("cfld.generate", __doc__, _EXAMPLE)
    add_weights(parser)
    one = parser.add_argument_group("one image")
    one.add_argument("--image", metavar="FILE", help="photo of the person")
    one.add_argument("--pose", metavar="POSE", help="photo, drawing or keypoints, see below")
    one.add_argument("--output", metavar="FILE", help="where the result goes (.png, .jpg)")
    many = parser.add_argument_group("many images")
    many.add_argument("--table", metavar="CSV", help="columns image,pose,output")
    many.add_argument("--batch-size", type=positive, default=8, metavar="N")
    add_pose_options(parser)
    add_sampling_options(parser, seed_help="row i of a table has seed + i")
    return parser


if __name__ == "__main__":
    sys.exit(main())
