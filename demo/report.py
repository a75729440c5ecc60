"""The page that shows what a demonstration did: scores, pictures, loss, data, times."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import UInt8

from cfld.evaluation.paper_tables import markdown_table
from cfld.images import decode_image, encode_png
from cfld.web_page import make_page, make_picture_table, make_table
from cfld.whole_file import whole_file
from demo.drawn_scores import score_pictures
from demo.held_out import HeldOut, count_images, read_generated
from demo.stages import StageRecord, describe_seconds
from preprocessing.shard_report import COLUMNS, ReportOptions, contact_sheets
from preprocessing.shard_report import STYLE as PAIRS_STYLE
from shards.format import open_shards

RESULTS_FILE = "results.json"
PICTURE_FILE = "pictures.png"
SCORES = {
    "silhouette_iou": "silhouette IoU ↑",
    "clothes_error": "error of clothes' colour ↓",
    "ssim": "SSIM ↑",
    "psnr": "PSNR ↑",
}
NUM_SHOWN = 10
PICTURE_COLUMNS = ("source", "pose", "target", "generated", "wrong source", "generated from it")

_STYLE = """
.pictures img { width: 96px; image-rendering: pixelated }
svg path { fill: none; stroke: #4a7ab5; stroke-width: 1.5 }
svg path.raw { stroke: #cfdbe9; stroke-width: 1 } svg line { stroke: #d8dee6 }
svg text { fill: #566 }
"""

Pictures = UInt8[np.ndarray, "pairs height width 3"]


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """Everything that the stages left in `work`."""

    work: Path
    held_out: HeldOut
    records: Mapping[str, StageRecord]

    @cached_property
    def generated(self) -> Pictures:
        """Made from the right photos."""
        return read_generated(self.work / "right", self.held_out.rightly_named)

    @cached_property
    def wrongly_generated(self) -> Pictures:
        """Made from photos of other persons, in the same poses."""
        return read_generated(self.work / "wrong", self.held_out.wrongly_named)

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """Figures of every training step."""
        text = (self.work / "run" / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def scores(self) -> dict[str, dict[str, float]]:
        """Mean scores of the generated pictures, and of what they are to be compared with."""
        held_out = self.held_out
        targets = held_out.photos([pair.target for pair in held_out.pairs])
        regions = held_out.target_regions()
        mean = held_out.mean_photo()
        candidates = {
            "generated": self.generated,
            "generated from a wrong person's photo": self.wrongly_generated,
            "copy of the source": held_out.photos([pair.source for pair in held_out.pairs]),
            "mean training image": np.repeat(mean[None], len(targets), axis=0),
            "the target itself": targets,
        }
        return {
            name: score_pictures(pictures, targets, regions).means()
            for name, pictures in candidates.items()
        }


def write_report(path: Path, demonstration: Demonstration) -> str:
    """Write the page, the held-out pictures beside it and the scores as JSON into the work folder.

    Return the scores as a table of text.
    """
    scores = demonstration.scores()
    results = json.dumps({name: _finite(each) for name, each in scores.items()}, indent=2)
    with whole_file(demonstration.work / RESULTS_FILE) as unfinished:
        unfinished.write_text(results + "\n", encoding="utf-8")
    rows = [[name, *_cells(each)] for name, each in scores.items()]
    header = ["held-out persons", *SCORES.values()]
    pictures = _held_out_rows(demonstration)
    with whole_file(path.with_name(PICTURE_FILE)) as unfinished:
        unfinished.write_bytes(encode_png(_side_by_side(pictures)))
    body = [
        *_introduce(demonstration),
        make_table(header, rows),
        "<h2>Held-out persons</h2>",
        make_picture_table(PICTURE_COLUMNS, pictures),
        "<h2>The same pairs while training went on</h2>",
        make_picture_table(*_film(demonstration.work / "run" / "pictures")),
        "<h2>Training loss</h2>",
        _loss_curve(demonstration.metrics),
        *_data_section(demonstration.work / "shards"),
        "<h2>Where the time went</h2>",
        make_table(["Stage", "Time", "Throughput", "Command"], _stage_rows(demonstration)),
    ]
    page = make_page("Pose transfer on drawn persons", body, PAIRS_STYLE + _STYLE)
    with whole_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return markdown_table(header, rows)


def _introduce(demonstration: Demonstration) -> Iterator[str]:
    pairs = demonstration.held_out.pairs
    yield (
        f"<p>{len(pairs)} pairs of persons that training never saw: from one photo and the pose "
        "of another, the model makes the picture. A model that knew only poses would score the "
        "same with the photo of a wrong person; one that copied would miss the silhouette.</p>"
    )


def _held_out_rows(demonstration: Demonstration) -> list[list[UInt8[np.ndarray, "_ _ 3"]]]:
    held_out = demonstration.held_out
    step = max(1, len(held_out.pairs) // NUM_SHOWN)
    places = list(range(0, len(held_out.pairs), step))[:NUM_SHOWN]
    pairs = [held_out.pairs[place] for place in places]
    columns = [
        held_out.photos([pair.source for pair in pairs]),
        held_out.skeletons([pair.target for pair in pairs]),
        held_out.photos([pair.target for pair in pairs]),
        demonstration.generated[places],
        held_out.photos([pair.wrong_source for pair in pairs]),
        demonstration.wrongly_generated[places],
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _side_by_side(
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Join rows of pictures to one twice as large, half of the rows beside the other half."""
    half = len(rows) // 2
    cells = np.array([[*rows[number], *rows[half + number]] for number in range(half)])
    joined = rearrange(cells, "rows columns h w c -> (rows h) (columns w) c")
    return joined.repeat(2, axis=0).repeat(2, axis=1)


def _film(folder: Path) -> tuple[list[str], list[list[UInt8[np.ndarray, "_ _ 3"]]]]:
    """Return header and rows: source, pose, target, then what each saved step generated."""
    files = sorted(folder.glob("step-*.png"))
    header = ["source", "pose", "target"]
    rows: list[list[UInt8[np.ndarray, "_ _ 3"]]] = []
    for file in files:
        grid = decode_image(file.read_bytes())
        side = grid.shape[1] // 4
        cells = rearrange(grid, "(rows h) (columns w) c -> rows columns h w c", h=side, w=side)
        if not rows:
            rows = [list(row[:3]) for row in cells]
        for row, of_step in zip(rows, cells, strict=True):
            row.append(of_step[3])
        header.append(f"step {int(file.stem.partition('-')[2])}")
    return header, rows


def _loss_curve(metrics: Sequence[Mapping[str, float]]) -> str:
    """Draw the loss on a logarithmic scale: every step, and the mean of the 50 around it."""
    width, height = 760, 260
    steps = np.array([each["step"] for each in metrics])
    losses = np.array([each["loss"] for each in metrics])
    window = np.ones(min(50, len(losses)))
    counts = np.convolve(np.ones(len(losses)), window, "same")
    smooth = np.convolve(losses, window, "same") / counts
    low, high = math.floor(math.log10(losses.min())), math.ceil(math.log10(losses.max()))

    def path(values: np.ndarray) -> str:
        x = 50 + (width - 60) * steps / steps[-1]
        y = 10 + (height - 40) * (high - np.log10(values)) / max(1, high - low)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        return f"M{points}"

    ticks = []
    for power in range(low, high + 1):
        y = 10 + (height - 40) * (high - power) / max(1, high - low)
        ticks.append(
            f'<line x1="50" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="44" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    return (
        f'<svg role="img" aria-label="Training loss" {size}>'
        f'{"".join(ticks)}<path class="raw" d="{path(losses)}"/><path d="{path(smooth)}"/>'
        f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">step {steps[-1]:g}</text>'
        "</svg>"
    )


def _data_section(folder: Path) -> Iterator[str]:
    shards = open_shards(str(folder))
    yield from contact_sheets(
        shards, shards.read_index(COLUMNS), ["train"], ReportOptions(num_pairs=6)
    )


def _stage_rows(demonstration: Demonstration) -> list[list[str]]:
    num_images = count_images(demonstration.work / "shards")
    num_pairs = len(demonstration.held_out.pairs)
    last = demonstration.metrics[-1]
    # Two denoised images for each pair: the target, and the source once more.
    rate = float(np.median([each["images_per_s"] for each in demonstration.metrics])) / 2
    amounts = {
        "figures": (num_images, "images"),
        "shards": (num_images, "images"),
        "right": (num_pairs, "pictures"),
        "wrong": (num_pairs, "pictures"),
    }
    rows = []
    for name, record in demonstration.records.items():
        if name == "train":
            speed = f"{last['step']:g} steps, {rate:.1f} pairs/s"
        else:
            amount, unit = amounts[name]
            speed = f"{amount:,} {unit}, {amount / record.seconds:.1f} per s"
        rows.append([name, describe_seconds(record.seconds), speed, record.command])
    return rows


def _cells(scores: Mapping[str, float]) -> list[str]:
    return [f"{scores[name]:.2f}" if name == "psnr" else f"{scores[name]:.3f}" for name in SCORES]


def _finite(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
