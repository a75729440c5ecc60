"""Command: restyle part of a photo, mix two persons, walk through poses (CFLD Sec. 4.6)."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image

from cfld.body_regions import REGIONS, RegionError, draw_regions
from cfld.command import make_parser, not_negative, positive
from cfld.editing import (
    METHODS,
    Appearance,
    interpolate,
    latent_masks,
    poses_between,
    read_masks,
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
from cfld.picture_grid import join_strip
from cfld.pipeline import CFLDPipeline
from cfld.pipeline_inputs import FramedPose, Size, fit_frame
from cfld.sampling import Sampling
from cfld.user_inputs import (
    InputError,
    check_output,
    read_all_poses,
    read_fitted_pose,
    read_framed_pose,
    read_photo,
    save_image,
)

logger = logging.getLogger("cfld.edit")  # run as a command, __name__ is another

MIXABLE = ("prompt", "biases")

_ANIMATED = (".gif", ".webp")
_MAX_GREY = 0.1  # share of a mask's pixels that may be neither black nor white
_FRAMES_HELP = "a strip (.png, .jpg) or an animation (.gif, .webp)"
_EXAMPLES = {
    "transfer": """\
  python -m cfld.edit transfer --weights weights --image style.jpg --reference anna.jpg \\
      --region torso arms --output anna_restyled.png""",
    "interpolate": """\
  python -m cfld.edit interpolate --weights weights --image anna.jpg bea.jpg \\
      --pose pose.json --output from_anna_to_bea.png""",
    "walk": """\
  python -m cfld.edit walk --weights weights --image anna.jpg --poses walk/*.json \\
      --between 3 --output anna_walks.gif""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _make_parser().parse_args(arguments)
    return run_on_inputs(lambda: options.work(options))


def _transfer(options: argparse.Namespace) -> int:
    sampling = read_sampling(options)
    for output in (options.output, *filter(None, [options.save_mask])):
        check_output(output)
    style, reference = read_photo(options.image), read_photo(options.reference)
    size = reference.shape[:2]
    pose = read_framed_pose(
        options.pose or options.reference, sampling.pose_frame or size, make_estimator(options)
    )
    mask = _read_mask(options.mask, size) if options.mask else _draw_mask(pose, size, options)
    pipeline = load_chosen(options)
    if not latent_masks([mask], pipeline.conditioner.settings.latent_size).any():
        what = options.mask or f"--region {' '.join(options.region)}"
        raise InputError(
            f"{what}: too small a part of {options.reference} to edit; mark more of it"
        )
    if options.save_mask:
        save_image(Image.fromarray(mask), Path(options.save_mask))
    ((image,),) = pipeline(
        style,
        pose,
        reference_image=reference,
        mask_image=mask,
        **sampling.arguments,
        generator=sampling.generators([0]),
        return_dict=False,
    )
    save_image(image, Path(options.output))
    logger.info("%s is written", options.output)
    return 0


def _interpolate(options: argparse.Namespace) -> int:
    sampling = read_sampling(options)
    check_output(options.output)
    photos = [read_photo(image) for image in options.image]
    pose = read_fitted_pose(options.pose, photos[0], sampling, make_estimator(options))
    pipeline = load_chosen(options)
    pipeline.set_progress_bar_config(disable=True)
    first, second = (pipeline.encode_appearance(photo) for photo in photos)
    if not first.biases and "biases" in options.mix:
        raise InputError(f"{options.weights}: has no appearance biases to mix; use --mix prompt")
    weights = np.linspace(0, 1, options.frames).tolist()
    still = [0.0] * len(weights)
    frames: list[Image.Image] = []
    for batch in _batches(len(weights), sampling):
        mixture = interpolate(
            first,
            second,
            prompt_weights=(weights if "prompt" in options.mix else still)[batch],
            bias_weights=(weights if "biases" in options.mix else still)[batch],
            method=options.method,
        )
        frames += _draw(pipeline, sampling, mixture, pose)
        logger.info("%d of %d frames", len(frames), len(weights))
    return _write_frames(frames, options)


def _walk(options: argparse.Namespace) -> int:
    sampling = read_sampling(options)
    check_output(options.output)
    photo = read_photo(options.image)
    size, frame = sampling.size or photo.shape[:2], sampling.pose_frame or photo.shape[:2]
    estimator = make_estimator(options)
    stations = [
        fit_frame(pose, size)
        for spec in options.poses
        for pose in read_all_poses(spec, frame, estimator)
    ]
    poses = _fill_gaps(stations, options.between) if options.between else stations
    pipeline = load_chosen(options)
    pipeline.set_progress_bar_config(disable=True)
    appearance = pipeline.encode_appearance(photo)
    frames: list[Image.Image] = []
    for batch in _batches(len(poses), sampling):
        frames += _draw(pipeline, sampling, appearance, poses[batch])
        logger.info("%d of %d frames", len(frames), len(poses))
    return _write_frames(frames, options)


def _fill_gaps(stations: Sequence[FramedPose], num_between: int) -> list[FramedPose]:
    poses = list(stations[:1])
    try:
        for start, end in pairwise(stations):
            poses += [*poses_between(start, end, num_between), end]
    except ValueError as error:
        raise InputError(f"--between {num_between}: {error}; leave it out") from error
    return poses


def _draw(
    pipeline: CFLDPipeline,
    sampling: Sampling,
    appearance: Appearance,
    poses: FramedPose | list[FramedPose],
) -> list[Image.Image]:
    """Frames that all begin with the same noise, so that only the conditions change."""
    count = len(poses) if isinstance(poses, list) else len(appearance.sizes)
    (images,) = pipeline(
        appearance,
        poses,
        **sampling.arguments,
        generator=sampling.generators([0] * count),
        return_dict=False,
    )
    return images


def _batches(count: int, sampling: Sampling) -> Iterator[slice]:
    for start in range(0, count, sampling.batch_size):
        yield slice(start, start + sampling.batch_size)


def _read_mask(path: str, size: Size) -> Bool[np.ndarray, "{size[0]} {size[1]}"]:
    picture = read_photo(path)
    if picture.shape[:2] != size:
        raise InputError(
            f"{path}: the mask has {picture.shape[0]} x {picture.shape[1]} pixels (height x "
            f"width), the reference {size[0]} x {size[1]}; make them of one size"
        )
    is_grey = (np.abs(picture - 127.5) < 64).any(axis=2)
    if is_grey.mean() > _MAX_GREY:
        raise InputError(f"{path}: is no mask; it must be black, and white where to edit")
    (mask,) = read_masks(Image.fromarray(picture))
    if not mask.any():
        raise InputError(f"{path}: the mask is empty; make it white where to edit")
    if mask.all():
        logger.warning("%s: the mask is wholly white, so nothing of the reference stays", path)
    return mask


def _draw_mask(
    pose: FramedPose, size: Size, options: argparse.Namespace
) -> Bool[np.ndarray, "{size[0]} {size[1]}"]:
    try:
        return draw_regions(pose.keypoints, pose.frame, size, options.region)
    except RegionError as error:
        raise InputError(f"{options.pose or options.reference}: {error} with --mask") from error


def _write_frames(frames: Sequence[Image.Image], options: argparse.Namespace) -> int:
    path = Path(options.output)
    if path.suffix.lower() in _ANIMATED:
        save_image(
            frames[0],
            path,
            save_all=True,
            append_images=frames[1:],
            duration=options.frame_ms,
            loop=0,
            lossless=True,
        )
    else:
        save_image(join_strip(frames), path)
    logger.info("%s is written: %d frames", path, len(frames))
    return 0


def _make_parser() -> argparse.ArgumentParser:
    examples = "\n".join(("examples:", *_EXAMPLES.values()))
    parser = make_parser("cfld.edit", __doc__, examples)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    transfer, mix, walk = (
        commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n{_EXAMPLES[name]}\n\n{POSE_HELP}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, text in (
            ("transfer", "draw part of a photo anew, in the style of another"),
            ("interpolate", "from one person's look to another's"),
            ("walk", "one person in several poses"),
        )
    )
    add_weights(transfer)
    transfer.add_argument("--image", required=True, metavar="FILE", help="photo of the style")
    transfer.add_argument("--reference", required=True, metavar="FILE", help="photo to edit")
    transfer.add_argument("--output", required=True, metavar="FILE", help="such as out.png")
    transfer.add_argument(
        "--pose", metavar="POSE", help="of the reference (default: found in the photo)"
    )
    where = transfer.add_argument_group("where to edit")
    either = where.add_mutually_exclusive_group()
    either.add_argument("--mask", metavar="FILE", help="white there, of the reference's size")
    either.add_argument(
        "--region",
        nargs="+",
        choices=REGIONS,
        default=["torso"],
        metavar="PART",
        help=f"drawn around the pose: {', '.join(REGIONS)} (default: torso)",
    )
    where.add_argument("--save-mask", metavar="FILE", help="write the mask, to look at or retouch")
    transfer.set_defaults(work=_transfer, batch_size=1)

    add_weights(mix)
    mix.add_argument("--image", required=True, nargs=2, metavar="FILE", help="photos of the two")
    mix.add_argument("--pose", required=True, metavar="POSE")
    _add_frame_options(mix)
    how = mix.add_argument_group("what to mix")
    how.add_argument(
        "--mix",
        nargs="+",
        choices=MIXABLE,
        default=MIXABLE,
        metavar="PART",
        help="prompt, biases (both)",
    )
    how.add_argument("--method", choices=METHODS, default="linear")
    how.add_argument("--frames", type=positive, default=7, metavar="N", help="both ends included")
    mix.set_defaults(work=_interpolate)

    add_weights(walk)
    walk.add_argument("--image", required=True, metavar="FILE", help="photo of the person")
    walk.add_argument(
        "--poses",
        required=True,
        nargs="+",
        metavar="POSE",
        help="in their order; a keypoint file without :NAME gives all of its images",
    )
    walk.add_argument(
        "--between", type=not_negative, default=0, metavar="N", help="poses in between"
    )
    _add_frame_options(walk)
    walk.set_defaults(work=_walk)

    for command in (transfer, mix, walk):
        add_pose_options(command)
        add_sampling_options(command)
    return parser


def _add_frame_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FILE", help=_FRAMES_HELP)
    parser.add_argument("--frame-ms", type=positive, default=150, metavar="MS", help="each shows")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="frames at a time; with 1 they equal single pictures exactly",
    )


if __name__ == "__main__":
    sys.exit(main())
