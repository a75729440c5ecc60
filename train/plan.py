"""The plan of a run, made without training: what would run, on what, how large and how long."""

from __future__ import annotations

import json
from pathlib import Path

from cfld.description import Memory, describe
from train.config import TrainConfig
from train.engine import deepspeed_settings
from train.order import accumulation_steps, num_steps
from train.pair_table import read_pairs

_GIB = 2**30
_SPEEDS = (1, 10, 80)
_TABLE_SIZES = (1, 2, 4, 8, 16, 28, 56)


def make_plan(config: TrainConfig, num_ranks: int, extra: Path | None = None) -> str:
    """Describe a run in words; reads the shard sets' indexes, but no shard.

    Raises:
        ValueError: If global batch, micro-batch and ranks do not fit, or DeepSpeed's settings
            contradict the configuration.
    """
    table = read_pairs(list(config.data.values()))
    engine = config.engine
    global_batch = config.order.global_batch
    accumulation = accumulation_steps(global_batch, engine.micro_batch, num_ranks)
    settings = deepspeed_settings(
        engine,
        config.optimizer,
        global_batch=global_batch,
        accumulation=accumulation,
        extra=extra,
    )
    steps_per_epoch = num_steps(table.sets, config.order)
    steps = config.num_steps(steps_per_epoch)
    described = describe(config.model, zero_stage=engine.zero_stage, num_gpus=num_ranks)
    together = described.parts[-1]
    has_latents = config.loader.use_latents and table.has_latents
    flops = described.flops_per_pair + (0 if has_latents else described.flops_to_encode_pair)
    lines = [
        *(
            f"data           {name}: {identity.num_pairs:,} pairs of {identity.dataset}, split "
            f"{identity.split}, weight {identity.weight:g}"
            for name, identity in zip(config.data, table.identities, strict=True)
        ),
        f"global batch   {global_batch} = micro-batch {engine.micro_batch} x accumulation "
        f"{accumulation} x ranks {num_ranks}",
        f"steps          {steps:,} = {steps / steps_per_epoch:.1f} epochs of {steps_per_epoch:,}",
        f"learning rate  up to {config.learning_rate:g}, {config.schedule.kind} after "
        f"{config.schedule.warmup_steps} steps of warm-up",
        f"parameters     {together.total / 1e6:.1f} million, {together.trainable / 1e6:.1f} of "
        "them trained",
        f"latents        {'stored in the shards' if has_latents else 'made in every step'}",
        f"arithmetic     {flops / 1e12:.2f} TFLOP a pair",
        "hours          "
        + ", ".join(
            f"{steps * global_batch / speed / 3600:,.1f} at {speed} pairs/s" for speed in _SPEEDS
        ),
        "",
        f"memory of each rank in GiB ({engine.precision}, ZeRO {engine.zero_stage}), about 1 more "
        "for CUDA",
        *_memory_lines(config, described.memory, described.memory_with_checkpointing),
        "",
        "DeepSpeed      " + json.dumps(settings),
    ]
    return "\n".join(lines) + "\n"


def _memory_lines(config: TrainConfig, plain: Memory, checkpointed: Memory) -> list[str]:
    # The description is of half precision; full precision has weights of 4 bytes that are their
    # own masters, and activations twice as large.
    is_half = config.engine.precision in ("fp16", "bf16")
    lines = [f"{'micro-batch':>15}{'plain':>10}{'all parts checkpointed':>26}"]
    for size in sorted({*_TABLE_SIZES, config.engine.micro_batch}):
        if config.order.global_batch % size:
            continue
        totals = [
            _rank_bytes(memory, size, is_half=is_half, config=config) / _GIB
            for memory in (plain, checkpointed)
        ]
        mark = "  <- this run" if size == config.engine.micro_batch else ""
        lines.append(f"{size:>15}{totals[0]:>10.1f}{totals[1]:>26.1f}{mark}")
    return lines


def _rank_bytes(memory: Memory, micro_batch: int, *, is_half: bool, config: TrainConfig) -> int:
    optimizer = 0 if config.engine.offload_optimizer else memory.optimizer_bytes
    activations = micro_batch * memory.activations_bytes
    if is_half:
        return memory.weights_bytes + memory.gradients_bytes + optimizer + activations
    return 2 * (memory.weights_bytes + memory.gradients_bytes + activations) + 2 * optimizer // 3
