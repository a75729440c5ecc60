"""The paper's user study (CFLD Sec. 4.4): make its web pages, score the answers they give."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import logging
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from cfld.command import make_parser, positive, run_command, seed
from cfld.evaluation.paper_tables import markdown_table
from cfld.evaluation.photo_source import Pair, PhotoSource, SourceError, open_photos
from cfld.evaluation.result_files import Panel, ResultError, ResultFiles, find_results, read_panel
from cfld.evaluation.scoring import Pixels, protocol_target
from cfld.web_page import picture_uri
from cfld.whole_file import whole_file

logger = logging.getLogger("cfld.user_study")  # run as a command, __name__ is another

ANSWERS_FORMAT = "cfld-user-study"
ANSWERS_VERSION = 1
MAX_METHODS = 9  # one digit key each
REAL = "real"
GENERATED = "generated"

_TEMPLATE = Path(__file__).with_suffix(".html")
_EXAMPLE = """\
example:
  python -m cfld.user_study make --generated CFLD=results/CFLD PIDM=results/PIDM \\
      --real data/test_highres --output study
  python -m cfld.user_study score answers/*.json

Each page of the study is one file. Give every volunteer one real-or-generated page, so that he
sees one method only, and best-match.html. Answers stay in the browser until they are saved."""


class StudyError(ValueError):
    """Images or answers that no study can be made of."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How often something was chosen, with its 95 % Wilson interval."""

    metric: str
    method: str
    num_chosen: int
    num_judged: int

    @property
    def value(self) -> float:
        """The share that was chosen."""
        return self.num_chosen / self.num_judged

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the interval."""
        bounds = binomtest(self.num_chosen, self.num_judged).proportion_ci(method="wilson")
        return float(bounds.low), float(bounds.high)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study is made of: result sets by method, real photos, how many, the images' size."""

    methods: Mapping[str, ResultFiles]
    real: PhotoSource
    num_images: int
    size: tuple[int, int]
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Page:
    """What a page shows and, for scoring, which item or choice is what."""

    task: str
    items: list[dict[str, Any]]
    truth: dict[str, Any]


def make_study(study: Study, output: Path) -> list[str]:
    """Write the pages into a folder and return their names; the same study gives the same bytes.

    R2G and G2R: a page per method with as many generated as real images, in random order. The
    generated pairs are the same for all methods. Jab: a page on which the methods' images of a pair
    stand in random order beside the ground truth. `key.json` tells which page shows which method.

    Raises:
        StudyError: If the methods have too few pairs in common, or there are too few photos.
    """
    generator = np.random.default_rng(study.seed)
    pairs, photos = _choose(study, generator)
    identity = hashlib.sha256(repr((study.seed, sorted(study.methods), pairs, photos)).encode())
    study_id = identity.hexdigest()[:16]
    methods = [str(name) for name in generator.permutation(sorted(study.methods))]
    pages = {
        f"real-or-generated-{number}": _real_or_generated(study, method, pairs, photos, generator)
        for number, method in enumerate(methods, 1)
    }
    if len(methods) > 1:
        pages["best-match"] = _best_match(study, methods, pairs, generator)
    for name, page in pages.items():
        data = {"study": study_id, "page": name, "task": page.task, "items": page.items}
        text = json.dumps(data | {"seal": _seal(page.truth)}).replace("</", "<\\/")
        html = _TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)
        with whole_file(output / f"{name}.html") as unfinished:
            unfinished.write_text(html, encoding="utf-8")
    shows = {name: page.truth.get("method", methods) for name, page in pages.items()}
    document = {"study": study_id, "seed": study.seed, "pages": shows, "pairs": pairs}
    with whole_file(output / "key.json") as unfinished:
        unfinished.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return list(pages)


def score_answers(documents: Mapping[str, Any]) -> list[Rate]:
    """Return R2G, G2R and Jab of each method from answer documents, given by where they came from.

    Raises:
        StudyError: If a document is no answer file, is given twice, or of another study.
    """
    chosen: Counter[tuple[str, str]] = Counter()
    judged: Counter[tuple[str, str]] = Counter()
    seen: dict[tuple[str, str], str] = {}
    studies: dict[str, str] = {}
    for where, document in documents.items():
        truth = _check_answers(where, document)
        studies.setdefault(document["study"], where)
        person = (document["participant"], document["page"])
        if person in seen:
            raise StudyError(f"{where}: the same answers as {seen[person]}; give each once")
        seen[person] = where
        if "method" in truth:
            for real, answer in zip(truth["truth"], document["answers"], strict=False):
                metric = "R2G" if real == REAL else "G2R"
                judged[metric, truth["method"]] += 1
                chosen[metric, truth["method"]] += answer != real
        else:
            for order, answer in zip(truth["methods"], document["answers"], strict=False):
                judged.update(("Jab", method) for method in order)
                chosen["Jab", order[answer]] += 1
    if len(studies) > 1:
        raise StudyError(f"answers to {len(studies)} different studies: {sorted(studies.values())}")
    return [
        Rate(metric=metric, method=method, num_chosen=chosen[metric, method], num_judged=num)
        for (metric, method), num in sorted(judged.items())
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = _parse(arguments)
    work = _make if args.command == "make" else _score
    return run_command(lambda: work(args), StudyError, SourceError, ResultError)


def _make(args: argparse.Namespace) -> int:
    real = open_photos(str(args.real))
    folders = dict(_method(each) for each in args.generated)
    if len(folders) < len(args.generated) or len(folders) > MAX_METHODS:
        raise StudyError(f"--generated needs 1 to {MAX_METHODS} methods of different names")
    study = Study(
        methods={name: find_results(path, real, args.pattern) for name, path in folders.items()},
        real=real,
        num_images=args.num_images,
        size=(args.size[0], args.size[1]),
        seed=args.seed,
    )
    pages = make_study(study, args.output)
    sys.stdout.write("".join(f"{args.output / page}.html\n" for page in pages))
    return 0


def _score(args: argparse.Namespace) -> int:
    rates = score_answers({str(path): _read_json(path) for path in args.answers})
    rows = [
        [f"{rate.metric} {rate.method}", f"{100 * rate.value:.1f} %",
         "{:.1f} to {:.1f} %".format(*(100 * bound for bound in rate.interval)),
         f"{rate.num_chosen}/{rate.num_judged}"]
        for rate in rates
    ]  # fmt: skip
    sys.stdout.write(markdown_table(["metric", "value", "95 % interval", "count"], rows))
    if args.output is not None:
        scores = [asdict(rate) | {"value": rate.value, "interval": rate.interval} for rate in rates]
        with whole_file(args.output) as unfinished:
            unfinished.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return 0


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: no answer file ({error})") from error


def _choose(study: Study, generator: np.random.Generator) -> tuple[list[Pair], list[str]]:
    """Draw pairs that all methods have, of different targets, and photos that no pair shows."""
    common = sorted(set.intersection(*(set(each.files) for each in study.methods.values())))
    by_target = {common[i][1]: common[i] for i in generator.permutation(len(common))}
    pairs = list(by_target.values())[: study.num_images]
    if len(pairs) < study.num_images:
        raise StudyError(
            f"{' and '.join(study.methods)} have images of {len(pairs)} common targets, "
            f"{study.num_images} are needed; lower --num-images"
        )
    shown = {pair[1] for pair in pairs}
    others = [name for name in sorted(study.real.places) if name not in shown]
    if len(others) < study.num_images:
        raise StudyError(
            f"{study.real.where} has {len(others)} photos beside the {len(pairs)} targets, "
            f"{study.num_images} are needed; lower --num-images"
        )
    return pairs, [others[i] for i in generator.permutation(len(others))[: study.num_images]]


def _real_or_generated(
    study: Study,
    method: str,
    pairs: Sequence[Pair],
    photos: Sequence[str],
    generator: np.random.Generator,
) -> _Page:
    items: list[tuple[str, Pixels]] = [(REAL, _photo(study, name)) for name in photos]
    items += [(GENERATED, _generated(study, method, pair)) for pair in pairs]
    shuffled = [items[i] for i in generator.permutation(len(items))]
    return _Page(
        task="real_or_generated",
        items=[{"images": [picture_uri(image)]} for _, image in shuffled],
        truth={"method": method, "truth": [kind for kind, _ in shuffled]},
    )


def _best_match(
    study: Study, methods: Sequence[str], pairs: Sequence[Pair], generator: np.random.Generator
) -> _Page:
    orders = [[methods[i] for i in generator.permutation(len(methods))] for _ in pairs]
    return _Page(
        task="best_match",
        items=[
            {
                "target": picture_uri(_photo(study, pair[1])),
                "images": [picture_uri(_generated(study, method, pair)) for method in order],
            }
            for pair, order in zip(pairs, orders, strict=True)
        ],
        truth={"methods": orders},
    )


def _photo(study: Study, name: str) -> Pixels:
    return protocol_target(study.real, name, study.size)


def _generated(study: Study, method: str, pair: Pair) -> Pixels:
    image = Image.fromarray(read_panel(study.methods[method].files[pair], Panel()))
    return np.asarray(image.resize((study.size[1], study.size[0]), Image.Resampling.BICUBIC))


def _seal(document: Any) -> str:
    """Make the truth unreadable at a glance, so that nobody reads it from a page by accident."""
    return base64.b64encode(zlib.compress(json.dumps(document).encode())).decode()


def _check_answers(where: str, document: Any) -> dict[str, Any]:
    """Check one answer document against the truth that it carries, and return that."""
    names = {"study", "page", "participant", "answers", "seal"}
    header = {"format": ANSWERS_FORMAT, "version": ANSWERS_VERSION}
    if not isinstance(document, dict) or document.keys() != names | header.keys():
        raise StudyError(f"{where}: no answer file of a user study")
    if any(document[name] != value for name, value in header.items()):
        raise StudyError(f"{where}: its format is not {ANSWERS_FORMAT} {ANSWERS_VERSION}")
    try:
        truth: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(document["seal"])))
    except (ValueError, TypeError, zlib.error) as error:
        raise StudyError(f"{where}: its seal is damaged; save the answers again") from error
    answers, expected = document["answers"], truth.get("truth") or truth["methods"]
    allowed = [REAL, GENERATED] if "truth" in truth else list(range(len(truth["methods"][0])))
    if len(answers) > len(expected) or not all(answer in allowed for answer in answers):
        raise StudyError(f"{where}: its answers do not fit its questions")
    if len(answers) < len(expected):
        logger.warning("%s: %d of %d questions answered", where, len(answers), len(expected))
    return truth


def _method(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and Path(path).is_dir()):
        raise StudyError(f"--generated {text}: give NAME=DIR with a folder that exists")
    return name, Path(path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("cfld.user_study", __doc__, _EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make the web pages")
    make.add_argument("--generated", nargs="+", required=True, metavar="NAME=DIR")
    make.add_argument("--real", type=Path, required=True, metavar="DIR", help="real photos")
    make.add_argument("--output", type=Path, required=True, metavar="DIR")
    make.add_argument("--pattern", help="how files are named, such as '{source}_to_{target}.png'")
    make.add_argument(
        "--num-images", type=positive, default=30, help="of each kind (default: %(default)s)"
    )
    make.add_argument(
        "--size", type=positive, nargs=2, default=[256, 176], metavar=("HEIGHT", "WIDTH")
    )
    make.add_argument("--seed", type=seed, default=0, metavar="N")
    score = commands.add_parser("score", help="print R2G, G2R and Jab of answer files")
    score.add_argument("answers", nargs="+", type=Path, metavar="ANSWERS")
    score.add_argument("--output", type=Path, metavar="FILE", help="write the scores as JSON too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
