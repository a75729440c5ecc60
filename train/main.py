"""Command: train CFLD on shard sets, alone or under the `deepspeed` launcher; resumes by itself."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tqdm.contrib.logging import logging_redirect_tqdm

from train.checkpoint import clean_up, write_whole
from train.config import TrainConfig, load_train_config
from train.engine import check_precision
from train.export import CONFIG_FILE, PIPELINE_FOLDER, export_run
from train.health import TooManySkippedError
from train.pair_table import read_pairs
from train.plan import make_plan
from train.processes import (
    Ranks,
    has_lost_peer,
    is_first_process,
    num_processes,
    start_processes,
    stop_processes,
)
from train.shard_cache import ShardError
from train.trainer import Trainer

logger = logging.getLogger(__name__)

RUNS_FILE = "starts.jsonl"
_EXAMPLE = """\
example:
  deepspeed train/main.py --config train/configs/paper.yaml --set data.fashion.url=shards/fashion"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _make_parser().parse_args(arguments)
    _configure_logging()
    try:
        config = load_train_config(options.config, options.set)
        if options.plan is not None:
            if is_first_process():
                sys.stdout.write(make_plan(config, options.plan, options.deepspeed_config))
            return 0
        trainer = _set_up(config, options)
    except (ValueError, OSError, ImportError) as error:  # before any work: what was given is wrong
        logger.error("%s", error)
        return 2
    try:
        return _train(trainer) if trainer else 0
    except (ShardError, TooManySkippedError) as error:
        logger.error("%s", error)
        return 1
    except RuntimeError as error:
        if not has_lost_peer(error):
            raise
        logger.error("another rank is gone, so this one ends too; see what that rank said")
        return 1


def _set_up(config: TrainConfig, options: argparse.Namespace) -> Trainer | None:
    """Build everything; nothing if the run is complete."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_precision(config.engine, device)
    if device.type == "cpu":
        # DeepSpeed would warn that it found no other accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    table = read_pairs(list(config.data.values()))
    ranks = start_processes()
    run = Path(config.output)
    if ranks.broadcast((run / PIPELINE_FOLDER).exists()):
        logger.info("%s is complete; set another output for another run", run)
        return None
    trainer = Trainer(config, ranks, table, extra=options.deepspeed_config)
    if ranks.is_first:
        clean_up(run)
        _keep_settings(config, run, ranks)
    return trainer


def _train(trainer: Trainer) -> int:
    with logging_redirect_tqdm() if sys.stderr.isatty() else nullcontext():
        is_done = trainer.run()
    if is_done and is_first_process():
        export_run(trainer.run_folder, trainer.run_folder / PIPELINE_FOLDER)
    # Not after an error: others may then hang in a collective, and this would wait for them.
    stop_processes()
    return 0


def _keep_settings(config: TrainConfig, run: Path, ranks: Ranks) -> None:
    """Keep the resolved configuration, and what was started when."""
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.structured(config)))
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": _git_commit(),
        "command": shlex.join(sys.argv),
        "num_ranks": ranks.num_ranks,
        "device": str(ranks.device),
        "torch": torch.__version__,
    }
    with (run / RUNS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def _git_commit() -> str | None:
    """Return the commit of this code, with `+changes` if it was changed since."""
    folder = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):  # installed without git
        return None
    return commit + ("+changes" if changes else "")


def _configure_logging() -> None:
    rank = os.environ.get("RANK", "0")
    is_first = is_first_process()
    logging.basicConfig(
        format="%(message)s" if is_first else f"rank {rank}: %(message)s",
        level=logging.INFO if is_first else logging.WARNING,
    )


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed train/main.py",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="PART.FIELD=VALUE",
        help="overrides",
    )
    parser.add_argument(
        "--plan",
        type=int,
        nargs="?",
        const=num_processes(),
        metavar="RANKS",
        help="say what would run on so many ranks, its memory and time, and stop",
    )
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        type=Path,
        metavar="JSON",
        help="further settings of DeepSpeed",
    )
    # What the launcher and users of DeepSpeed give by habit.
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
