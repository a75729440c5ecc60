"""Command: the person of a photo in the pose of another photo, a keypoint file or a drawing."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from cfld.generation_jobs import (
    Inputs,
    Job,
    JobError,
    LazyEstimator,
    Sampling,
    generate_batch,
    read_inputs,
    read_table,
    run_jobs,
    write_failures,
)
from cfld.openpose import PoseNetworkError
from cfld.pipeline import CFLDPipeline, compatible_schedulers
from cfld.pose_network import PoseEstimatorConfig

logger = logging.getLogger("cfld.generate")  # run as a command, __name__ is another

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_EXAMPLE = """\
examples:
  python -m cfld.generate --weights weights --image a.jpg --pose b.jpg --output out.png
  python -m cfld.generate --weights weights --table jobs.csv

POSE is a photo, a skeleton drawn in OpenPose's colours, an OpenPose or COCO JSON, or a row
FILE.csv:NAME of published keypoints. The table has the columns image,pose,output; outputs that
exist are skipped, so that the same command goes on where it was stopped."""


class WeightsError(ValueError):
    """A folder that holds no pipeline of ours, or one that cannot be used as asked."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cfld").setLevel(logging.INFO)
    one = (options.image, options.pose, options.output)
    if bool(options.table) == any(one) or (any(one) and not all(one)):
        parser.error("give --image, --pose and --output, or --table")
    sampling = _read_sampling(options)
    estimator = LazyEstimator(
        PoseEstimatorConfig(network=options.pose_network, device=options.device)
        if options.pose_network
        else PoseEstimatorConfig(device=options.device)
    )
    try:
        if options.table:
            return _generate_table(Path(options.table), options, sampling, estimator)
        inputs = read_inputs(Job(*one), sampling, estimator)
        return _generate_one(inputs, options, sampling)
    except (JobError, WeightsError, PoseNetworkError) as error:
        logger.error("%s", error)
        return 2
    except (ValueError, NotImplementedError) as error:  # such as a scheduler that does not fit
        logger.error("stopped: %s", error)
        return 1
    except torch.OutOfMemoryError as error:
        logger.error("out of memory with --batch-size %d: %s", sampling.batch_size, error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; run the same command to go on")
        return 1


def load_pipeline(weights: str, *, device: str, dtype: str, scheduler: str | None) -> CFLDPipeline:
    """A pipeline from a folder, on its device, with the named scheduler.

    Raises:
        WeightsError: If the folder holds none, or device, dtype or scheduler cannot be had.
    """
    index = Path(weights) / "model_index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{weights}: no weights of this project (no readable model_index.json); give the "
            "folder that the training or cfld.import_official has written"
        ) from error
    if found != CFLDPipeline.__name__:
        raise WeightsError(f"{weights}: holds a {found}, not a {CFLDPipeline.__name__}")
    device = _read_device(device)
    if dtype == "auto":
        dtype = "fp16" if device.startswith("cuda") else "fp32"
    try:
        with warnings.catch_warnings():
            # Later versions of diffusers call it dtype.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = CFLDPipeline.from_pretrained(
                weights, torch_dtype=_DTYPES[dtype], use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(f"{weights}: cannot be loaded: {error}") from error
    if scheduler is not None:
        choices = compatible_schedulers(pipeline.scheduler)
        if scheduler not in choices:
            raise WeightsError(f"--scheduler {scheduler}: choose one of {', '.join(choices)}")
        pipeline.scheduler = choices[scheduler].from_config(pipeline.scheduler.config)
    return pipeline.to(device)


def _generate_one(inputs: Inputs, options: argparse.Namespace, sampling: Sampling) -> int:
    generate_batch(_load(options), [inputs], sampling)
    logger.info("%s is written", inputs.job.output)
    return 0


def _generate_table(
    table: Path, options: argparse.Namespace, sampling: Sampling, estimator: LazyEstimator
) -> int:
    jobs = read_table(table)
    pipeline = _load(options)
    pipeline.set_progress_bar_config(disable=True)
    failures = run_jobs(pipeline, jobs, sampling, estimator)
    failed = table.with_suffix(".failed.csv")
    failed.unlink(missing_ok=True)
    if not failures:
        return 0
    write_failures(failed, failures)
    logger.error("%d of %d rows failed; they are listed in %s", len(failures), len(jobs), failed)
    return 1


def _load(options: argparse.Namespace) -> CFLDPipeline:
    return load_pipeline(
        options.weights, device=options.device, dtype=options.dtype, scheduler=options.scheduler
    )


def _read_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"--device {device}: {error}") from error
    return device


def _read_sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(
        num_steps=options.steps,
        pose_scale=options.pose_scale,
        appearance_scale=options.appearance_scale,
        seed=options.seed,
        size=tuple(options.size) if options.size else None,
        pose_frame=tuple(options.pose_frame) if options.pose_frame else None,
        batch_size=options.batch_size,
    )


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cfld.generate",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", required=True, metavar="DIR", help="folder of a pipeline")
    one = parser.add_argument_group("one image")
    one.add_argument("--image", metavar="FILE", help="photo of the person")
    one.add_argument("--pose", metavar="POSE", help="photo, drawing or keypoints, see below")
    one.add_argument("--output", metavar="FILE", help="where the result goes (.png, .jpg)")
    many = parser.add_argument_group("many images")
    many.add_argument("--table", metavar="CSV", help="columns image,pose,output")
    many.add_argument("--batch-size", type=_positive, default=8, metavar="N")
    poses = parser.add_argument_group("poses")
    poses.add_argument(
        "--pose-network", metavar="FILE", help="OpenPose weights (.pth), a hub repository or ONNX"
    )
    poses.add_argument(
        "--pose-frame",
        type=_positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="what keypoints in files refer to (default: the photo)",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=_positive, default=50, metavar="N")
    sampling.add_argument("--pose-scale", type=float, default=2.0, metavar="W")
    sampling.add_argument("--appearance-scale", type=float, default=2.0, metavar="W")
    sampling.add_argument("--scheduler", metavar="NAME", help="such as ddim (default: as saved)")
    sampling.add_argument("--seed", type=int, default=0, help="row i of a table has seed + i")
    sampling.add_argument(
        "--size",
        type=_positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the results (default: the photo's)",
    )
    sampling.add_argument("--dtype", choices=("auto", *_DTYPES), default="auto")
    sampling.add_argument("--device", default="auto", metavar="NAME", help="such as cuda:1 or cpu")
    return parser


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
