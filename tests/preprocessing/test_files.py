"""Folders are listed alike on disks and remote stores: sorted, links followed, no clutter."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from preprocessing.datasets import DATASETS
from preprocessing.files import is_image, list_folder, resolve, walk_files, why_no_image
from preprocessing.listing import Reject

FILES = ["b/2.jpg", "b/1.jpg", "b c/1.jpg", "a.jpg", "b/d/e.png", "a/x", "é.jpg"]
CLUTTER = [".hidden.jpg", "b/.DS_Store", "b/Thumbs.db", "__MACOSX/b/1.jpg", ".git/a.jpg"]
WALK = ["a/x", "a.jpg", "b/1.jpg", "b/2.jpg", "b/d/e.png", "b c/1.jpg", "é.jpg"]


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder named as one of Market-1501, without root's right to read everything."""
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        folder = Path(root) / "bounding_box_train"
        folder.mkdir()
        folder.chmod(0o777)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}/x"
    fs, path = fsspec.core.url_to_fs(root)
    for name in FILES + CLUTTER:
        fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{path}/{name}", b"")
    return root


def test_walk_is_in_the_order_of_the_paths_parts_everywhere(root: str) -> None:
    assert list(walk_files(root)) == WALK
    assert sorted(WALK, key=lambda path: path.split("/")) == WALK


def test_list_folder_separates_folders_from_files(root: str) -> None:
    assert list_folder(root) == (["a", "b", "b c"], ["a.jpg", "é.jpg"])
    assert list_folder(f"{root}/b") == (["d"], ["1.jpg", "2.jpg"])


def test_a_missing_folder_is_an_error(root: str) -> None:
    for folder in (f"{root}/nothing", f"{root}/a.jpg/b"):
        with pytest.raises(FileNotFoundError, match=r"(nothing|jpg/b): there is no"):
            list_folder(folder)
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            list(walk_files(folder))


def test_an_object_store_is_listed_without_its_folder_markers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    options = {"endpoint_url": endpoint, "key": "key", "secret": "secret"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    fs = fsspec.filesystem("s3")
    fs.mkdir("photos")
    for name in ["", "empty/", "b/", *FILES, *CLUTTER]:
        fs.call_s3("put_object", Bucket="photos", Key=f"root/{name}", Body=b"")
    try:
        assert list(walk_files("s3://photos/root/")) == WALK
        folders = ["a", "b", "b c", "empty"]
        assert list_folder("s3://photos/root") == (folders, ["a.jpg", "é.jpg"])
        assert resolve("s3://photos/root/") == "s3://photos/root"
        with pytest.raises(FileNotFoundError, match="nothing: there is no such folder"):
            list(walk_files("s3://photos/nothing"))
    finally:
        server.stop()


def test_links_are_followed_and_their_cycles_end(tmp_path: Path) -> None:
    real, root = tmp_path / "real", tmp_path / "root"
    (real / "person").mkdir(parents=True)
    root.mkdir()
    (real / "person" / "1.jpg").touch()
    (real / "person" / "up").symlink_to(real)
    (root / "linked").symlink_to(real)
    (root / "file.jpg").symlink_to(real / "person" / "1.jpg")
    (root / "broken.jpg").symlink_to(real / "gone.jpg")
    assert list_folder(str(root)) == (["linked"], ["broken.jpg", "file.jpg"])
    assert list(walk_files(str(root))) == ["broken.jpg", "file.jpg", "linked/person/1.jpg"]


def test_a_folder_that_may_not_be_read_is_told(as_nobody: Path) -> None:
    (as_nobody / "closed").mkdir(mode=0)
    (as_nobody / "open").mkdir()
    (as_nobody / "open" / "1.jpg").touch()
    files = list(walk_files(str(as_nobody)))
    assert files == ["closed/", "open/1.jpg"]
    assert [why_no_image(file) for file in [*files, "a.txt"]] == [
        "unreadable", None, "not_an_image",
    ]  # fmt: skip
    for dataset, root in (("market1501", as_nobody.parent), ("folder", as_nobody)):
        first = next(iter(DATASETS[dataset].list_photos(str(root))))
        assert isinstance(first, Reject)
        assert (first.path, first.reason) == (f"{as_nobody}/closed/", "unreadable")


def test_resolve_gives_absolute_paths_and_full_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {resolve(path) for path in ("./a/", "~/a", "b/../a", f"file://{tmp_path}/a")} == {
        str(tmp_path / "a")
    }
    assert resolve("memory://x/y/") == "memory:///x/y"


def test_images_are_known_by_their_suffix_in_either_case() -> None:
    assert all(map(is_image, ["a.JPG", "a.b.jpeg", "x/a.tif", "a.WebP", "IMG_1.HEIC"]))
    assert not any(map(is_image, ["a.txt", "jpg", "a.jpg.part", "a.mp4"]))


def test_a_name_that_is_no_text_is_listed_as_python_holds_it(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip(f"{sys.platform} has no such names")
    assert list(walk_files(str(tmp_path))) == [name]
