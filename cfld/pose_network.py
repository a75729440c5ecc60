"""Pose estimator: photos in batches to 18 keypoints, by an OpenPose network and the decoder."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, UInt8

from cfld.images import resize_image
from cfld.keypoints import main_person
from cfld.openpose import OnnxInput, OnnxNetwork, OpenPoseNetwork, PoseNetworkError
from cfld.pose import MISSING_JOINT, is_found
from cfld.pose_decoder import DecoderConfig, decode_people

logger = logging.getLogger(__name__)

_GREY = 128
_SIZE_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class PoseEstimatorConfig:
    """Which network runs where, and what it is shown."""

    network: str = "lllyasviel/Annotators"
    """OpenPose's body weights (a `.pth` file, or a hub repository with `body_pose_model.pth`; for
    non-commercial use only), or an `.onnx` file with OpenPose's outputs."""
    device: str = "auto"
    """`auto` is the GPU, in fp16, when there is one. An ONNX network runs on the CPU."""
    batch_size: int = 16
    image_height_px: int = 368
    """Height to which a photo is scaled; OpenPose's own."""
    max_image_width_px: int = 656
    """A wider photo is scaled to this width."""
    border: float = 0.1
    """Grey border around the photo as a share of its height: a person that fills the frame is
    outside what these networks were trained on."""
    onnx_input: OnnxInput = field(default_factory=OnnxInput)
    num_threads: int = 0
    """Of an ONNX network; 0 lets onnxruntime choose. PyTorch goes by OMP_NUM_THREADS."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        for name in ("batch_size", "image_height_px", "max_image_width_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.border < 0:
            raise ValueError(f"border is {self.border}, must not be negative")


@dataclass(frozen=True)
class PersonPose:
    """The main person of a photo, in the photo's pixels; all joints missing if nobody was found."""

    keypoints: Float32[np.ndarray, "18 3"]
    num_people: int


class PoseEstimator:
    """Finds the main person of photos; see `cfld.keypoints.main_person` for which one that is.

    Each photo is scaled and surrounded by grey; photos of one resulting size share batches. Made
    from its configuration alone, also when unpickled in another process.
    """

    def __init__(self, config: PoseEstimatorConfig) -> None:
        """Load the network.

        Raises:
            PoseNetworkError: If it cannot be had, or does not have OpenPose's outputs.
        """
        self.config = config
        self._network = _load_network(config)
        logger.info("pose network %s on %s", config.network, self._network.place)

    def __reduce__(self) -> tuple[type[PoseEstimator], tuple[PoseEstimatorConfig]]:
        return type(self), (self.config,)

    def estimate(self, images: Sequence[np.ndarray]) -> list[PersonPose]:
        """Find the main person of each photo (HWC uint8 RGB); sizes may differ.

        Joints outside of the photo by more than a cell of the heatmaps are missing, those closer
        are moved to its edge.

        Raises:
            ValueError: If an image is not HWC uint8 RGB.
        """
        poses: dict[int, PersonPose] = {}
        by_canvas = defaultdict[tuple[int, int], list[int]](list)
        frames = [_frame(image, self.config) for image in images]
        for index, frame in enumerate(frames):
            by_canvas[frame.canvas].append(index)
        for indices in by_canvas.values():
            for start in range(0, len(indices), self.config.batch_size):
                batch = indices[start : start + self.config.batch_size]
                canvases = np.stack([frames[index].draw(images[index]) for index in batch])
                people = decode_people(*self._network(canvases), self.config.decoder)
                for index, found in zip(batch, people, strict=True):
                    poses[index] = _pose_of(found, frames[index], self.config.decoder.stride)
        return [poses[index] for index in range(len(images))]


def _load_network(config: PoseEstimatorConfig) -> OpenPoseNetwork | OnnxNetwork:
    if not config.network.lower().endswith(".onnx"):
        return OpenPoseNetwork(config.network, config.device)
    network = OnnxNetwork(config.network, config.onnx_input, config.num_threads)
    if network.stride != config.decoder.stride:
        raise PoseNetworkError(
            f"{config.network}: has one cell per {network.stride} pixels, the decoder expects "
            f"{config.decoder.stride}; set PoseEstimatorConfig(decoder=DecoderConfig(stride=...))"
        )
    return network


@dataclass(frozen=True)
class _Frame:
    """Where a photo of `image` size lies, scaled to `scaled`, in the network's input `canvas`."""

    image: tuple[int, int]
    scaled: tuple[int, int]
    canvas: tuple[int, int]

    @property
    def corner(self) -> tuple[int, int]:
        return (
            (self.canvas[0] - self.scaled[0]) // 2,
            (self.canvas[1] - self.scaled[1]) // 2,
        )

    def draw(self, image: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "height width 3"]:
        canvas = np.full((*self.canvas, 3), _GREY, dtype=np.uint8)
        (top, left), (height, width) = self.corner, self.scaled
        canvas[top : top + height, left : left + width] = resize_image(image, self.scaled)
        return canvas

    def to_image(
        self, people: Float32[np.ndarray, "people 18 3"]
    ) -> Float32[np.ndarray, "people 18 3"]:
        """Map from the canvas to the photo; whole coordinates are centres of pixels in both."""
        scale = np.array(self.image) / self.scaled
        points = (people[..., 1::-1] - self.corner + 0.5) * scale - 0.5  # people, joints, (y, x)
        return np.concatenate((points[..., ::-1], people[..., 2:]), axis=-1).astype(np.float32)


def _frame(image: np.ndarray, config: PoseEstimatorConfig) -> _Frame:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            f"an image is {image.dtype} {image.shape}, must be uint8 (height, width, 3)"
        )
    height, width = image.shape[:2]
    scale = min(config.image_height_px / height, config.max_image_width_px / width)
    scaled = max(1, round(height * scale)), max(1, round(width * scale))
    border = round(config.border * scaled[0])
    canvas = [_SIZE_MULTIPLE * math.ceil((side + 2 * border) / _SIZE_MULTIPLE) for side in scaled]
    return _Frame((height, width), scaled, (canvas[0], canvas[1]))


def _pose_of(people: Float32[np.ndarray, "people 18 3"], frame: _Frame, stride: int) -> PersonPose:
    people = frame.to_image(people)
    last = np.array(frame.image[::-1], dtype=np.float32) - 1
    margin = stride * (last + 1) / frame.scaled[::-1]
    is_outside = ((people[..., :2] < -margin) | (people[..., :2] > last + margin)).any(axis=-1)
    people[..., :2] = people[..., :2].clip(0, last)
    people[is_outside] = MISSING_JOINT
    people = people[is_found(people).any(axis=1)]
    main = main_person(people, frame.image)
    if main is None:
        return PersonPose(np.full((18, 3), MISSING_JOINT, dtype=np.float32), 0)
    return PersonPose(people[main], len(people))
