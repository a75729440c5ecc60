"""The adapter that README shows under "Adding a dataset" works as it stands there."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from preprocessing.check import check
from preprocessing.listing import Dataset, Photo, Reject

README = Path(__file__).resolve().parents[2] / "README.md"
HEADING = "## Adding a dataset"


def shown_adapter() -> str:
    section = README.read_text(encoding="utf-8").partition(f"\n{HEADING}\n")[2]
    match = re.search(r"^```python\n(.*?)^```$", section.partition("\n## ")[0], re.DOTALL | re.M)
    assert match, f"README.md shows no adapter under {HEADING!r}"
    return match[1]


def load(code: str, path: Path) -> ModuleType:
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = load(shown_adapter(), tmp_path / "street.py").DATASET
    assert isinstance(dataset, Dataset)
    return dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "street"
    (root / "images").mkdir(parents=True)
    for name in ("anna-front.jpg", "anna-back.jpg", "li-wei-front.jpg", "Thumbs.db", "plan.pdf"):
        (root / "images" / name).touch()
    (root / "test_persons.txt").write_text("li-wei\n")
    return root


def test_it_lists_photos_and_rejects(dataset: Dataset, root: Path) -> None:
    items = list(dataset.list_photos(str(root)))
    photos = [item for item in items if isinstance(item, Photo)]
    assert [(photo.name, photo.person, photo.split, photo.view) for photo in photos] == [
        ("anna-back.jpg", "anna", "train", "back"),
        ("anna-front.jpg", "anna", "train", "front"),
        ("li-wei-front.jpg", "li-wei", "test", "front"),
    ]
    assert all(Path(photo.path).is_file() for photo in photos)
    (reject,) = [item for item in items if isinstance(item, Reject)]
    assert (reject.path, reject.reason) == (f"{root}/images/plan.pdf", "malformed_name")


def test_a_wrong_root_is_an_error(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no test_persons\.txt"):
        list(dataset.list_photos(str(tmp_path)))


def test_it_can_be_checked(dataset: Dataset, root: Path) -> None:
    assert "train images" in check(dataset, str(root)).report


def test_it_is_about_thirty_lines() -> None:
    assert len(shown_adapter().splitlines()) < 45
