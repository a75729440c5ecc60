"""Draws a shard set as one web page: counts, pairs with their skeletons, distributions, rejects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, UInt8

from cfld.images import ImageError, decode_image, encode_jpeg, resize_image
from cfld.pose import JOINT_NAMES, draw_skeleton, is_found
from cfld.web_page import image_uri, make_page, make_table
from shards.format import FORMAT_VERSION, LATENT_SETTINGS, FormatError, ShardSet, keypoints_array

MAX_ROWS_PER_REASON = 8
MAX_IMAGES_PER_REASON = 6
MAX_BARS = 30  # what lies beyond is one more bar

COLUMNS = (
    "key", "name", "person", "split", "shard", "image_offset", "image_size", "height", "width",
    "keypoints", "num_people",
)  # fmt: skip
_DRAWN_HEIGHT = 256
_MAX_DRAWN_WIDTH = 384
_DRAWN_QUALITY = 80
_PHOTO_UNDER_SKELETON = 0.35
_NUM_THREADS = 8

STYLE = """
.pairs { align-items: flex-start }
figure { display: table; width: auto }
figcaption { display: table-caption; caption-side: bottom; line-height: 1.3 }
figure img { width: auto; height: 14rem; vertical-align: top }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem }
.text th, .text td { text-align: left; overflow-wrap: anywhere }
svg { font: 13px system-ui, sans-serif; max-width: 100% }
svg rect { fill: #4a7ab5 } svg .value { fill: #566 }
"""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """How many pairs to draw, of which split (None: all in equal shares), and which ones."""

    num_pairs: int = 24
    split: str | None = None
    seed: int = 0


def make_report(shards: ShardSet, title: str, options: ReportOptions) -> str:
    """Return the page. Of the shards, only the images that it shows are read.

    Raises:
        FormatError: If there is no such split, or an image that is to be shown is damaged.
    """
    manifest = shards.manifest
    if options.split is not None and options.split not in manifest.counts:
        raise FormatError(f"no split {options.split!r}; there are {', '.join(manifest.counts)}")
    splits = [options.split] if options.split is not None else list(manifest.counts)
    index = shards.read_index(COLUMNS)
    chosen = index.filter(pc.field("split").isin(pa.array(splits, pa.string())))
    body = [
        *_describe(shards),
        *contact_sheets(shards, index, splits, options),
        *_distributions(chosen, ", ".join(splits)),
        *_rejects(shards, index),
        "<h2>Settings</h2>",
        _text_table(["Setting", "Value"], _flatten(manifest.settings)),
    ]
    return make_page(title, body, STYLE)


def _describe(shards: ShardSet) -> list[str]:
    manifest = shards.manifest
    columns = ("images", "persons", "valid", "pairs")
    rows = [
        [split, *(f"{getattr(counts, column):,}" for column in columns)]
        for split, counts in manifest.counts.items()
    ]
    files = f"{len(manifest.shards):,} shards and {len(manifest.tables)} tables"
    sizes = [
        ["Dataset", manifest.dataset],
        ["Files", f"{files}, {manifest.size_bytes / 1e6:,.2f} MB in all"],
        ["Left out of the shards or of all pairs", f"{sum(manifest.rejects.values()):,}"],
        ["Latents", manifest.settings.get(LATENT_SETTINGS, {}).get("vae", "none")],
        ["Format", f"version {FORMAT_VERSION}"],
        ["Listing (sha256)", manifest.input_sha256],
    ]
    return [make_table(["Split", *columns], rows), "<p></p>", _text_table(["Set", ""], sizes)]


def _text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f'<div class="text">{make_table(header, rows)}</div>'


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield [f"{prefix}{name}", "none" if value is None else str(value)]


def contact_sheets(
    shards: ShardSet, index: pa.Table, splits: Sequence[str], options: ReportOptions
) -> Iterator[str]:
    """Yield the HTML of pairs with their skeletons, for a page with `STYLE`."""
    generator = np.random.default_rng(options.seed)
    pairs = shards.read_pairs()
    for number, split in enumerate(splits):
        of_split = pairs.filter(pc.field("split") == split)
        share = options.num_pairs * (number + 1) // len(splits)
        share -= options.num_pairs * number // len(splits)
        rows = generator.choice(
            of_split.num_rows, min(share, of_split.num_rows), replace=False, shuffle=False
        )
        sample = of_split.take(np.sort(rows))
        sides = sample["source"].to_numpy(), sample["target"].to_numpy()
        images = _draw_images(shards, index, np.stack(sides, axis=1).ravel())
        title = f"{sample.num_rows:,} of {of_split.num_rows:,} pairs of {split} (source, target)"
        yield f"<h2>{escape(title)}</h2>"
        figures = [
            _figure([source, target], [f"person {source.person}", source.name, target.name])
            for source, target in zip(images[::2], images[1::2], strict=True)
        ]
        yield f'<div class="pairs">{"".join(figures)}</div>'


@dataclass(frozen=True, kw_only=True)
class _DrawnImage:
    name: str
    person: str
    uri: str


def _draw_images(
    shards: ShardSet, index: pa.Table, rows: Int[np.ndarray, " images"]
) -> list[_DrawnImage]:
    """Read and draw some images; those of a remote set are fetched several at a time."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(partial(_draw_image, shards), index.take(rows).to_pylist()))


def _draw_image(shards: ShardSet, row: Mapping[str, Any]) -> _DrawnImage:
    keypoints = np.array(row["keypoints"], np.float32).reshape(-1, 3)
    try:
        photo = decode_image(shards.read_member(row, "image") or b"")
    except ImageError as error:
        raise FormatError(
            f"{shards.path(row['shard'])}: the image of sample {row['key']} is damaged ({error}); "
            "find what else is with 'python -m preprocessing.inspect_shards --verify'"
        ) from error
    frame = (row["height"], row["width"])
    scale = min(_DRAWN_HEIGHT / frame[0], _MAX_DRAWN_WIDTH / frame[1])
    size = (max(1, round(frame[0] * scale)), max(1, round(frame[1] * scale)))
    drawn = _lay_over(resize_image(photo, size), draw_skeleton(keypoints, frame, size))
    uri = image_uri(encode_jpeg(drawn, _DRAWN_QUALITY), "jpeg")
    return _DrawnImage(name=row["name"], person=row["person"], uri=uri)


def _lay_over(
    photo: UInt8[np.ndarray, "height width 3"], skeleton: UInt8[np.ndarray, "height width 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    is_drawn = skeleton.any(axis=2, keepdims=True)
    mixed = skeleton + _PHOTO_UNDER_SKELETON * photo
    return np.where(is_drawn, mixed.clip(0, 255), photo).astype(np.uint8)


def _figure(images: Sequence[_DrawnImage], caption: Sequence[str]) -> str:
    tags = "".join(f'<img alt="{escape(image.name)}" src="{image.uri}">' for image in images)
    lines = "<br>".join(escape(line) for line in caption)
    return f"<figure>{tags}<figcaption>{lines}</figcaption></figure>"


def _distributions(images: pa.Table, splits: str) -> Iterator[str]:
    yield f"<h2>Images per person ({escape(splits)})</h2>"
    sizes = images.group_by(["split", "person"]).aggregate([([], "count_all")])["count_all"]
    yield _count_chart("Images per person", sizes.to_numpy(), first=1)
    yield f"<h2>Images in which a joint is missing ({escape(splits)})</h2>"
    missing = (~is_found(keypoints_array(images))).sum(axis=0)
    total = max(1, images.num_rows)
    yield _bar_chart(
        "Missing joints",
        [name.replace("_", " ") for name in JOINT_NAMES],
        missing.tolist(),
        [f"{count:,} ({count / total:.1%})" for count in missing.tolist()],
    )
    yield f"<h2>People that the pose network saw in an image ({escape(splits)})</h2>"
    seen = images["num_people"].drop_null().to_numpy()
    if unseen := images["num_people"].null_count:
        yield f'<p class="note">{unseen:,} images were not shown to it: their keypoints are given.'
        yield " The chart leaves them out.</p>"
    if len(seen):
        yield _count_chart("People in an image", seen, first=0)


def _count_chart(title: str, values: Int[np.ndarray, " n"], first: int) -> str:
    """Draw how often each value occurs, from `first` on."""
    last = min(int(values.max(initial=first)), first + MAX_BARS)
    counts = np.bincount(values.clip(first, last) - first, minlength=last - first + 1).tolist()
    labels = [str(value) for value in range(first, last + 1)]
    if values.max(initial=first) > last:
        labels[-1] += " or more"
    return _bar_chart(title, labels, counts, [f"{count:,}" for count in counts])


def _bar_chart(
    title: str, labels: Sequence[str], counts: Sequence[int], values: Sequence[str]
) -> str:
    """Return horizontal bars as SVG; `values` are written behind them."""
    longest = max(*counts, 1)
    bars = []
    for number, (label, count, value) in enumerate(zip(labels, counts, values, strict=True)):
        length = 420 * count / longest
        bars.append(
            f'<g transform="translate(0 {20 * number})"><text x="130" y="14" text-anchor="end">'
            f'{escape(label)}</text><rect x="140" y="2" width="{length:.1f}" height="16"/>'
            f'<text class="value" x="{146 + length:.1f}" y="14">{escape(value)}</text></g>'
        )
    height = 20 * len(bars)
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 700 {height}" width="700" '
        f'height="{height}">{"".join(bars)}</svg>'
    )


def _rejects(shards: ShardSet, index: pa.Table) -> Iterator[str]:
    yield "<h2>Left out of the shards or of all pairs</h2>"
    rejects = shards.read_rejects()
    if not rejects.num_rows:
        yield "<p>Nothing.</p>"
        return
    rows = [
        [reason, f"{count:,}", f"{_num_stored(rejects, reason):,}"]
        for reason, count in shards.manifest.rejects.items()
    ]
    yield make_table(["Reason", "count", "of them stored, but in no pair"], rows)
    for reason in shards.manifest.rejects:
        of_reason = rejects.filter(pc.field("reason") == reason)
        first = of_reason.slice(0, MAX_ROWS_PER_REASON).to_pylist()
        yield f"<h3>{escape(reason)}: {len(first)} of {of_reason.num_rows:,}</h3>"
        cells = [[row["path"], row["name"] or "", row["stage"], row["detail"]] for row in first]
        yield _text_table(["Path", "Name", "Stage", "Detail"], cells)
        stored = of_reason.filter(pc.field("is_stored"))["name"].slice(0, MAX_IMAGES_PER_REASON)
        places = pc.index_in(stored, index["name"]).drop_null().to_numpy()
        images = _draw_images(shards, index, places)
        figures = "".join(_figure([image], [image.name]) for image in images)
        yield f'<div class="pairs">{figures}</div>'


def _num_stored(rejects: pa.Table, reason: str) -> int:
    is_counted = (pc.field("reason") == reason) & pc.field("is_stored")
    return int(rejects.filter(is_counted).num_rows)
