import hashlib
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from preprocessing import draw_figures
from preprocessing.datasets import table
from preprocessing.datasets.synthetic import DATASET, list_photos
from preprocessing.figures import draw_figure
from preprocessing.figures.drawn_set import FigureSettings, SettingsMismatchError, draw_dataset

SMALL = FigureSettings(
    num_persons=4, num_test_persons=2, images_per_person=2, size=(48, 32), seed=3
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A small drawn set; not to be changed."""
    root = tmp_path_factory.mktemp("drawn") / "set"
    draw_dataset(str(root), SMALL, num_workers=1)
    return root


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_photos_are_listed_with_exact_keypoints(drawn):
    photos = list(DATASET.list_photos(str(drawn)))
    assert len(photos) == 12
    assert len({photo.name for photo in photos}) == 12
    train = {photo.person for photo in photos if photo.split == "train"}
    test = {photo.person for photo in photos if photo.split == "test"}
    assert (len(train), len(test)) == (4, 2)
    assert not train & test
    for photo in photos:
        person, image = int(photo.person), int(Path(photo.path).stem)
        figure = draw_figure(person, image, size=(48, 32), seed=3)
        np.testing.assert_array_equal(photo.keypoints, figure.keypoints)
        assert photo.keypoints.dtype == np.float32
        assert photo.view == figure.view
        np.testing.assert_array_equal(np.array(Image.open(photo.path)), figure.image)
        regions = np.array(Image.open(drawn / "regions" / photo.name))
        np.testing.assert_array_equal(regions, figure.regions)


def test_the_table_adapter_reads_it_too(drawn):
    photos = {photo.name: photo for photo in list_photos(str(drawn))}
    rows = list(table.list_photos(str(drawn)))
    assert len(rows) == len(photos)
    for row in rows:
        photo = photos[row.name]
        assert (row.person, row.split) == (photo.person, photo.split)
        np.testing.assert_array_equal(row.keypoints, photo.keypoints)


def test_bytes_do_not_depend_on_the_number_of_processes(drawn, tmp_path):
    draw_dataset(str(tmp_path / "set"), SMALL, num_workers=2)
    assert digests(tmp_path / "set") == digests(drawn)


def test_an_interrupted_set_is_completed(drawn, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(drawn, root)
    # As a kill leaves it: one person begun, one with regions only, one missing.
    unfinished = root / ".drawing"
    (unfinished / "0000002" / "images").mkdir(parents=True)
    (unfinished / "0000002" / "images" / "00.png").write_bytes(b"half a picture")
    (root / "figures.json").rename(unfinished / "figures.json")
    (root / "figures.parquet").unlink()
    for person in ("train/0000001", "train/0000002", "regions/train/0000002"):
        shutil.rmtree(root / person)
    with pytest.raises(FileNotFoundError, match=r"figures\.json is missing"):
        list_photos(str(root))
    draw_dataset(str(root), SMALL, num_workers=1)
    assert digests(root) == digests(drawn)


def test_a_complete_set_is_left_alone(drawn):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    draw_dataset(str(drawn), SMALL)
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before


def test_test_persons_are_the_same_in_every_set(drawn, tmp_path):
    draw_dataset(
        str(tmp_path / "set"),
        FigureSettings(
            num_persons=0, num_test_persons=2, images_per_person=2, size=(48, 32), seed=3
        ),
        num_workers=1,
    )
    test = {name: digest for name, digest in digests(drawn).items() if "test/" in name}
    mine = digests(tmp_path / "set")
    assert len(test) == 8
    assert test.items() <= mine.items()


def test_other_settings_need_another_folder(drawn, tmp_path):
    other = FigureSettings(num_persons=5)
    with pytest.raises(SettingsMismatchError, match=r"num_persons=4.*not.*num_persons=5"):
        draw_dataset(str(drawn), other)
    (tmp_path / ".drawing").mkdir()
    shutil.copy(drawn / "figures.json", tmp_path / ".drawing")
    with pytest.raises(SettingsMismatchError, match="choose another folder or delete"):
        draw_dataset(str(tmp_path), other)


def test_a_folder_of_something_else_is_never_drawn_into(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(SettingsMismatchError, match="not empty and not a set"):
        draw_dataset(str(tmp_path), SMALL)
    (tmp_path / "figures.json").write_text(json.dumps({"dpi": 300}))
    with pytest.raises(SettingsMismatchError, match="is not of drawn figures"):
        draw_dataset(str(tmp_path), SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "photo.jpg"]


def test_a_drawn_set_may_lie_in_a_store(drawn):
    fs = fsspec.filesystem("memory")
    fs.put(f"{drawn}/", "/drawn/set/", recursive=True)
    remote, local = list(list_photos("memory://drawn/set")), list(list_photos(str(drawn)))
    assert remote[0].path == f"memory:///drawn/set/{local[0].name}"
    assert [photo.name for photo in remote] == [photo.name for photo in local]


def test_listing_says_how_to_draw(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessing\.draw_figures --output"):
        list_photos(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_persons": -1}, "-1 train"),
        ({"num_persons": 0, "num_test_persons": 0}, "nor both 0"),
        ({"num_persons": 1_000_001}, "at most 1000000"),
        ({"images_per_person": 0}, "0 images per person"),
        ({"size": (64, 16)}, "at least 32 pixels"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FigureSettings(**changes)


def test_the_command_draws_and_reports(tmp_path, capsys):
    output = str(tmp_path / "set")
    arguments = ["--output", output, "--persons", "2", "--test-persons", "1", "--size", "32", "32"]
    arguments += ["--images-per-person", "2", "--num-workers", "1"]
    assert draw_figures.main(arguments) == 0
    assert "6 images of 3 persons" in capsys.readouterr().out
    assert len(list(list_photos(output))) == 6
    assert draw_figures.main([*arguments, "--seed", "1"]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert draw_figures.main(["--output", output, "--persons", "-1"]) == 2
    assert "may be negative" in capsys.readouterr().err


def test_a_full_or_forbidden_disk_ends_the_command_without_a_traceback(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert draw_figures.main(["--output", str(tmp_path / "file" / "set"), "--persons", "1"]) == 1
    assert "draw_figures: " in capsys.readouterr().err
