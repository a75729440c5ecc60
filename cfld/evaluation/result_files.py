"""Generated images in a folder: which pair each file belongs to, and whether it can be scored."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cfld.evaluation.photo_source import IMAGE_EXTENSIONS, Pair, PhotoSource, stem
from cfld.images import decode_image

PATTERN = "{source}_2_{target}"

# How released result sets name their files, without the extension. SOURCE and TARGET may carry an
# extension of their own, as in PATN's "a.jpg___b.jpg_vis.png".
KNOWN_PATTERNS = {
    "{source}_2_{target}_vis": "GFLA, DPTN, NTED, PIDM and their heirs",
    "{source}___{target}_vis": "PATN and its heirs, often strips of five: --panel 5/5",
    "{source}_to_{target}": "PCDMs",
    PATTERN: "this project",
}

NUM_NAMES_SHOWN = 10

_GREYSCALE = "greyscale"
_OPAQUE = "RGB with an opaque alpha channel"
_TRANSPARENT = "transparent"
_UNREADABLE = "unreadable"


class ResultError(ValueError):
    """A folder of generated images that cannot be scored as it is; the message lists names."""


@dataclass(frozen=True)
class Panel:
    """One of several images that stand side by side in a file, counted from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Panel:
        """Read `K/N`.

        Raises:
            ValueError: If it is not 1 <= K <= N.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"{text!r} is no panel; give K/N, such as 5/5 for the last of five")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, kw_only=True)
class ResultFiles:
    """The files of a result set by pair, and the names of what does not fit."""

    folder: Path
    pattern: str
    files: Mapping[Pair, Path]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]


def find_results(folder: Path, targets: PhotoSource, pattern: str | None = None) -> ResultFiles:
    """Assign every image below a folder to its pair.

    Without `pattern` the one of `KNOWN_PATTERNS` that explains most files is taken. Names are cut
    where source and target are known photos, so that a separator inside a name does no harm.

    Raises:
        ResultError: If no file can be assigned, or two files belong to one pair.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_EXTENSIONS)
    if not paths:
        raise ResultError(f"{folder} holds no image ({', '.join(IMAGE_EXTENSIONS)})")
    sources = {source for source, _ in targets.pairs} if targets.pairs is not None else None
    assigned: dict[str, dict[Path, Pair]] = {
        each: _assign(paths, each, targets, sources)
        for each in ([pattern] if pattern else KNOWN_PATTERNS)
    }
    best = max(assigned, key=lambda each: len(assigned[each]))
    if not assigned[best]:
        raise ResultError(
            f"{folder}: no file name, such as {paths[0].name!r}, fits "
            f"{' or '.join(map(repr, assigned))} with a target of {targets.where}; describe the "
            "names with --pattern '{source}…{target}…'"
        )
    by_pair = defaultdict(list)
    for path, pair in assigned[best].items():
        by_pair[pair].append(path)
    if clashes := [paths for paths in by_pair.values() if len(paths) > 1]:
        names = [str(path.relative_to(folder)) for path in clashes[0]]
        raise ResultError(
            f"{folder}: {len(clashes)} pairs have more than one file, such as {names}; "
            "keep one of each"
        )
    expected = set(targets.pairs) if targets.pairs is not None else set(by_pair)
    strangers = [path for path in paths if assigned[best].get(path) not in expected]
    return ResultFiles(
        folder=folder,
        pattern=best,
        files={pair: by_pair[pair][0] for pair in sorted(by_pair) if pair in expected},
        missing=tuple(sorted(name_of(pair) for pair in expected.difference(by_pair))),
        surplus=tuple(str(path.relative_to(folder)) for path in strangers),
    )


def name_of(pair: Pair) -> str:
    """Return how this project names a pair's generated image, without extension."""
    return PATTERN.format(source=pair[0], target=pair[1])


def check_results(
    results: ResultFiles, size: tuple[int, int], panel: Panel, *, resize: bool, allow_missing: bool
) -> tuple[str, ...]:
    """Return what a report must mention about result files that can be scored at a size.

    Looks at every file's header, and at the pixels of alpha channels. Greyscale and wholly opaque
    images are taken as RGB. Sizes are (height, width) of the panel.

    Raises:
        ResultError: If some are unreadable, transparent, or without `resize` of another size, or
            without `allow_missing` missing or left over; it names them all.
    """
    paths = list(results.files.values())
    with ThreadPoolExecutor() as pool:
        headers = dict(zip(paths, pool.map(_inspect, paths), strict=True))
    names = {path: str(path.relative_to(results.folder)) for path in paths}
    of_kind: dict[str, list[str]] = defaultdict(list)
    of_size: dict[tuple[int, int], list[str]] = defaultdict(list)
    for path, header in headers.items():
        of_kind[header.kind].append(names[path])
        if header.kind != _UNREADABLE:
            of_size[(header.height, header.width // panel.count)].append(names[path])
    faults = []
    if unreadable := of_kind[_UNREADABLE]:
        faults.append(_listed("are no readable images", sorted(unreadable)))
    if transparent := of_kind[_TRANSPARENT]:
        faults.append(_listed("have transparent pixels; lay them over a background", transparent))
    wrong = {found: each for found, each in of_size.items() if found != size}
    if not resize:
        faults += [_listed(_size_hint(found, size), each) for found, each in wrong.items()]
    if not allow_missing:
        for kind, each in (("are missing", results.missing), ("fit no pair", results.surplus)):
            if each:
                faults.append(_listed(f"{kind}; --allow-missing scores the others", each))
    if faults:
        raise ResultError("\n".join(f"{results.folder}: {fault}" for fault in faults))
    notes = [
        f"{len(of_kind[kind])} generated images are {kind}; taken as RGB"
        for kind in (_GREYSCALE, _OPAQUE)
        if of_kind[kind]
    ]
    if wrong:
        count = sum(map(len, wrong.values()))
        notes.append(f"{count} generated images were resized from {sorted(wrong)}")
    return tuple(notes)


def read_panel(path: Path, panel: Panel) -> UInt8[np.ndarray, "height width 3"]:
    """Decode a result file and cut its panel out."""
    image = decode_image(path.read_bytes())
    width = image.shape[1] // panel.count
    return image[:, (panel.index - 1) * width : panel.index * width]


def _size_hint(found: tuple[int, int], size: tuple[int, int]) -> str:
    (height, width), count = found, found[1] // size[1]
    if height == size[0] and width == count * size[1]:
        return f"are strips of {count} images; --panel {count}/{count} takes the last"
    return f"are {height}x{width}, not {size[0]}x{size[1]}; --resize brings them there"


def _listed(what: str, names: Sequence[str]) -> str:
    shown = "".join(f"\n  {name}" for name in names[:NUM_NAMES_SHOWN])
    rest = len(names) - NUM_NAMES_SHOWN
    return f"{len(names)} {what}:{shown}" + (f"\n  … and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class _Header:
    height: int
    width: int
    kind: str


def _inspect(path: Path) -> _Header:
    try:
        with Image.open(path) as image:
            kind = "RGB"
            if image.has_transparency_data:
                opaque = image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
                kind = _OPAQUE if opaque else _TRANSPARENT
            elif image.mode in ("L", "1", "I", "I;16", "F"):
                kind = _GREYSCALE
            header = _Header(image.height, image.width, kind)
            # A truncated PNG fails its checksums; for other formats Pillow must decode to know.
            if image.format == "PNG" and kind not in (_OPAQUE, _TRANSPARENT):
                image.verify()
            else:
                image.load()
            return header
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return _Header(0, 0, _UNREADABLE)


def _assign(
    paths: list[Path], pattern: str, targets: PhotoSource, sources: set[str] | None
) -> dict[Path, Pair]:
    match = re.fullmatch(r"(.*)\{source\}(.+)\{target\}(.*)", _without_extension(pattern))
    if match is None:
        raise ResultError(f"pattern {pattern!r} needs {{source}}, something between, {{target}}")
    prefix, separator, suffix = match.groups()
    assigned = {}
    for path in paths:
        name = path.stem
        fits = name.startswith(prefix) and name.endswith(suffix)
        if not fits or len(name) <= len(prefix) + len(suffix):
            continue
        inner = name[len(prefix) : len(name) - len(suffix)]
        candidates = set()
        for cut in re.finditer(f"(?={re.escape(separator)})", inner):
            source = stem(inner[: cut.start()])
            source = targets.aliases.get(source, source)
            target = targets.aliases.get(stem(inner[cut.start() + len(separator) :]))
            if target is not None and (sources is None or source in sources):
                candidates.add((source, target))
        if len(candidates) > 1 and targets.pairs is not None:
            candidates &= set(targets.pairs)
        if len(candidates) > 1:
            raise ResultError(f"{path}: may be any of the pairs {sorted(candidates)}; rename it")
        if candidates:
            assigned[path] = candidates.pop()
    return assigned


def _without_extension(pattern: str) -> str:
    root, _, extension = pattern.rpartition(".")
    return root if f".{extension.lower()}" in IMAGE_EXTENSIONS else pattern
