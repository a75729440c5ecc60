"""What the UNet is conditioned on, computed once per image, and how parts of it are dropped."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from cfld.attention import LayersKeysValues


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One row per noisy latent, in the same order in every field."""

    prompt: Float[Tensor, "batch tokens dim"]
    """Coarse appearance."""
    appearance_biases: tuple[Float[Tensor, "batch _tokens _dim"], ...]
    """Fine appearance, one per up-sampling cross-attention in the UNet's order."""
    pose_residuals: tuple[Float[Tensor, "batch _c _h _w"], ...]
    """One per down-sampling block with attention, finest first."""
    prompt_keys_values: LayersKeysValues = ()
    """Of every cross-attention, once they are computed ahead of the sampling steps."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """The same conditioning with `change` applied to each tensor."""
        return Conditioning(
            prompt=change(self.prompt),
            appearance_biases=tuple(change(bias) for bias in self.appearance_biases),
            pose_residuals=tuple(change(residual) for residual in self.pose_residuals),
            prompt_keys_values=tuple(
                (change(key), change(value)) for key, value in self.prompt_keys_values
            ),
        )

    def tile(self, times: int) -> "Conditioning":
        """All rows, then all rows again, `times` times in all."""
        return self.map(lambda tensor: repeat(tensor, "b ... -> (times b) ...", times=times))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which rows keep which part of their conditioning."""

    prompt: Bool[Tensor, " batch"]
    pose: Bool[Tensor, " batch"]
    appearance: Bool[Tensor, " batch"]


def drop_conditions(
    conditioning: Conditioning, learnable_vector: Float[Tensor, "1 tokens dim"], kept: Kept
) -> Conditioning:
    """Replace what is not kept: the prompt by the learnable vector, the rest by zeros (CFLD 3.3).

    The result has no keys and values: those of the other prompt no longer fit.
    """
    return Conditioning(
        prompt=_select(kept.prompt, conditioning.prompt, learnable_vector),
        appearance_biases=tuple(
            _select(kept.appearance, bias) for bias in conditioning.appearance_biases
        ),
        pose_residuals=tuple(
            _select(kept.pose, residual) for residual in conditioning.pose_residuals
        ),
    )


def _select(kept: Tensor, tensor: Tensor, otherwise: Tensor | None = None) -> Tensor:
    kept = kept.view(-1, *[1] * (tensor.ndim - 1))
    return torch.where(
        kept, tensor, torch.zeros_like(tensor) if otherwise is None else otherwise.to(tensor)
    )
