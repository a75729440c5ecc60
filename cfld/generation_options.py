"""Command-line options that generating, editing, looking inside and scoring share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cfld.command import finite, positive, run_command, seed
from cfld.openpose import PoseNetworkError
from cfld.pipeline import CFLDPipeline
from cfld.pose_network import PoseEstimatorConfig
from cfld.sampling import Sampling
from cfld.saved_pipeline import DTYPES, WeightsError, load_pipeline
from cfld.user_inputs import InputError, LazyEstimator

POSE_HELP = """\
POSE is a photo, a skeleton drawn in OpenPose's colours, an OpenPose or COCO JSON, or a row
FILE.csv:NAME of published keypoints."""


def run_on_inputs(work: Callable[[], int]) -> int:
    """Do a command's work; photos, poses or weights that cannot be used are bad input."""
    return run_command(work, InputError, WeightsError, PoseNetworkError)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The folder of a pipeline."""
    parser.add_argument("--weights", required=True, metavar="DIR", help="folder of a pipeline")


def add_pose_options(parser: argparse.ArgumentParser) -> None:
    """How poses are found in photos and read from files, and how large the results are."""
    group = parser.add_argument_group("poses and sizes")
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
    group.add_argument(
        "--size",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the results (default: the photo's)",
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
        "--dtype", choices=("auto", *DTYPES), default="auto", help="auto: fp16 on a GPU, else fp32"
    )
    group.add_argument("--device", default="auto", metavar="NAME", help="such as cuda:1 or cpu")


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
