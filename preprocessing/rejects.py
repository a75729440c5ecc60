"""Turns what was left out into rows of the rejects table."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from preprocessing.listing import Reject
from shards.format import REJECTS_SCHEMA


def rejects_table(rejects: Iterable[tuple[Reject, str | None]]) -> pa.Table:
    """Make rows of (reject, photo name), for things that are not in the shards."""
    rows = [
        {
            "path": reject.path,
            "name": name,
            "stage": reject.stage,
            "reason": reject.reason,
            "detail": reject.detail,
            "is_stored": False,
        }
        for reject, name in rejects
    ]
    return pa.Table.from_pylist(rows, REJECTS_SCHEMA)


def rejects_of_columns(
    stage: str,
    reason: str | pa.Array,
    path: str | pa.Array,
    *,
    name: pa.Array | None = None,
    detail: str | pa.Array = "",
    num_rows: int,
    is_stored: bool = False,
) -> pa.Table:
    """Make rows from columns or values that hold for all rows: no Python object per row."""

    def column(value: str | bool | pa.Array | None) -> pa.Array:
        if isinstance(value, pa.Array):
            return value
        return pa.nulls(num_rows, pa.string()) if value is None else pa.repeat(value, num_rows)

    values = (path, name, stage, reason, detail, is_stored)
    return pa.table([column(value) for value in values], schema=REJECTS_SCHEMA)


def count_reasons(rejects: pa.Table) -> dict[str, int]:
    """Count rows by reason, the commonest first, equal ones by name."""
    counts = {row["values"]: row["counts"] for row in rejects["reason"].value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
