"""The paper's tables of scores (CFLD Tables 2 to 5), and ours beside them in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# What the paper calls a score and what we call it.
COLUMNS = {"FID": "fid_paper", "LPIPS": "lpips", "SSIM": "ssim_paper", "PSNR": "psnr"}
_THREE_DIGITS = ("fid_paper", "fid", "psnr")  # the others have four

GROUND_TRUTH = "Ground truth"
VAE_RECONSTRUCTION = "VAE reconstruction"
OURS = "This run"

_INF = float("inf")


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """One table: for each row a label and its values under `columns`, None where none is given.

    `dataset` is what our shards call the photos.
    """

    title: str
    dataset: str = "deepfashion"
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float | None, ...]]


_FOUR = ("FID", "LPIPS", "SSIM", "PSNR")

TABLE_2_256 = PaperTable(
    title="DeepFashion, 256x176 (CFLD Table 2)",
    columns=_FOUR,
    rows={
        "PATN": (20.728, 0.2533, 0.6714, None),
        "ADGAN": (14.540, 0.2255, 0.6735, None),
        "GFLA": (9.827, 0.1878, 0.7082, None),
        "PISE": (11.518, 0.2244, 0.6537, None),
        "SPGNet": (16.184, 0.2256, 0.6965, 17.222),
        "DPTN": (17.419, 0.2093, 0.6975, 17.811),
        "NTED": (8.517, 0.1770, 0.7156, 17.740),
        "CASD": (13.137, 0.1781, 0.7224, 17.880),
        "PIDM, first row": (6.812, 0.2006, 0.6621, 15.630),
        "PIDM, second row": (6.440, 0.1686, 0.7109, 17.399),
        "PoCoLD": (8.067, 0.1642, 0.7310, None),
        "CFLD": (6.804, 0.1519, 0.7378, 18.235),
        VAE_RECONSTRUCTION: (7.967, 0.0104, 0.9660, 33.515),
        GROUND_TRUTH: (7.847, 0.0, 1.0, _INF),
    },
)
TABLE_2_512 = PaperTable(
    title="DeepFashion, 512x352 (CFLD Table 2)",
    columns=_FOUR,
    rows={
        "CoCosNet2": (13.325, 0.2265, 0.7236, None),
        "NTED": (7.645, 0.1999, 0.7359, 17.385),
        "PoCoLD": (8.416, 0.1920, 0.7430, None),
        "CFLD": (7.149, 0.1819, 0.7478, 17.645),
        VAE_RECONSTRUCTION: (8.187, 0.0217, 0.9231, 30.214),
        GROUND_TRUTH: (8.010, 0.0, 1.0, _INF),
    },
)
TABLE_3 = PaperTable(
    title="Ablations (CFLD Table 3)",
    columns=("LPIPS", "SSIM"),
    rows={
        "B1": (0.2018, 0.6959),
        "B2": (0.2099, 0.6944),
        "B3": (0.1615, 0.7293),
        "B4": (0.1742, 0.7198),
        "B5": (0.1912, 0.7038),
        "CFLD": (0.1519, 0.7378),
    },
)
TABLE_4 = PaperTable(
    title="Market-1501, 128x64 (CFLD Table 4)",
    dataset="market1501",
    columns=_FOUR,
    rows={
        "GFLA": (19.740, 0.2815, 0.2808, 14.337),
        "XingGAN": (22.520, 0.3058, 0.3044, 14.446),
        "SPGNet": (23.057, 0.2777, 0.3139, 14.489),
        "DPTN": (18.995, 0.2711, 0.2854, 14.521),
        "CFLD": (11.972, 0.2636, 0.3173, 14.861),
        VAE_RECONSTRUCTION: (6.028, 0.0164, 0.9883, 36.625),
        GROUND_TRUTH: (4.845, 0.0, 1.0, _INF),
    },
)
TABLE_5 = PaperTable(
    title="Guidance (CFLD Table 5)",
    columns=_FOUR,
    rows={
        "disabled, 1.0, 1.0": (8.143, 0.2000, 0.7055, 15.753),
        "appearance only, 1.0, 2.0": (8.334, 0.1921, 0.7131, 16.429),
        "pose only, 2.0, 1.0": (7.580, 0.1770, 0.7256, 17.611),
        "both, 2.0, 2.0": (6.804, 0.1519, 0.7378, 18.235),
        "both, 3.0, 3.0": (7.423, 0.1746, 0.7250, 17.706),
    },
)

# The table to compare with when scoring at a size (height, width).
TABLE_OF_SIZE = {(256, 176): TABLE_2_256, (512, 352): TABLE_2_512, (128, 64): TABLE_4}


def compare(
    table: PaperTable, ours: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of a table with our scores in a column beside each of the paper's.

    `ours` holds scores by our metric names, by row label; labels the paper lacks become rows of
    their own at the end.
    """
    header = ["Method"]
    for column in table.columns:
        header += [f"{column}, paper", f"{column}, ours"]
    labels = [*table.rows, *(label for label in ours if label not in table.rows)]
    rows = []
    for label in labels:
        cells = [label]
        for i, column in enumerate(table.columns):
            metric = COLUMNS[column]
            paper = table.rows[label][i] if label in table.rows else None
            cells += [
                format_score(metric, paper),
                format_score(metric, ours.get(label, {}).get(metric)),
            ]
        rows.append(cells)
    return header, rows


def format_score(metric: str, value: float | None) -> str:
    """Return a score with the paper's number of digits; empty for None."""
    if value is None:
        return ""
    return "∞" if value == _INF else f"{value:.{3 if metric in _THREE_DIGITS else 4}f}"


def format_interval(metric: str, low: float | None, high: float | None) -> str:
    """Return the bounds of a score; empty for None."""
    return "" if low is None else f"{format_score(metric, low)} to {format_score(metric, high)}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
