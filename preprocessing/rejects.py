"""Turns what was left out into rows of the rejects table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TypeAlias

import pyarrow as pa

from preprocessing.listing import Reject
from shards.format import REJECTS_SCHEMA

_Column: TypeAlias = pa.Array | pa.ChunkedArray


def rejects_table(rejects: Iterable[Reject]) -> pa.Table:
    """Make rows of things that are not in the shards."""
    rows = [asdict(reject) | {"is_stored": False} for reject in rejects]
    return pa.Table.from_pylist(rows, REJECTS_SCHEMA)


def rejects_of_columns(
    stage: str,
    reason: str | _Column,
    path: str | _Column,
    *,
    name: _Column | None = None,
    detail: str | _Column = "",
    is_stored: bool = False,
) -> pa.Table:
    """Make rows from columns, one at least, and values that hold for all rows."""
    values = (path, name, stage, reason, detail, is_stored)
    num_rows = next(len(value) for value in values if isinstance(value, _Column))

    def column(value: str | bool | _Column | None) -> _Column:
        if isinstance(value, _Column):
            return value
        return pa.nulls(num_rows, pa.string()) if value is None else pa.repeat(value, num_rows)

    return pa.table([column(value) for value in values], schema=REJECTS_SCHEMA)


def count_reasons(rejects: pa.Table) -> dict[str, int]:
    """Count rows by reason, the commonest first, equal ones by name."""
    counts = {row["values"]: row["counts"] for row in rejects["reason"].value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
