"""The report of --check: what is there, what is missing, beside the published counts."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocessing.check import check
from preprocessing.datasets import DATASETS, deepfashion
from preprocessing.listing import Dataset, Photo, Reject


def value(report: str, name: str) -> list[str]:
    """A row of the table: found, published, verdict."""
    (line,) = [line for line in report.splitlines() if line.startswith(f"{name}  ")]
    return line.removeprefix(name).split(maxsplit=2)


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def small() -> Dataset:
    def list_photos(root: str) -> Iterator[Photo | Reject]:
        for person, num_images in (("ann", 3), ("bob", 1), ("0000", 2)):
            for number in range(num_images):
                name = f"{person}{number}.jpg"
                is_pairable = person != "0000"
                yield Photo(
                    path=name, name=name, person=person, split="train", is_pairable=is_pairable
                )
        yield Reject(path="x.jpg", stage="listing", reason="malformed_name", detail="odd")
        yield Reject(path="y.jpg", stage="listing", reason="malformed_name")

    expected = {
        "images": 6,
        "train persons": 3,
        "train persons with a single image": 0,
        "test images": 4,
    }
    return Dataset(list_photos=list_photos, expected=expected, access="Ask nicely.")


def test_counts_stand_beside_the_published_ones(small: Dataset) -> None:
    report = check(small, "/data").report
    assert value(report, "images") == ["6", "6", "complete"]
    assert value(report, "train persons") == ["2", "3", "1 missing"]
    assert value(report, "train persons with a single image") == ["1", "0", "1 more"]
    assert value(report, "test images") == ["-", "4", "missing"]
    assert value(report, "train pairs before the keypoint filter") == ["6", "-"]
    assert value(report, "train images without a person to pair") == ["2", "-"]


def test_rejects_are_counted_by_reason_with_an_example(small: Dataset) -> None:
    assert "left out as malformed_name: 2, the first is x.jpg odd\n" in check(small, "/data").report


def test_the_report_says_where_to_get_the_data(small: Dataset) -> None:
    assert check(small, "/data").report.endswith("\n\nAsk nicely.\n")


@pytest.mark.parametrize("name", DATASETS)
def test_a_wrong_root_is_a_report(name: str, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        report = check(DATASETS[name], str(root)).report
        assert f"{root}: " in report
        assert DATASETS[name].access in report


def test_partial_deepfashion_says_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    image = tmp_path / "img_highres" / "MEN" / "Denim" / "id_00000080" / "01_1_front.jpg"
    image.parent.mkdir(parents=True)
    image.touch()
    report = check(DATASETS["deepfashion"], str(tmp_path)).report
    assert (
        f"found 1 files in {tmp_path}/img_highres; missing: train.lst (or .lst.gz); test.lst"
        in (report)
    )
    assert value(report, "images") == ["-", "52,712", "missing"]

    name = "fashionMENDenimid0000008001_1front.jpg"
    (tmp_path / "train.lst").write_text(f"{name}\nfashionMENDenimid0000008001_3back.jpg\n")
    (tmp_path / "test.lst").write_text("")
    (tmp_path / "fashion-resize-pairs-train.csv").write_text(
        f"from,to\n{name},{name}\n{name},gone.jpg\n{name}\n"
    )
    (tmp_path / "fashion-resize-annotation-train.csv").write_text(
        f"name:keypoints_y:keypoints_x\n{name}: [1]: [1]\n"
    )
    before = files(tmp_path)
    report = check(DATASETS["deepfashion"], str(tmp_path)).report
    assert value(report, "train images") == ["1", "48,674", "48,673 missing"]
    assert value(report, "train published pairs") == ["2", "101,966", "101,964 missing"]
    assert value(report, "test published pairs") == ["-", "8,570", "missing"]
    assert f"published keypoints: 1 in {tmp_path}/fashion-resize-annotation-train.csv" in report
    assert f"published pairs: 1 of {tmp_path}/fashion-resize-pairs-train.csv name an" in report
    assert "published pairs: 1 rows of " in report
    assert "left out as missing_image: 1, the first is " in report
    assert files(tmp_path) == before


def test_partial_market_is_compared_with_its_published_counts(tmp_path: Path) -> None:
    folder = tmp_path / "bounding_box_train"
    folder.mkdir()
    for name in ("0002_c1s1_000451_03.jpg", "0002_c2s1_000301_01.jpg"):
        (folder / name).touch()
    report = check(DATASETS["market1501"], str(tmp_path)).report
    assert value(report, "train images") == ["2", "12,936", "12,934 missing"]
    assert value(report, "train published pairs") == ["-", "263,632", "missing"]
    assert value(report, "test images") == ["-", "19,732", "missing"]
    assert value(report, "query images") == ["-", "3,368", "missing"]
    assert "published keypoints: none here; the pose network finds them" in report


def test_a_folder_of_persons_has_no_published_counts(tmp_path: Path) -> None:
    for name in ("bob/1.jpg", "bob/2.jpg", "bob/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    report = check(DATASETS["folder"], str(tmp_path)).report
    assert value(report, "train pairs before the keypoint filter") == ["2"]
    assert "published" not in report
    assert "left out as not_an_image: 1" in report


def test_all_deepfashion_names_give_the_published_counts(tmp_path: Path, shared_dir: Path) -> None:
    for split in ("train", "test"):
        lines = (shared_dir / "data" / "deepfashion" / f"{split}.lst.gz").read_bytes()
        (tmp_path / f"{split}.lst.gz").write_bytes(lines)
        folder = tmp_path / f"{split}_highres"
        folder.mkdir()
        for name in gzip.decompress(lines).decode().split():
            (folder / name).touch()
    report = check(deepfashion.DATASET, str(tmp_path)).report
    counts = [name for name in deepfashion.DATASET.expected if "published" not in name]
    assert len(counts) == 9
    assert all(value(report, name)[2] == "complete" for name in counts)
    assert value(report, "train pairs before the keypoint filter")[0] == "154,758"
    assert value(report, "test pairs before the keypoint filter")[0] == "12,860"
    assert "left out" not in report
