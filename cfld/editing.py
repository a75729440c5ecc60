"""Editing without training (CFLD Sec. 4.6): mixed appearances, a region redrawn, poses between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from cfld.pipeline_inputs import FramedPose, Size, read_pictures

Latents = Float[Tensor, "batch channels height width"]
Tokens = Float[Tensor, "batch tokens dim"]
Mask = Bool[np.ndarray, "height width"]


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """What the model has seen of source photos, one row for each, and (height, width) of each."""

    prompt: Float[Tensor, "batch _tokens _dim"]
    """Coarse."""
    biases: tuple[Float[Tensor, "batch _tokens _dim"], ...]
    """Fine, one per up-sampling cross-attention in the UNet's order."""
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Reference:
    """An image, and where it is to be drawn anew."""

    image: UInt8[np.ndarray, "height width 3"]
    mask: Mask


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where reference images are redrawn, and what they are elsewhere; a row for each result."""

    reference: Latents
    is_edited: Bool[Tensor, "batch 1 height width"]

    def restore(
        self,
        latents: Latents,
        noise: Latents,
        scheduler: SchedulerMixin,
        timestep: Float[Tensor, " timesteps"] | Int[Tensor, " timesteps"],
    ) -> Latents:
        """Set the latents outside of the region to the reference, noised to `timestep` (Eq. 1).

        After the last step there is no timestep, and the reference comes without noise. The paper
        writes this composition for the noise prediction; what it composes are latents.
        """
        known = self.reference
        if len(timestep):
            known = scheduler.add_noise(known, noise, timestep.expand(len(known)))
        return torch.where(self.is_edited, latents, known)


def lerp(first: Tokens, second: Tokens, weights: Float[Tensor, "batch 1 1"]) -> Tokens:
    """On the straight line from `first` (weight 0) to `second` (1), both of which it meets."""
    return torch.lerp(first, second, weights)


def slerp(first: Tokens, second: Tokens, weights: Float[Tensor, "batch 1 1"]) -> Tokens:
    """Along the arc between each pair of tokens, on a line where they are all but parallel.

    Source: Shoemake, Animating Rotation with Quaternion Curves (1985).
    """
    cosine = F.cosine_similarity(first, second, dim=-1)[..., None].clamp(-1, 1)
    angle = cosine.arccos()
    sine = angle.sin()
    arc = first * (((1 - weights) * angle).sin() / sine) + second * ((weights * angle).sin() / sine)
    return torch.where(sine < 1e-3, lerp(first, second, weights), arc)


METHODS = {"linear": lerp, "spherical": slerp}


def interpolate(
    first: Appearance,
    second: Appearance,
    *,
    prompt_weights: Sequence[float],
    bias_weights: Sequence[float],
    method: str = "linear",
) -> Appearance:
    """Mix two appearances, one row for each weight: 0 is the first, 1 the second, exactly.

    The coarse prompt and the fine biases have their own weights. The rows' size is the first's.

    Raises:
        ValueError: If the weights differ in number or leave [0, 1], the method is unknown, or an
            appearance is of several photos.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {list(METHODS)}")
    if len(prompt_weights) != len(bias_weights):
        raise ValueError(
            f"{len(prompt_weights)} prompt_weights and {len(bias_weights)} bias_weights: give one "
            "of each for each result"
        )
    if not all(0 <= weight <= 1 for weight in (*prompt_weights, *bias_weights)):
        raise ValueError(f"weights {prompt_weights} and {bias_weights} must lie in [0, 1]")
    for appearance in (first, second):
        if len(appearance.sizes) != 1:
            raise ValueError(
                f"an appearance of {len(appearance.sizes)} photos is given; encode each alone"
            )

    def mix(ours: Tensor, theirs: Tensor, weights: Sequence[float]) -> Tensor:
        rows = torch.tensor(weights, device=ours.device, dtype=torch.float32).view(-1, 1, 1)
        start, end = (tokens.float().expand(len(rows), -1, -1) for tokens in (ours, theirs))
        return METHODS[method](start, end, rows).to(ours.dtype)

    return Appearance(
        prompt=mix(first.prompt, second.prompt, prompt_weights),
        biases=tuple(
            mix(ours, theirs, bias_weights)
            for ours, theirs in zip(first.biases, second.biases, strict=True)
        ),
        sizes=first.sizes * len(prompt_weights),
    )


def read_references(images: object, masks: object) -> list[Reference]:
    """References and their masks in the forms of `read_pictures` and `read_masks`.

    Raises:
        ValueError: If there are masks without images or images without masks, or their numbers
            or sizes differ.
    """
    if images is None and masks is None:
        return []
    if images is None or masks is None:
        raise ValueError("give reference_image and mask_image together, or neither")
    pictures, areas = read_pictures(images), read_masks(masks)
    if len(areas) not in (1, len(pictures)):
        raise ValueError(f"{len(areas)} masks for {len(pictures)} references: give one or as many")
    areas = areas * (len(pictures) // len(areas))
    for picture, area in zip(pictures, areas, strict=True):
        if picture.shape[:2] != area.shape:
            raise ValueError(
                f"a mask of {area.shape} (height, width) does not fit its reference of "
                f"{picture.shape[:2]}; make them of the same size"
            )
    return [Reference(*each) for each in zip(pictures, areas, strict=True)]


def read_masks(mask: object) -> list[Mask]:
    """Masks that are true where an image is to be redrawn.

    Accepted are PIL images, arrays and tensors `[h, w]` or `[n, h, w]`, of truth values, uint8 or
    floats in [0, 1] (white is true, from the middle on), and lists of them.

    Raises:
        ValueError: If a mask has another layout or range.
    """
    if isinstance(mask, (list, tuple)):
        return [each for entry in mask for each in read_masks(entry)]
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu().numpy()
    if not isinstance(mask, np.ndarray) or mask.ndim not in (2, 3):
        shape = getattr(mask, "shape", type(mask).__name__)
        raise ValueError(f"a mask is an image or has the shape [h, w] or [n, h, w], not {shape}")
    if mask.dtype == np.uint8:
        mask = mask >= 128
    elif np.issubdtype(mask.dtype, np.floating):
        if not (mask.min() >= 0 and mask.max() <= 1):  # also false for NaN
            raise ValueError(f"a mask has values from {mask.min()} to {mask.max()}, not in [0, 1]")
        mask = mask >= 0.5
    if mask.dtype != np.bool_:
        raise ValueError(f"a mask of {mask.dtype} is given; use truth values, uint8 or floats")
    return [mask] if mask.ndim == 2 else list(mask)


def latent_masks(
    masks: Sequence[Bool[np.ndarray, "_ _"]], size: Size
) -> Bool[Tensor, "batch 1 {size[0]} {size[1]}"]:
    """Which latents are redrawn: those of which the mask covers at least half."""
    shares = [
        F.interpolate(torch.from_numpy(mask)[None, None].float(), size, mode="area")
        for mask in masks
    ]
    return torch.cat(shares) >= 0.5


def poses_between(first: FramedPose, second: FramedPose, num_poses: int) -> list[FramedPose]:
    """Poses at equal distances on the way from one to the other, both left out.

    Joints move in straight lines; one that is not in both poses is missing on the way.

    Raises:
        ValueError: If the poses have no joint in common.
    """
    scale = np.array([*np.divide(first.frame, second.frame)[::-1], 1], dtype=np.float32)
    start, end = first.keypoints, second.keypoints * scale
    missing = np.isnan(start + end).any(axis=1, keepdims=True)
    if missing.all():
        raise ValueError("two poses have no joint in common, so that there is nothing in between")
    weights = np.linspace(0, 1, num_poses + 2, dtype=np.float32)[1:-1]
    gone = np.array([np.nan, np.nan, 0], np.float32)
    return [
        replace(first, keypoints=np.where(missing, gone, (1 - weight) * start + weight * end))
        for weight in weights
    ]
