"""Classifier-free guidance as a table of terms, evaluated in one batched call of the UNet."""

from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from cfld.conditioning import Conditioning, Kept, drop_conditions
from cfld.model import CFLD

Latents = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One prediction of the sum: which conditions it sees and its weight."""

    prompt: bool
    pose: bool
    appearance: bool
    weight: float


@dataclass(frozen=True, kw_only=True)
class GuidedConditioning:
    """The conditioning of all terms as one batch, and their weights."""

    conditioning: Conditioning
    weights: Float[Tensor, " terms"]


def cumulative_terms(pose_scale: float = 2.0, appearance_scale: float = 2.0) -> tuple[Term, ...]:
    """Cumulative guidance, first pose, then appearance (CFLD Eq. 7).

    The differences of Eq. 7 are sorted by prediction, and a prediction whose weight comes out as
    zero is left out: with equal scales two are enough, with both at 1 (no guidance) one.
    """
    terms = (
        Term(prompt=False, pose=False, appearance=False, weight=1 - pose_scale),
        Term(prompt=False, pose=True, appearance=False, weight=pose_scale - appearance_scale),
        Term(prompt=True, pose=True, appearance=True, weight=appearance_scale),
    )
    return tuple(term for term in terms if term.weight)


STRATEGIES: dict[str, tuple[Term, ...]] = {  # CFLD Table 5
    "none": cumulative_terms(1.0, 1.0),
    "appearance": cumulative_terms(1.0, 2.0),
    "pose": cumulative_terms(2.0, 1.0),
    "cumulative": cumulative_terms(2.0, 2.0),
}


def guide(model: CFLD, conditioning: Conditioning, terms: tuple[Term, ...]) -> GuidedConditioning:
    """Lay out the terms as one batch, with the keys and values of their prompts: once per image."""
    batch = len(conditioning.prompt)
    device = conditioning.prompt.device
    prompt, pose, appearance = (
        torch.tensor([getattr(term, name) for term in terms], device=device).repeat_interleave(
            batch
        )
        for name in ("prompt", "pose", "appearance")
    )
    tiled = drop_conditions(
        replace(conditioning, prompt_keys_values=()).tile(len(terms)),
        model.learnable_vector,
        Kept(prompt=prompt, pose=pose, appearance=appearance),
    )
    return GuidedConditioning(
        conditioning=model.precompute_keys_values(tiled),
        weights=torch.tensor([term.weight for term in terms], device=device),
    )


def guided_prediction(
    model: CFLD,
    noisy_latents: Latents,
    timestep: Int[Tensor, ""] | Float[Tensor, ""],
    guided: GuidedConditioning,
) -> Latents:
    """The weighted sum of the terms' predictions, in the type of the latents."""
    num_terms = len(guided.weights)
    inputs = repeat(noisy_latents, "b ... -> (terms b) ...", terms=num_terms)
    predictions = model.predict(inputs, timestep, guided.conditioning).to(torch.float32)
    predictions = rearrange(predictions, "(terms b) ... -> terms b ...", terms=num_terms)
    return torch.einsum("t,t...->...", guided.weights, predictions).to(noisy_latents.dtype)
