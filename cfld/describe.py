"""Command: how large a configuration is, what memory and time its training and use take."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict

from cfld.command import make_parser, positive
from cfld.config import PARTS
from cfld.config_file import ConfigError, load_config
from cfld.description import PAPER_EPOCHS, PAPER_PAIRS, Description, describe, training_hours

logger = logging.getLogger("cfld.describe")  # run as a command, __name__ is another

SYMBOLS = dict(zip(PARTS, ("S", "D", "A", "P", "N"), strict=True))
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_EXAMPLE = """\
example:
  python -m cfld.describe --config paper --zero-stage 2 --num-gpus 8 --pairs-per-second 64"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        described = describe(
            load_config(options.config, options.set),
            zero_stage=options.zero_stage,
            num_gpus=options.num_gpus,
            num_inference_steps=options.steps,
        )
    except (ConfigError, ImportError) as error:
        logger.error("%s", error)
        return 2
    hours = training_hours(options.pairs_per_second) if options.pairs_per_second else None
    if options.json:
        sys.stdout.write(json.dumps(_as_json(described, options, hours), indent=2) + "\n")
    else:
        sys.stdout.write(_as_text(described, options, hours))
    return 0


def _as_json(
    described: Description, options: argparse.Namespace, hours: float | None
) -> dict[str, object]:
    memories = {
        "plain": described.memory,
        "checkpointed": described.memory_with_checkpointing,
    }
    return asdict(described) | {
        "zero_stage": options.zero_stage,
        "num_gpus": options.num_gpus,
        "bytes_by_micro_batch": {
            name: {pairs: memory.total_bytes(pairs) for pairs in _MICRO_BATCHES}
            for name, memory in memories.items()
        },
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
    parser = make_parser("cfld.describe", __doc__, _EXAMPLE)
    parser.add_argument("--config", default="paper", metavar="NAME|FILE", help="preset or YAML")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE")
    parser.add_argument("--json", action="store_true", help="in bytes and operations, as JSON")
    training = parser.add_argument_group("training")
    training.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    training.add_argument("--num-gpus", type=positive, default=1, metavar="N")
    training.add_argument("--pairs-per-second", type=_speed, metavar="SPEED", help="of all GPUs")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=positive, default=50, metavar="N")
    return parser


def _speed(word: str) -> float:
    """A finite number above 0."""
    number = float(word)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is not a number above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
