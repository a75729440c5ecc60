"""Command: pose transfer from nothing, on drawn persons: draw, shard, train, generate, score."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from demo.held_out import HeldOut, write_pairs
from demo.report import PICTURE_FILE, Demonstration, write_report
from demo.stages import Stage, StageError, describe_seconds, run_stages

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]
_EXAMPLE = """\
example:
  make demo

It trains for about a quarter of an hour on two CPU cores. Interrupted, the same command goes on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    work = options.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        records = run_stages(_make_stages(options, work), work)
    except KeyboardInterrupt:
        logger.error("\ninterrupted; the same command goes on where it stopped")
        return 1
    except StageError as error:
        logger.error("%s", error)
        return 1
    demonstration = Demonstration(
        work=work, held_out=_held_out(work, options.pairs_per_person), records=records
    )
    report = options.output / "report.html"
    results = write_report(report, demonstration)
    sys.stdout.write(f"\n{results}\n")
    logger.info("in %s: open %s", describe_seconds(time.monotonic() - began), report)
    return 0


def _make_stages(options: argparse.Namespace, work: Path) -> list[Stage]:
    """The commands, as a user would give them one after another."""
    python = sys.executable
    figures, shards, run = work / "figures", work / "shards", work / "run"
    ranks = options.ranks
    return [
        Stage(
            name="figures",
            title=f"Draw {options.persons} persons, and 20 whom training never sees",
            command=(python, "-m", "preprocessing.draw_figures", "--output", str(figures),
                     "--persons", str(options.persons)),
        ),
        Stage(
            name="shards",
            title="Turn the photos into pairs and shards (Ray Data)",
            command=(python, "-m", "preprocessing.build_shards", "--dataset", "synthetic",
                     "--root", str(figures), "--output", str(shards),
                     "--image-size", "original"),
        ),
        Stage(
            name="train",
            title=f"Train the tiny model on {ranks} ranks (DeepSpeed)",
            command=(str(Path(python).parent / "deepspeed"), "--log_level", "error",
                     "--num_accelerators", str(ranks), str(REPOSITORY / "train/main.py"),
                     "--config", str(REPOSITORY / "train/configs/tiny.yaml"),
                     "--set", f"data.figures.url={shards}", f"validation.url={shards}",
                     "validation.split=test", f"output={run}", *options.set),
        ),
        *(
            Stage(
                name=name,
                title=title,
                command=(python, "-m", "cfld.evaluate", "--weights", str(run / "pipeline"),
                         "--shards", str(shards), "--pairs", str(work / f"{name}.csv"),
                         "--scheduler", "ddim", "--steps", str(options.sampling_steps),
                         "--pose-scale", "1", "--appearance-scale", "1", "--batch-size", "16",
                         "--size", "64", "64", "--metrics", "psnr", "ssim_256", "ssim", "--output",
                         str(work / name)),
                prepare=lambda: _write_lists(work, options.pairs_per_person),
            )
            for name, title in (
                ("right", "Generate and score the held-out persons in new poses"),
                ("wrong", "The same poses, from photos of wrong persons"),
            )
        ),
    ]  # fmt: skip


def _held_out(work: Path, per_person: int) -> HeldOut:
    return HeldOut(work / "shards", work / "figures", per_person)


def _write_lists(work: Path, per_person: int) -> None:
    held_out = _held_out(work, per_person)
    write_pairs(work / "right.csv", held_out.rightly_named)
    write_pairs(work / "wrong.csv", held_out.wrongly_named)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "demo", metavar="DIR",
        help=f"gets report.html, {PICTURE_FILE} and work/ (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, default=min(2, torch.cuda.device_count()) or 2, metavar="N",
        help="processes that train (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--persons", type=int, default=400, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--pairs-per-person", type=int, default=4, metavar="N",
        help="that are scored of each of the 20 (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sampling-steps", type=int, default=8, metavar="N", help="of DDIM (%(default)s)"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="PART.FIELD=VALUE",
        help="settings of the training, such as steps=200",
    )  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
