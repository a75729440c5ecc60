"""What an evaluation leaves behind: metrics.json, scores.parquet, tables.md and report.html."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cfld.evaluation.paper_tables import (
    OURS,
    TABLE_OF_SIZE,
    compare,
    format_interval,
    format_score,
    markdown_table,
)
from cfld.evaluation.scoring import ImagePair, ScoreSet
from cfld.web_page import make_page, make_table, picture_uri
from cfld.whole_file import whole_file

# By which score pairs are ranked: the first that is there; LPIPS is better when it is lower.
RANKING = ("lpips", "ssim_paper", "ssim", "psnr")
NUM_SHOWN = 4

_STYLE = ".pairs figure { width: 16.25rem } .pairs figure img { width: 33% }"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that a report says: how it was scored, the scores, what is missing, and remarks."""

    title: str
    size: tuple[int, int]
    settings: Mapping[str, Any]
    scores: ScoreSet
    fids: Mapping[str, float]
    self_checks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores of what is known to be nearly perfect, by label."""
    missing_images: tuple[str, ...] = ()
    surplus_images: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def means(self) -> dict[str, float]:
        """Return one figure for each metric."""
        return self.scores.means() | {**self.fids}


def write_report(
    output: Path, evaluation: Evaluation, load_pair: Callable[[str], ImagePair]
) -> None:
    """Write all files of the report; `load_pair` fetches the few pairs that it shows."""
    scores = evaluation.scores
    files = {
        "tables.md": markdown_tables(evaluation),
        "report.html": html_report(evaluation, load_pair),
        "metrics.json": json.dumps(metrics_document(evaluation), indent=2) + "\n",
    }
    write_texts(output, files)
    with whole_file(output / "scores.parquet") as unfinished:
        pq.write_table(pa.table({"name": scores.names, **scores.per_image}), unfinished)


def write_texts(output: Path, files: Mapping[str, str]) -> None:
    """Write text files into a folder, each under its name once it is whole."""
    for name, text in files.items():
        with whole_file(output / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def metrics_document(evaluation: Evaluation) -> dict[str, Any]:
    """Return what `metrics.json` holds; infinite values are the string "inf"."""
    scores = evaluation.scores
    values: dict[str, dict[str, Any]] = {
        name: asdict(each) for name, each in scores.intervals.items()
    }
    values |= {
        name: {"value": fid, "low": None, "high": None} for name, fid in evaluation.fids.items()
    }
    for each in values.values():
        each["value"] = _jsonable(each["value"])
    return {
        "title": evaluation.title,
        "size": list(evaluation.size),
        "settings": dict(evaluation.settings),
        "num_images": len(scores.names),
        "scores": values,
        "self_checks": {
            label: {name: _jsonable(value) for name, value in each.items()}
            for label, each in evaluation.self_checks.items()
        },
        "unavailable": dict(scores.missing),
        "missing_images": list(evaluation.missing_images),
        "surplus_images": list(evaluation.surplus_images),
        "notes": remarks(evaluation),
    }


def markdown_tables(evaluation: Evaluation) -> str:
    """Return our scores with their intervals, and the paper's table with ours beside it."""
    parts = [f"# {evaluation.title}\n", markdown_table(*_score_table(evaluation))]
    parts += [f"> {remark}\n" for remark in remarks(evaluation)]
    if table := TABLE_OF_SIZE.get(evaluation.size):
        parts += [f"## {table.title}\n", markdown_table(*compare(table, _paper_rows(evaluation)))]
    return "\n".join(parts)


def html_report(evaluation: Evaluation, load_pair: Callable[[str], ImagePair]) -> str:
    """Return a self-contained page: scores, remarks, and the best, median and worst pairs."""
    body = [f'<p class="note">{escape(remark)}</p>' for remark in remarks(evaluation)]
    body.append(make_table(*_score_table(evaluation)))
    if table := TABLE_OF_SIZE.get(evaluation.size):
        body.append(f"<h2>{escape(table.title)}</h2>")
        body.append(make_table(*compare(table, _paper_rows(evaluation))))
    ranking = _ranking(evaluation.scores)
    for title, names in _chosen_pairs(evaluation.scores, ranking).items():
        pairs = [load_pair(name) for name in names]
        figures = "".join(_figure(pair, evaluation.scores) for pair in pairs)
        shown = "target, generated" if pairs[0].source is None else "source, target, generated"
        body.append(f"<h2>{title} pairs by {ranking} ({shown})</h2>")
        body.append(f'<div class="pairs">{figures}</div>')
    settings = [[name, str(value)] for name, value in evaluation.settings.items()]
    body += ["<h2>Settings</h2>", make_table(["Setting", "Value"], settings)]
    return make_page(evaluation.title, body, _STYLE)


def remarks(evaluation: Evaluation) -> list[str]:
    """Return everything a reader must know before comparing figures, as sentences."""
    scores = evaluation.scores
    found = [f"{len(scores.names)} images were scored at {evaluation.size[0]}x{evaluation.size[1]}"]
    for kind, names in (
        ("expected, but missing", evaluation.missing_images),
        ("there, but not expected, and ignored", evaluation.surplus_images),
    ):
        if names:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            found.append(f"{len(names)} images are {kind}: {shown}")
    found += [f"No {metric}: {reason}" for metric, reason in scores.missing.items()]
    for metric in scores.per_image:
        if names := scores.undefined(metric):
            found.append(
                f"{metric} is undefined for {len(names)} images of a single colour, such as "
                f"{names[0]}; its mean leaves them out"
            )
    ranking = _ranking(scores)
    if ranking not in (RANKING[0], None):
        found.append(f"The best and worst pairs are those by {ranking}, for there is no LPIPS")
    return [f"{each}." for each in (*found, *evaluation.notes)]


def _score_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    checks = evaluation.self_checks
    rows = [
        [name, format_score(name, each.value), format_interval(name, each.low, each.high)]
        for name, each in evaluation.scores.intervals.items()
    ]
    rows += [[name, format_score(name, fid), ""] for name, fid in evaluation.fids.items()]
    for row in rows:
        row += [format_score(row[0], each.get(row[0])) for each in checks.values()]
    rows += [[name, "missing", "", *[""] * len(checks)] for name in evaluation.scores.missing]
    return ["Metric", "Value", "95 % interval", *checks], rows


def _paper_rows(evaluation: Evaluation) -> dict[str, Mapping[str, float]]:
    return {**evaluation.self_checks, OURS: evaluation.means()}


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _ranking(scores: ScoreSet) -> str | None:
    return next((name for name in RANKING if name in scores.per_image), None)


def _chosen_pairs(scores: ScoreSet, ranking: str | None) -> dict[str, list[str]]:
    if ranking is None:
        return {}
    sign = 1 if ranking == "lpips" else -1
    order = np.argsort(sign * scores.per_image[ranking], kind="stable")  # undefined ones are last
    names = np.asarray(scores.names)[order].tolist()
    shown = min(NUM_SHOWN, len(names))
    middle = (len(names) - shown) // 2
    return {
        "Best": names[:shown],
        "Median": names[middle : middle + shown],
        "Worst": names[::-1][:shown],
    }


def _figure(pair: ImagePair, scores: ScoreSet) -> str:
    row = scores.names.index(pair.name)
    values = ", ".join(
        f"{name} {format_score(name, float(each[row]))}" for name, each in scores.per_image.items()
    )
    images = "".join(
        f'<img alt="{kind}" src="{picture_uri(image)}">'
        for kind, image in (
            ("source", pair.source),
            ("target", pair.target),
            ("generated", pair.generated),
        )
        if image is not None
    )
    return f"<figure>{images}<figcaption>{escape(pair.name)}<br>{values}</figcaption></figure>"
