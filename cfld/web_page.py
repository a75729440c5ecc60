"""Self-contained web pages: one file each, images inside, no script and no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from jaxtyping import UInt8

from cfld.images import encode_png

Picture = UInt8[np.ndarray, "_ _ 3"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1c2430; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d8dee6 }
th:first-child, td:first-child { text-align: left }
.pictures td, .pictures th { padding: 2px 4px; border: 0; text-align: center; font-weight: normal;
                             color: #566; font-size: 12px }
.pairs { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 16rem } figure img { width: 50% }
figcaption { font-size: 12px; color: #566; overflow-wrap: anywhere }
.note { background: #fff6dc; border-left: 4px solid #e0b040; padding: .4rem .8rem; margin: .5rem 0 }
"""


def make_page(title: str, body: Iterable[str], style: str = "") -> str:
    """Join a title (text) and a body (HTML) to a page; `style` adds rules to the common ones."""
    title = escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}{style}</style><body><h1>{title}</h1>{''.join(body)}</body></html>\n"
    )


def make_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; its cells are text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def make_picture_table(header: Sequence[str], rows: Iterable[Sequence[Picture]]) -> str:
    """Return a table of pictures under the titles of their columns."""
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td><img alt="{escape(title)}" src="{picture_uri(picture)}"></td>'
            for title, picture in zip(header, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="pictures"><tr>{head}</tr>{body}</table>'


def picture_uri(picture: Picture) -> str:
    """Return a picture as a PNG inside a URI that needs no other file."""
    return image_uri(encode_png(picture), "png")


def image_uri(data: bytes, image_format: str) -> str:
    """Return an encoded image (`png`, `jpeg`) as a URI that needs no other file."""
    return f"data:image/{image_format};base64,{base64.b64encode(data).decode()}"
