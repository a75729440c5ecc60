"""Several evaluations beside one of the paper's tables: guidance (Table 5), ablations (Table 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from cfld.evaluation.pair_images import choose_pairs
from cfld.evaluation.paper_tables import (
    PaperTable,
    compare,
    format_interval,
    format_score,
    markdown_table,
)
from cfld.evaluation.report import Evaluation, metrics_document, remarks, write_texts
from cfld.evaluation.result_files import name_of
from cfld.evaluation.result_reader import ResultReader
from cfld.web_page import make_page, make_picture_table, make_table

NUM_SHOWN = 6
PAPER_SIZE = (256, 176)

# Pose and appearance scale of each row of CFLD Table 5.
GUIDANCE_SCALES = {
    "disabled, 1.0, 1.0": (1.0, 1.0),
    "appearance only, 1.0, 2.0": (1.0, 2.0),
    "pose only, 2.0, 1.0": (2.0, 1.0),
    "both, 2.0, 2.0": (2.0, 2.0),
    "both, 3.0, 3.0": (3.0, 3.0),
}

_STYLE = """
.strips { overflow-x: auto } .strips img { height: 11rem; display: block }
.strips th { max-width: 7.5rem }
"""


@dataclass(frozen=True)
class StudyRow:
    """One evaluation, the folder of its own report beside the study's, and its images."""

    evaluation: Evaluation
    folder: str
    reader: ResultReader


def write_study(output: Path, table: PaperTable, rows: Mapping[str, StudyRow]) -> str:
    """Write `tables.md`, `metrics.json` and `report.html` of rows by label; return the table."""
    evaluations = {label: row.evaluation for label, row in rows.items()}
    markdown = markdown_table(*compare(table, _scores(evaluations)))
    notes = _notes(evaluations)
    intervals = _intervals(evaluations)
    files = {
        "tables.md": "\n".join(
            [
                f"# {table.title}\n",
                markdown,
                *(f"> {note}\n" for note in notes),
                "## This run, with 95 % intervals\n",
                markdown_table(*intervals),
            ]
        ),
        "metrics.json": json.dumps(
            {label: metrics_document(each) for label, each in evaluations.items()}, indent=2
        )
        + "\n",
        "report.html": _page(table, rows, notes),
    }
    write_texts(output, files)
    return markdown


def _scores(evaluations: Mapping[str, Evaluation]) -> dict[str, Mapping[str, float]]:
    """Means by label; the self-checks, which all rows share, are rows too."""
    first = next(iter(evaluations.values()))
    return {
        **{label: each.means() for label, each in evaluations.items()},
        **first.self_checks,
    }


def _notes(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """What must be known of all rows, said once."""
    notes = dict.fromkeys(note for each in evaluations.values() for note in remarks(each))
    size = next(iter(evaluations.values())).size
    if size != PAPER_SIZE:
        notes["The paper's figures are those of images of {}x{}.".format(*PAPER_SIZE)] = None
    return list(notes)


def _intervals(evaluations: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    metrics = list(next(iter(evaluations.values())).means())
    rows = []
    for label, evaluation in evaluations.items():
        spans = {
            metric: format_interval(metric, each.low, each.high)
            for metric, each in evaluation.scores.intervals.items()
        }
        means = evaluation.means()
        cells = [
            format_score(metric, means[metric])
            + (f" ({spans[metric]})" if spans.get(metric) else "")
            for metric in metrics
        ]
        rows.append([label, *cells])
    return ["Method", *metrics], rows


def _page(table: PaperTable, rows: Mapping[str, StudyRow], notes: list[str]) -> str:
    evaluations = {label: row.evaluation for label, row in rows.items()}
    links = ", ".join(
        f'<a href="{quote(row.folder)}/report.html">{escape(label)}</a>'
        for label, row in rows.items()
    )
    body = [f'<p class="note">{escape(note)}</p>' for note in notes]
    body += [make_table(*compare(table, _scores(evaluations))), f"<p>Reports: {links}</p>"]
    body += ["<h2>This run, with 95 % intervals</h2>", make_table(*_intervals(evaluations))]
    body += ["<h2>The same pairs in every row</h2>", _strips(rows)]
    return make_page(table.title, body, _STYLE)


def _strips(rows: Mapping[str, StudyRow]) -> str:
    """A table of images: source, target, and what each row made of it (CFLD Fig. 5)."""
    readers = {label: row.reader for label, row in rows.items()}
    first = next(iter(readers.values()))
    shown = []
    for pair in choose_pairs(list(first.files), NUM_SHOWN):
        made = [reader.read(name_of(pair)) for reader in readers.values()]
        source = made[0].source
        assert source is not None  # images were generated from it
        shown.append([source, made[0].target, *(each.generated for each in made)])
    table = make_picture_table(("source", "target", *readers), shown)
    return f'<div class="strips">{table}</div>'
