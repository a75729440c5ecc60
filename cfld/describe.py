"""Command: how large a configuration is, what memory and time its training and use take."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from cfld.codec import build_codec
from cfld.config import PARTS, CFLDConfig
from cfld.config_file import ConfigError, load_config
from cfld.guidance import cumulative_terms, guide, guided_prediction
from cfld.measure import Cost, measure
from cfld.model import CFLD
from cfld.objective import Draws, TrainingBatch

logger = logging.getLogger("cfld.describe")  # run as a command, __name__ is another

# CFLD Table 1: millions of trainable parameters.
PAPER_MILLIONS = {
    "source_encoder": 87.0,
    "prompt_decoder": 97.7,
    "appearance": 22.5,
    "pose_adapter": 30.6,
    "unet": 10.3,
    "together": 248.2,
}
SYMBOLS = dict(zip(PARTS, ("S", "D", "A", "P", "N"), strict=True))
PAPER_PAIRS = 101_966  # DeepFashion, CFLD Sec. 4.1
PAPER_EPOCHS = 100
BYTES_PER_WEIGHT = 2
BYTES_OF_ADAM = 12
"""Of each trained weight in float32: itself and two moments."""

_DTYPE = torch.float16
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_EXAMPLE = """\
example:
  python -m cfld.describe --config paper --zero-stage 2 --num-gpus 8 --pairs-per-second 64"""


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        config = load_config(options.config, options.set)
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    described = describe(
        config,
        zero_stage=options.zero_stage,
        num_gpus=options.num_gpus,
        num_inference_steps=options.steps,
    )
    hours = training_hours(options.pairs_per_second) if options.pairs_per_second else None
    if options.json:
        sys.stdout.write(json.dumps(_as_json(described, hours), indent=2) + "\n")
    else:
        sys.stdout.write(_as_text(described, options, hours))
    return 0


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


def _as_json(described: Description, hours: float | None) -> dict[str, object]:
    return asdict(described) | {
        "flops_per_image": described.flops_per_image,
        "paper_schedule_hours": hours,
    }


def _as_text(described: Description, options: argparse.Namespace, hours: float | None) -> str:
    lines = [f"{'parameters in millions':<24}{'total':>10}{'trainable':>12}{'Table 1':>10}"]
    for part in described.parts:
        name = f"{SYMBOLS.get(part.name, ' ')} {part.name}"
        paper = "" if part.paper_millions is None else f"{part.paper_millions:.1f}"
        lines.append(f"{name:<24}{part.total / 1e6:>10.1f}{part.trainable / 1e6:>12.1f}{paper:>10}")
    lines += [
        "",
        f"GB on each of {options.num_gpus} GPUs, fp16, Adam, ZeRO {options.zero_stage}; "
        "without CUDA's own, about 1 GB",
        f"{'pairs per micro-batch':<24}{'plain':>10}{'checkpointed':>14}",
    ]
    for pairs in _MICRO_BATCHES:
        plain = described.memory.total_bytes(pairs) / 1e9
        small = described.memory_with_checkpointing.total_bytes(pairs) / 1e9
        lines.append(f"{pairs:<24}{plain:>10.1f}{small:>14.1f}")
    tera = 1e12
    lines += [
        "",
        "TFLOP (a multiplication and an addition are two)",
        f"  train on a pair         {described.flops_per_pair / tera:10.3f}",
        f"  encode its images       {described.flops_to_encode_pair / tera:10.3f}   "
        "(not with stored latents)",
        f"  generate an image       {described.flops_per_image / tera:10.3f}   "
        f"({described.num_inference_steps} steps of {described.num_terms} predictions)",
    ]
    if hours is not None:
        lines += [
            "",
            f"{hours:.1f} hours for the paper's {PAPER_EPOCHS} epochs of {PAPER_PAIRS:,} pairs "
            f"at {options.pairs_per_second:g} pairs/s",
        ]
    return "\n".join(lines) + "\n"


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cfld.describe",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="paper", metavar="NAME|FILE", help="preset or YAML")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE")
    parser.add_argument("--json", action="store_true", help="in bytes and operations, as JSON")
    training = parser.add_argument_group("training")
    training.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    training.add_argument("--num-gpus", type=int, default=1, metavar="N")
    training.add_argument("--pairs-per-second", type=float, metavar="SPEED", help="of all GPUs")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=int, default=50, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
