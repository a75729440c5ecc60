"""Command: make a pipeline, ready for use, of a run's newest checkpoint."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cfld.codec import build_codec
from cfld.pipeline import CFLDPipeline
from train.checkpoint import EMA, Checkpoint, CheckpointError, find_latest
from train.config import load_train_config
from train.masters import WEIGHTS
from train.restore import check_frozen, load_weights
from train.weights import build_model, hash_frozen

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
PIPELINE_FOLDER = "pipeline"
_EXAMPLE = """\
example:
  python -m train.export runs/paper --output weights/paper"""


def export_run(run: Path, output: Path, *, use_ema: bool = True) -> None:
    """Save the pipeline of a run's newest checkpoint, with averaged weights if it has some.

    Raises:
        ValueError: If there is no checkpoint, or it does not fit the model that the run's
            configuration builds now.
        FileExistsError: If `output` exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it or choose another --output")
    folder = find_latest(run)
    if folder is None:
        raise CheckpointError(f"{run}: holds no checkpoint; is it the folder of a run?")
    config = load_train_config(run / CONFIG_FILE)
    torch.manual_seed(config.order.seed)
    model = build_model(config)
    checkpoint = Checkpoint(folder)
    check_frozen(checkpoint, hash_frozen(model))
    has_ema = use_ema and checkpoint.state.has_ema
    load_weights(model, checkpoint, EMA if has_ema else WEIGHTS)
    partial = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    CFLDPipeline.from_model(model, build_codec(config.model.codec)).save_pretrained(partial)
    shutil.copy(run / CONFIG_FILE, partial / "training.yaml")
    partial.rename(output)
    logger.info("%s: weights of step %d of %s", output, checkpoint.state.step, run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        export_run(options.run, options.output, use_ema=not options.no_ema)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.error("interrupted; run the same command again")
        return 1
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--no-ema", action="store_true", help="take the weights, not their average")
    return parser


if __name__ == "__main__":
    sys.exit(main())
