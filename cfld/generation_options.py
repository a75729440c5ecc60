"""Command-line options that generating, editing and looking inside share, and what they select."""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin

from cfld.generation_jobs import JobError, LazyEstimator, Sampling
from cfld.openpose import PoseNetworkError
from cfld.pipeline import CFLDPipeline, compatible_schedulers
from cfld.pose_network import PoseEstimatorConfig

logger = logging.getLogger(__name__)

POSE_HELP = """\
POSE is a photo, a skeleton drawn in OpenPose's colours, an OpenPose or COCO JSON, or a row
FILE.csv:NAME of published keypoints."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class WeightsError(ValueError):
    """A folder that holds no pipeline of ours, or one that cannot be used as asked."""


def run_command(work: Callable[[], int]) -> int:
    """Do a command's work and turn what may go wrong into a message and an exit code.

    2 is bad input, found before anything is generated; 1 is what failed later.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cfld").setLevel(logging.INFO)
    try:
        return work()
    except (JobError, WeightsError, PoseNetworkError) as error:
        logger.error("%s", error)
        return 2
    except (ValueError, NotImplementedError, OSError) as error:  # such as an unfit scheduler
        logger.error("stopped: %s", error)
        return 1
    except torch.OutOfMemoryError as error:
        logger.error("out of memory; a smaller --batch-size or --dtype fp16 needs less: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; run the same command again")
        return 1


def load_pipeline(
    weights: str, *, device: str, dtype: str, scheduler: str | None, num_steps: int
) -> CFLDPipeline:
    """A pipeline from a folder, on its device, with the named scheduler.

    Raises:
        WeightsError: If the folder holds none, or device, dtype or scheduler cannot be had, or the
            scheduler cannot take so many steps.
    """
    read_index(weights)
    device = read_device(device)
    if dtype == "auto":
        dtype = "fp16" if device.startswith("cuda") else "fp32"
    try:
        with warnings.catch_warnings():
            # Later versions of diffusers call it dtype.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = CFLDPipeline.from_pretrained(
                weights, torch_dtype=_DTYPES[dtype], use_safetensors=True, local_files_only=True
            ).to(device)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(f"{weights}: cannot be loaded: {error}") from error
    if scheduler is not None:
        choices = compatible_schedulers(pipeline.scheduler)
        if scheduler not in choices:
            raise WeightsError(f"--scheduler {scheduler}: choose one of {', '.join(choices)}")
        pipeline.scheduler = choices[scheduler].from_config(pipeline.scheduler.config)
    _check_steps(pipeline.scheduler, num_steps)
    return pipeline


def _check_steps(scheduler: SchedulerMixin, num_steps: int) -> None:
    """Take so many steps with a latent of one pixel, before a model takes them for hours."""
    trial = type(scheduler).from_config(scheduler.config)
    latent = torch.zeros(1, 1, 1, 1)
    try:
        trial.set_timesteps(num_steps)
        with torch.random.fork_rng(devices=[]):
            for timestep in trial.timesteps:
                predicted = trial.scale_model_input(latent, timestep)
                latent = trial.step(predicted, timestep, latent).prev_sample
    except (ValueError, IndexError, NotImplementedError) as error:
        name = type(scheduler).__name__.removesuffix("Scheduler").lower()
        raise WeightsError(
            f"--steps {num_steps}: the scheduler {name} cannot take them with these weights: "
            f"{error}"
        ) from error


def read_index(weights: str | Path) -> dict[str, Any]:
    """What `model_index.json` says of a pipeline's components.

    Raises:
        WeightsError: If the folder holds none, or another pipeline.
    """
    try:
        index: dict[str, Any] = json.loads(
            (Path(weights) / "model_index.json").read_text(encoding="utf-8")
        )
        found = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{weights}: no weights of this project (no readable model_index.json); give the "
            "folder that the training or cfld.import_official has written"
        ) from error
    if found != CFLDPipeline.__name__:
        raise WeightsError(f"{weights}: holds a {found}, not a {CFLDPipeline.__name__}")
    return index


def read_device(device: str) -> str:
    """The name of a device; `auto` is the GPU if there is one.

    Raises:
        WeightsError: If there is no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"--device {device}: {error}") from error
    return device


def make_parser(name: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """A parser for `python -m NAME` whose texts keep their lines."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The folder of a pipeline."""
    parser.add_argument("--weights", required=True, metavar="DIR", help="folder of a pipeline")


def add_pose_options(parser: argparse.ArgumentParser) -> None:
    """How poses are found in photos and read from files."""
    group = parser.add_argument_group("poses")
    group.add_argument(
        "--pose-network", metavar="FILE", help="OpenPose weights (.pth), a hub repository or ONNX"
    )
    group.add_argument(
        "--pose-frame",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="what keypoints in files refer to (default: the photo)",
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, seed_help: str | None = None) -> None:
    """How images are sampled."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=positive, default=50, metavar="N")
    group.add_argument("--pose-scale", type=finite, default=2.0, metavar="W")
    group.add_argument("--appearance-scale", type=finite, default=2.0, metavar="W")
    group.add_argument("--scheduler", metavar="NAME", help="such as ddim (default: as saved)")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help=seed_help)
    group.add_argument(
        "--size",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the results (default: the photo's)",
    )
    group.add_argument("--dtype", choices=("auto", *_DTYPES), default="auto")
    group.add_argument("--device", default="auto", metavar="NAME", help="such as cuda:1 or cpu")


def positive(word: str) -> int:
    """A whole number of at least 1."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not at least 1")
    return number


def finite(word: str) -> float:
    """A number that is neither infinite nor NaN."""
    number = float(word)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{word} is not finite")
    return number


def seed(word: str) -> int:
    """A whole number that seeds torch's generators, also with a table's rows added."""
    number = int(word)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{word} is not between 0 and 2^63 - 1")
    return number


def read_sampling(options: argparse.Namespace) -> Sampling:
    """The options of `add_sampling_options` and `add_pose_options`."""
    return Sampling(
        num_steps=options.steps,
        pose_scale=options.pose_scale,
        appearance_scale=options.appearance_scale,
        seed=options.seed,
        size=tuple(options.size) if options.size else None,
        pose_frame=tuple(options.pose_frame) if options.pose_frame else None,
        batch_size=options.batch_size,
    )


def make_estimator(options: argparse.Namespace) -> LazyEstimator:
    """The pose estimator that the options ask for, not loaded yet."""
    if options.pose_network:
        config = PoseEstimatorConfig(network=options.pose_network, device=options.device)
    else:
        config = PoseEstimatorConfig(device=options.device)
    return LazyEstimator(config)


def load_chosen(options: argparse.Namespace) -> CFLDPipeline:
    """The pipeline that the options ask for."""
    return load_pipeline(
        options.weights,
        device=options.device,
        dtype=options.dtype,
        scheduler=options.scheduler,
        num_steps=options.steps,
    )
