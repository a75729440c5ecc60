"""How large a configuration is, and what memory and operations its training and use take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cfld.codec import build_codec
from cfld.config import PARTS, CFLDConfig
from cfld.guidance import cumulative_terms, guide, guided_prediction
from cfld.measure import Cost, measure
from cfld.model import CFLD
from cfld.objective import Draws, TrainingBatch

# CFLD Table 1: millions of trainable parameters.
PAPER_MILLIONS = {
    "source_encoder": 87.0,
    "prompt_decoder": 97.7,
    "appearance": 22.5,
    "pose_adapter": 30.6,
    "unet": 10.3,
    "together": 248.2,
}
PAPER_PAIRS = 101_966  # DeepFashion, CFLD Sec. 4.1
PAPER_EPOCHS = 100
BYTES_PER_WEIGHT = 2
BYTES_OF_ADAM = 12
"""Of each trained weight in float32: itself and two moments."""

_DTYPE = torch.float16


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """Parameters of one part."""

    name: str
    total: int
    trainable: int
    paper_millions: float | None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU while training in half precision with Adam under ZeRO."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    """For each pair of the micro-batch, measured."""

    def total_bytes(self, micro_batch: int) -> int:
        """For a micro-batch of so many pairs, without what CUDA and the allocator add."""
        fixed = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return fixed + micro_batch * self.activations_bytes


@dataclass(frozen=True, kw_only=True)
class Description:
    """Sizes and costs of a configuration."""

    parts: tuple[PartSize, ...]
    memory: Memory
    memory_with_checkpointing: Memory
    flops_per_pair: int
    """Forward and backward of the objective on latents, without checkpointing."""
    flops_to_encode_pair: int
    """The VAE on both images, where latents are not stored."""
    flops_to_condition: int
    """Once per generated image."""
    flops_per_step: int
    """One step of guided sampling."""
    flops_to_decode: int
    num_terms: int
    """Predictions at each step: CFLD Eq. 7 with equal scales has two."""
    num_inference_steps: int

    @property
    def flops_per_image(self) -> int:
        """All of a generated image."""
        steps = self.num_inference_steps * self.flops_per_step
        return self.flops_to_condition + steps + self.flops_to_decode


def describe(
    config: CFLDConfig, *, zero_stage: int = 2, num_gpus: int = 1, num_inference_steps: int = 50
) -> Description:
    """Measure a configuration on the meta device: half precision, fused attention on a GPU.

    Activations are the growth of the peak from a micro-batch of one pair to one of two.
    """
    with torch.device("meta"):
        model = CFLD(replace(config, gradient_checkpointing=()), pretrained=False).to(_DTYPE)
        codec = build_codec(config.codec, pretrained=False).to(_DTYPE)
        parts = _part_sizes(model, codec)
        one, two = (_training_cost(model, pairs) for pairs in (1, 2))
        model.set_gradient_checkpointing(PARTS)
        few, more = (_training_cost(model, pairs) for pairs in (1, 2))
        model.set_gradient_checkpointing(())
        image = torch.empty(1, 3, *config.image_size, dtype=_DTYPE)
        latents = _latents(config, 1, _DTYPE)
        encoding = measure(lambda: codec.encode(image), codec, backward=False)
        decoding = measure(lambda: codec.decode(latents), codec, backward=False)
        conditioning, step, num_terms = _sampling_costs(model.eval().requires_grad_(False), latents)
    fixed = _fixed_memory(parts, zero_stage, num_gpus)
    return Description(
        parts=parts,
        memory=replace(fixed, activations_bytes=two.peak_bytes - one.peak_bytes),
        memory_with_checkpointing=replace(
            fixed, activations_bytes=more.peak_bytes - few.peak_bytes
        ),
        flops_per_pair=one.flops,
        flops_to_encode_pair=2 * encoding.flops,
        flops_to_condition=conditioning.flops,
        flops_per_step=step.flops,
        flops_to_decode=decoding.flops,
        num_terms=num_terms,
        num_inference_steps=num_inference_steps,
    )


def training_hours(pairs_per_second: float) -> float:
    """Hours of the paper's schedule, 100 epochs of DeepFashion's 101,966 pairs."""
    return PAPER_EPOCHS * PAPER_PAIRS / pairs_per_second / 3600


def _part_sizes(model: CFLD, codec: nn.Module) -> tuple[PartSize, ...]:
    modules = {name: getattr(model, name) for name in PARTS}
    parts = [
        PartSize(
            name=name,
            total=_count(module),
            trainable=_count(module, only_trainable=True),
            paper_millions=PAPER_MILLIONS[name],
        )
        for name, module in modules.items()
    ]
    vector = model.learnable_vector.numel()
    others = {"learnable_vector": (vector, vector), "codec": (_count(codec), 0)}
    parts += [
        PartSize(name=name, total=total, trainable=trainable, paper_millions=None)
        for name, (total, trainable) in others.items()
    ]
    return (
        *parts,
        PartSize(
            name="together",
            total=sum(part.total for part in parts),
            trainable=sum(part.trainable for part in parts),
            paper_millions=PAPER_MILLIONS["together"],
        ),
    )


def _count(module: nn.Module | None, *, only_trainable: bool = False) -> int:
    if module is None:
        return 0
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_trainable)


def _fixed_memory(parts: tuple[PartSize, ...], zero_stage: int, num_gpus: int) -> Memory:
    """ZeRO divides the optimiser from stage 1, gradients from 2, the model's weights from 3."""
    together = parts[-1]
    codec = next(part.total for part in parts if part.name == "codec")
    of_optimizer, of_gradients, of_weights = (
        num_gpus if zero_stage >= stage else 1 for stage in (1, 2, 3)
    )
    weights = (together.total - codec) // of_weights + codec
    return Memory(
        weights_bytes=BYTES_PER_WEIGHT * weights,
        gradients_bytes=BYTES_PER_WEIGHT * together.trainable // of_gradients,
        optimizer_bytes=BYTES_OF_ADAM * together.trainable // of_optimizer,
        activations_bytes=0,
    )


def _training_cost(model: CFLD, pairs: int) -> Cost:
    config = model.config
    latents = _latents(config, 2 * pairs, torch.float32)
    batch = TrainingBatch(
        source=torch.empty(pairs, 3, *config.source_encoder.image_size, dtype=_DTYPE),
        pose_maps=torch.empty(2 * pairs, 21, *config.pose_map_size, dtype=_DTYPE),
        latents=latents,
        draws=Draws(
            noise=torch.empty_like(latents),
            timesteps=torch.empty(2 * pairs),
            dropout=torch.empty(2 * pairs),
        ),
    )
    return measure(lambda: model(batch).mean, model, backward=True)


def _sampling_costs(model: CFLD, latents: Tensor) -> tuple[Cost, Cost, int]:
    """Conditioning (once), one step, and the number of terms."""
    config, terms = model.config, cumulative_terms()
    source = torch.empty(1, 3, *config.source_encoder.image_size)
    pose_map = torch.empty(1, 21, *config.pose_map_size)

    def condition() -> Tensor:
        return guide(model, model.condition(source, pose_map), terms).conditioning.prompt

    conditioning = measure(condition, model, backward=False)
    with torch.no_grad():
        guided = guide(model, model.condition(source, pose_map), terms)
    timestep = torch.empty((), dtype=torch.long)
    step = measure(
        lambda: guided_prediction(model, latents, timestep, guided), model, backward=False
    )
    return conditioning, step, len(terms)


def _latents(config: CFLDConfig, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, config.codec.latent_channels, *config.latent_size, dtype=dtype)
