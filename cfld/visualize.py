"""Command: see where the queries look, what the biases hold, the pose map and the denoising."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from cfld.command import make_parser, positive
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
from cfld.images import resize_image
from cfld.picture_grid import Tile, draw_grid, in_rows
from cfld.pipeline import CFLDPipeline
from cfld.pipeline_inputs import FramedPose, Size, draw_poses, read_sources
from cfld.pose import JOINT_NAMES
from cfld.prompt_decoder import PromptDecoder
from cfld.sampling import Sampling
from cfld.user_inputs import InputError, read_fitted_pose, read_photo, save_image
from cfld.visualization import (
    bias_components,
    bias_sizes,
    bias_strength,
    overlay_heat,
    paint_heat,
    query_attention,
)

logger = logging.getLogger("cfld.visualize")  # run as a command, __name__ is another

_TILE_PX = 192
_EXAMPLE = f"""\
example:
  python -m cfld.visualize --weights weights --image anna.jpg --pose dancer.jpg --output look

writes look/attention.png, biases.png, pose.png and steps.png; without --pose the first two.

{POSE_HELP}"""


@dataclass(frozen=True)
class _Subject:
    """What is looked at."""

    pipeline: CFLDPipeline
    photo: UInt8[np.ndarray, "height width 3"]
    pose: FramedPose | None
    sampling: Sampling
    options: argparse.Namespace

    @property
    def tile_size(self) -> Size:
        """Height and width of a picture in a grid: the photo's shape."""
        height, width = self.photo.shape[:2]
        return _TILE_PX, max(1, round(width * _TILE_PX / height))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _make_parser().parse_args(arguments)
    return run_on_inputs(lambda: _visualize(options))


def _visualize(options: argparse.Namespace) -> int:
    sampling, photo, pose = read_sampling(options), read_photo(options.image), None
    if Path(options.output).is_file():
        raise InputError(f"--output {options.output}: is a file; name a folder")
    if options.pose:
        pose = read_fitted_pose(options.pose, photo, sampling, make_estimator(options))
    shown = options.show or [name for name in _VIEWS if pose or name not in _POSED]
    if pose is None and set(shown) & set(_POSED):
        raise InputError(f"--show {' '.join(shown)}: {' and '.join(_POSED)} need --pose")
    subject = _Subject(load_chosen(options), photo, pose, sampling, options)
    _check_model(subject, shown)
    for name in shown:
        path = Path(options.output) / f"{name}.png"
        save_image(draw_grid(_VIEWS[name](subject), subject.tile_size), path)
        logger.info("%s is written", path)
    return 0


def _check_model(subject: _Subject, shown: Sequence[str]) -> None:
    conditioner, options = subject.pipeline.conditioner, subject.options
    decoder = conditioner.prompt_decoder
    if "attention" in shown:
        if not isinstance(decoder, PromptDecoder):
            kind = conditioner.settings.prompt_decoder.kind
            raise InputError(f"{options.weights}: a prompt of kind {kind!r} has no queries to show")
        if options.block is not None and options.block > len(decoder.blocks):
            raise InputError(f"--block {options.block}: there are {len(decoder.blocks)} blocks")
    if "biases" in shown and conditioner.appearance is None:
        raise InputError(f"{options.weights}: there are no appearance biases to show")


def _attention(subject: _Subject) -> list[Sequence[Tile]]:
    """The queries' attention, averaged over heads (CFLD Fig. 7), beside the source."""
    pipeline = subject.pipeline
    model = pipeline.to_model()
    source = read_sources([subject.photo], model.config.source_encoder.image_size)
    maps = query_attention(model, source.to(pipeline.device))
    block = subject.options.block or len(maps)
    averaged = maps[block - 1][0].float().mean(dim=0).cpu().numpy()
    photo = resize_image(subject.photo, subject.tile_size)
    tiles = [Tile(photo, f"block {block} of {len(maps)}")]
    tiles += [
        Tile(overlay_heat(photo, each), f"query {number}, max {each.max():.0%}")
        for number, each in enumerate(averaged, 1)
    ]
    return in_rows(tiles, 6)


def _biases(subject: _Subject) -> list[Sequence[Tile]]:
    """Of each layer's bias the strength, and the colours of what varies in it; coarsest first."""
    biases = subject.pipeline.encode_appearance(subject.photo).biases
    sizes = bias_sizes(subject.pipeline.conditioner.settings)
    rows: dict[Size, list[Tile]] = {size: [] for size in sizes}
    for number, (bias, size) in enumerate(zip(biases, sizes, strict=True), 1):
        label = f"{number}: {size[0]} x {size[1]}"
        rows[size] += [
            Tile(paint_heat(bias_strength(bias[0], size)), f"{label}, strength"),
            Tile(bias_components(bias[0], size), f"{label}, content"),
        ]
    return list(rows.values())


def _pose(subject: _Subject) -> list[Sequence[Tile]]:
    """The skeleton, all heatmaps at once, and each heatmap."""
    assert subject.pose is not None
    size = subject.pipeline.conditioner.settings.pose_map_size
    pose_map = draw_poses([subject.pose], size)[0]
    skeleton = (pose_map[:3].permute(1, 2, 0) * 255).round().byte().numpy()
    heatmaps = pose_map[3:].numpy()
    tiles = [Tile(skeleton, "skeleton"), Tile(paint_heat(heatmaps.max(axis=0)), "all joints")]
    tiles += [
        Tile(paint_heat(heatmap), name if heatmap.any() else f"{name}: missing")
        for name, heatmap in zip(JOINT_NAMES, heatmaps, strict=True)
    ]
    return in_rows(tiles, 7)


def _steps(subject: _Subject) -> list[Sequence[Tile]]:
    """The latents after some of the steps, and the clean ones that they seem to come from."""
    pipeline, sampling = subject.pipeline, subject.sampling
    names = ("latents", "pred_original_sample")
    seen: list[tuple[str, dict[str, Tensor | None]]] = []

    def record(
        pipe: CFLDPipeline, step: int, timestep: Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        label = f"step {step + 1} of {len(pipe.scheduler.timesteps)}, t = {float(timestep):.0f}"
        seen.append((label, dict(tensors)))
        return tensors

    pipeline(
        subject.photo,
        subject.pose,
        **sampling.arguments,
        generator=sampling.generators([0]),
        output_type="latent",
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=names,
    )
    chosen = np.linspace(0, len(seen) - 1, subject.options.shown_steps).round().astype(int)
    rows = []
    for name, what in zip(names, ("", "clean: "), strict=True):
        tensors = [(seen[step][0], seen[step][1][name]) for step in dict.fromkeys(chosen.tolist())]
        rows.append(
            [
                Tile(_decoded(pipeline, latents, subject.tile_size), what + label)
                for label, latents in tensors
                if latents is not None
            ]
        )
    return [row for row in rows if row]


def _decoded(
    pipeline: CFLDPipeline, latents: Float[Tensor, "1 channels height width"], size: Size
) -> UInt8[np.ndarray, "{size[0]} {size[1]} 3"]:
    (picture,) = pipeline.decode_latents(latents, [size], "np")
    return np.rint(picture * 255).astype(np.uint8)


_VIEWS: dict[str, Callable[[_Subject], list[Sequence[Tile]]]] = {
    "attention": _attention,
    "biases": _biases,
    "pose": _pose,
    "steps": _steps,
}
_POSED = ("pose", "steps")


def _make_parser() -> argparse.ArgumentParser:
    parser = make_parser("cfld.visualize", __doc__, _EXAMPLE)
    add_weights(parser)
    parser.add_argument("--image", required=True, metavar="FILE", help="photo of the person")
    parser.add_argument("--pose", metavar="POSE", help="photo, drawing or keypoints, see below")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the pictures go")
    what = parser.add_argument_group("what is shown")
    what.add_argument(
        "--show", nargs="+", choices=_VIEWS, metavar="VIEW", help=f"of {', '.join(_VIEWS)}"
    )
    what.add_argument("--block", type=positive, metavar="N", help="of the decoder (default: last)")
    what.add_argument("--shown-steps", type=positive, default=8, metavar="N", help="evenly spread")
    add_pose_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(batch_size=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
