"""Command: look at a shard set in a web page, and find bytes that are damaged or missing."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from aiohttp import ClientError

from preprocessing.job_settings import SettingsError, require_access
from preprocessing.progress import Progress
from preprocessing.shard_report import ReportOptions, make_report
from preprocessing.store import OutputError
from preprocessing.verify import REPAIR, find_missing, verify
from shards.format import FormatError, ShardSet, open_shards

logger = logging.getLogger(__name__)

_EXAMPLE = """\
example:
  python -m preprocessing.inspect_shards shards/photos --verify --out report.html

Exit code 1: --verify found something wrong; 2: this is no complete shard set, or it cannot be read.
manifest.json itself has no checksum: keep a copy of it, or its sha256, elsewhere."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    if options.out is None and not options.verify:
        parser.error("give --out FILE to look at the set, --verify to check it, or both")
    if options.pairs < 0:
        parser.error(f"--pairs {options.pairs}: give 0 or more")
    try:
        require_access(options.shards)
        shards = open_shards(options.shards)
        if options.verify and not _is_whole(shards):
            return 1
        if options.out is not None:
            _write_page(shards, options)
    except (SettingsError, FormatError, OutputError) as error:
        logger.error("%s", error)
        return 2
    except (pa.ArrowException, OSError, ClientError) as error:
        logger.error("%s: %s (--verify tells if a file is damaged)", options.shards, error)
        return 2
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 1
    return 0


def _is_whole(shards: ShardSet) -> bool:
    """Verify the set, and write what was found to standard output."""
    manifest = shards.manifest
    problems = verify(shards, Progress())
    total = f"{len(manifest.shards):,} shards and {len(manifest.tables)} tables"
    if problems:
        num_damaged = len({problem.file for problem in problems})
        sys.stdout.write("".join(f"{problem}\n" for problem in problems))
        sys.stdout.write(f"{num_damaged:,} of {total} are damaged; {REPAIR}\n")
    else:
        sys.stdout.write(
            f"{total}, {manifest.size_bytes / 1e6:,.1f} MB: every byte is as it was written\n"
        )
    return not problems


def _write_page(shards: ShardSet, options: argparse.Namespace) -> None:
    if missing := find_missing(shards):
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise FormatError(
            f"{options.shards}: {len(missing):,} files of the manifest are missing: {shown}; "
            f"{REPAIR}"
        )
    title = f"{shards.manifest.dataset}: {options.shards}"
    choice = ReportOptions(num_pairs=options.pairs, split=options.split, seed=options.seed)
    page = make_report(shards, title, choice).encode()
    partial = options.out.with_name(f"{options.out.name}.tmp")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(page)
        partial.replace(options.out)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputError(f"{options.out} could not be written: {error.strerror}") from error
    sys.stdout.write(f"{options.out}: {len(page) / 1e6:.1f} MB\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.inspect_shards",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", help="folder or URL that build_shards wrote")
    parser.add_argument("--verify", action="store_true", help="read and compare every byte")
    page = parser.add_argument_group("web page")
    page.add_argument("--out", type=Path, metavar="FILE", help="where to write it")
    page.add_argument("--pairs", type=int, default=24, metavar="N", help="drawn pairs (default 24)")
    page.add_argument("--split", help="only this one (default: all, in equal shares)")
    page.add_argument("--seed", type=int, default=0, help="which pairs (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
