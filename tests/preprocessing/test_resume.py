"""Whatever stops the job, it ends with the same bytes when run again; nothing partial is seen."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from cfld.pose_network import PoseEstimatorConfig
from preprocessing import keypoint_stage
from preprocessing.build_shards import main
from preprocessing.datasets import synthetic
from preprocessing.earlier_work import SETTINGS_FILE
from preprocessing.job_settings import JobSettings
from preprocessing.keypoint_stage import (
    PARTS_FOLDER,
    count_finished,
    estimate_keypoints,
    read_estimates,
)
from preprocessing.listing_stage import list_dataset
from preprocessing.store import OutputError, Store

SHARD_SIZE = "0.2"
IMAGE_SIZE = ("1200", "1200")  # large, so that there is time to kill a shard that is being written


def command(root: Path, output: Path, *options: str) -> list[str]:
    words = ["--dataset", "synthetic", "--root", str(root), "--output", str(output)]
    return [*words, "--shard-size", SHARD_SIZE, "--image-size", *IMAGE_SIZE, *options]


def start(root: Path, output: Path, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "preprocessing.build_shards", *command(root, output)]
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)


def num_records(output: Path) -> int:
    return len(list((output / "_work/shards").glob("*.tar.parquet")))


def wait_until(process: subprocess.Popen[bytes], is_reached: Callable[[], bool]) -> bool:
    """Wait for a state of the output; False if the process ended before."""
    while not is_reached():
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        return False
    return True


def wait_a_little(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def files_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.iterdir()) if folder.exists() else []
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(
    drawn_root: Path, ray_workers: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("unbroken") / "out"
    assert main(command(drawn_root, output)) == 0
    return files_of(output)


def kill_and_restart(
    root: Path, folder: Path, unbroken: dict[str, bytes], num_kills: int, seed: int
) -> None:
    """Kill the whole process group at random points, `num_kills` times, then let it finish."""
    rng = random.Random(seed)
    output, log = folder / "out", folder / "log"
    while num_kills:
        target = num_records(output) + rng.choice([-1, 0, 0, 1])
        process = start(root, output, log)
        wait_until(process, lambda target=target: num_records(output) > target)
        wait_a_little(process, rng.uniform(0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            num_kills -= 1
        else:  # it was finished before; begin anew
            assert process.returncode == 0, log.read_text()
            assert files_of(output) == unbroken
            shutil.rmtree(output)
            continue
        for name, data in files_of(output).items():
            assert data == unbroken[name], f"{name} is not what it will be"
    assert main(command(root, output)) == 0
    assert files_of(output) == unbroken
    assert not (output / "_work").exists()


def test_killed_twice_it_ends_with_the_same_bytes(
    drawn_root: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    kill_and_restart(drawn_root, tmp_path, unbroken, num_kills=2, seed=0)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bytes(
    drawn_root: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    kill_and_restart(drawn_root, tmp_path, unbroken, num_kills=20, seed=1)


def test_interrupted_it_says_how_to_go_on(
    drawn_root: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    process = start(drawn_root, output, log)
    assert wait_until(process, lambda: num_records(output) > 0), log.read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 1
    text = log.read_text()
    assert "run the same command to go on" in text
    assert "Traceback" not in text
    assert not list(output.rglob("*.tmp"))
    assert main(command(drawn_root, output)) == 0
    assert files_of(output) == unbroken


@pytest.mark.parametrize("url", ["{folder}/out", "memory://out"])
def test_what_killed_processes_left_is_removed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store.open(url.format(folder=tmp_path))
    with store.new_file("a.tar") as path:
        path.write_bytes(b"whole")
        path.with_name("killed.tmp").touch()
    assert list(tmp_path.rglob("*.tmp"))
    store.remove_temporary()
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.glob("cfld-*"))
    assert store.sizes() == {"a.tar": 5}


def test_settings_of_an_unfinished_job_are_kept_to(
    drawn_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_work/shards").mkdir(parents=True)
    (tmp_path / "_work/shards/train-000000.tar.parquet").touch()
    (tmp_path / "_work/killed.tmp").touch()
    settings = JobSettings(
        dataset="synthetic", root=str(drawn_root), output=str(tmp_path), limit=3, pairs={}
    )
    Store.open(str(tmp_path)).write_bytes(SETTINGS_FILE, json.dumps(settings.record()).encode())
    words = ["--dataset", "synthetic", "--root", str(drawn_root), "--output", str(tmp_path)]
    assert main([*words, "--limit", "4"]) == 2
    assert "settings.json: made with limit = 3, now it is 4" in caplog.text
    assert (tmp_path / SETTINGS_FILE).exists()
    assert not list(tmp_path.rglob("*.tmp"))


def photos_of(root: Path) -> pa.Table:
    return list_dataset(synthetic.list_photos(str(root))).photos.select(["name", "path"])


def kill_one_actor() -> None:
    """Kill, as the kernel would when memory is short, one of the workers that hold a network."""
    for process in psutil.process_iter(["cmdline"]):
        if "KeypointActor" in " ".join(process.info["cmdline"] or []):
            process.kill()
            return
    pytest.fail("no actor is running")


@pytest.fixture(scope="module")
def config(shared_dir: Path) -> PoseEstimatorConfig:
    network = str(shared_dir / "models/openpose_mobilenet_v2_small.onnx")
    return PoseEstimatorConfig(network=network, image_height_px=64, num_threads=1)


@pytest.fixture(scope="module")
def calm(
    config: PoseEstimatorConfig,
    drawn_root: Path,
    ray_workers: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Store]:
    """Keypoints of all photos, in twelve blocks, nothing having gone wrong."""
    store = Store.open(str(tmp_path_factory.mktemp("calm")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keypoint_stage, "NUM_BLOCK", 2)
        done: list[int] = []
        estimate_keypoints(photos_of(drawn_root), store, config, 1, done.append)
        assert sum(done) == 24
        yield store


def test_a_killed_actor_costs_at_most_its_block(
    calm: Store, config: PoseEstimatorConfig, drawn_root: Path, tmp_path: Path
) -> None:
    photos, store = photos_of(drawn_root), Store.open(str(tmp_path))
    finished: list[int] = []
    written: dict[Path, int] = {}

    def kill_at_the_second_block(num_photos: int) -> None:
        finished.append(num_photos)
        if len(finished) == 2:
            for path in Path(store.path(PARTS_FOLDER)).iterdir():
                written[path] = path.stat().st_mtime_ns
            kill_one_actor()

    estimate_keypoints(photos, store, config, 1, kill_at_the_second_block)
    assert sum(finished) == photos.num_rows
    assert len(written) >= 2
    rewritten = [path for path, time in written.items() if path.stat().st_mtime_ns != time]
    assert len(rewritten) <= 1
    found = read_estimates(store)
    assert found["name"].to_pylist() == photos["name"].to_pylist()
    assert text_of(found) == text_of(read_estimates(calm))


def test_finished_blocks_are_not_done_again(
    calm: Store, config: PoseEstimatorConfig, drawn_root: Path, tmp_path: Path
) -> None:
    photos, store = photos_of(drawn_root), Store.open(str(tmp_path))
    shutil.copytree(calm.path(PARTS_FOLDER), store.path(PARTS_FOLDER))
    (Path(store.path(PARTS_FOLDER)) / store.names(PARTS_FOLDER)[1]).unlink()
    assert count_finished(24, store) == 22
    done: list[int] = []
    estimate_keypoints(photos, store, config, 1, done.append)
    assert done == [2]
    assert text_of(read_estimates(store)) == text_of(read_estimates(calm))
    estimate_keypoints(photos, store, config, 1, done.append)
    assert done == [2]


def test_keypoints_that_cannot_be_written_are_told(
    config: PoseEstimatorConfig, drawn_root: Path, ray_workers: int, tmp_path: Path
) -> None:
    (tmp_path / "_work").mkdir()
    (tmp_path / PARTS_FOLDER).write_text("a file where a folder is needed")
    photos, store = photos_of(drawn_root).slice(0, 2), Store.open(str(tmp_path))
    with pytest.raises(OutputError, match=r"parquet could not be written: File exists"):
        estimate_keypoints(photos, store, config, 1, lambda _: None)


def text_of(found: pa.Table) -> str:
    return str(found.to_pylist())  # NaN is not equal to itself


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1.2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk of its own takes the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_and_the_job_goes_on_later(
    small_disk: Path,
    drawn_root: Path,
    unbroken: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = small_disk / "out"
    assert main(command(drawn_root, output)) == 2
    assert "No space left on device" in caplog.text
    assert "Make room" in caplog.text
    assert "Traceback" not in caplog.text
    assert files_of(output).items() <= unbroken.items()
    assert not list(output.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert main(command(drawn_root, output)) == 0
    assert files_of(output) == unbroken


def test_an_output_that_cannot_be_a_folder_is_told(
    drawn_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert main(command(drawn_root, tmp_path / "file" / "out")) == 2
    assert "cannot make this folder: Not a directory" in caplog.text


def write_half(store: Store, name: str) -> None:
    with store.new_file(name) as path:
        path.write_bytes(b"half")
        raise RuntimeError("stopped")


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "out"))
    with pytest.raises(RuntimeError, match="stopped"):
        write_half(store, "a.tar")
    assert not store.exists("a.tar")
    with store.new_file("a.tar") as path:
        path.write_bytes(b"whole")
    assert store.read_bytes("a.tar") == b"whole"
    (tmp_path / "out/b").mkdir()
    with pytest.raises(OutputError, match=r"out/b could not be written: Is a directory"):
        store.write_bytes("b", b"")
    assert store.names() == ["_work", "a.tar", "b"]
    assert store.names("nowhere") == []
    store.remove_work()
    assert store.names() == ["a.tar", "b"]
