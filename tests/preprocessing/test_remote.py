"""Root and output in an object store: a real S3 server process, looked at by plain boto clients."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs

from preprocessing.build_shards import main
from preprocessing.store import Store
from shards.format import open_shards

Environment = dict[str, str]


@pytest.fixture(scope="module")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """Start a server with the bucket `cfld`; the environment that leads clients to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=log, stderr=log)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        wait_for_port(server, port)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            boto3.client("s3").create_bucket(Bucket="cfld")
            yield os.environ | environment
    finally:
        server.kill()
        server.wait()
        log.close()
        s3fs.S3FileSystem.clear_instance_cache()


def wait_for_port(server: subprocess.Popen[bytes], port: int) -> None:
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        try:
            server.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail("the S3 server did not start")


def upload(folder: Path, bucket: str, prefix: str) -> None:
    client = boto3.client("s3")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")


def objects_of(prefix: str) -> dict[str, bytes]:
    client = boto3.client("s3")
    keys = [o["Key"] for o in client.list_objects_v2(Bucket="cfld", Prefix=prefix)["Contents"]]
    return {
        key.removeprefix(prefix): client.get_object(Bucket="cfld", Key=key)["Body"].read()
        for key in keys
    }


def test_from_s3_to_s3(
    s3_environment: Environment,
    drawn_root: Path,
    build: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    photos, keypoints = drawn_root / "train", tmp_path / "keypoints.csv"
    upload(photos, "cfld", "photos")
    names = [path.relative_to(photos) for path in sorted(photos.rglob("*.png"))]
    rows = [f"{name}: {[9] * 18}: {[7] * 18}\n" for name in names]
    keypoints.write_text("name:keypoints_y:keypoints_x\n" + "".join(rows))
    options = ["--image-size", "64", "48", "--shard-size", "0.02", "--keypoints", str(keypoints)]
    words = ["--dataset", "folder", "--root", "s3://cfld/photos", "--output", "s3://cfld/shards"]
    command = [sys.executable, "-m", "preprocessing.build_shards", *words, *options]
    result = subprocess.run(
        command, env=s3_environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "s3://cfld/shards is complete" in result.stdout
    shards, objects = open_shards("s3://cfld/shards"), objects_of("shards/")
    assert not any(name.startswith("_work") for name in objects)
    assert len(shards.manifest.shards) > 2
    assert shards.read_pairs().num_rows == 36
    for row in shards.read_index().to_pylist():
        record = json.loads(shards.read_member(row, "json") or b"")
        assert record["name"] == row["name"]
    assert main([*words, *options]) == 0
    assert "complete already" in capsys.readouterr().out
    assert main([*words, *options, "--limit", "3"]) == 2
    assert "made with limit = None, now it is 3" in caplog.text
    build("folder", photos, tmp_path / "out", *options)
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    del local["manifest.json"], objects["manifest.json"]  # they name different roots
    del local["rejects.parquet"], objects["rejects.parquet"]
    assert local == objects


def test_a_bucket_that_is_not_there_is_told(
    s3_environment: Environment,
    drawn_root: Path,
    ray_workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["--dataset", "synthetic", "--root", str(drawn_root), "--output", "s3://nowhere/out"]
    assert main(words) == 2
    assert "s3://nowhere/out/_work/settings.json could not be written" in caplog.text


def test_an_object_appears_whole_or_not_at_all(s3_environment: Environment) -> None:
    store = Store.open("s3://cfld/store/")
    with pytest.raises(RuntimeError, match="stopped"):
        write_half(store)
    assert store.names() == []
    store.write_bytes("a.tar", b"whole")
    store.write_bytes("_work/part", b"x")
    assert store.names() == ["_work", "a.tar"]
    store.remove_work()
    assert store.names() == ["a.tar"]
    assert objects_of("store/") == {"a.tar": b"whole"}


def write_half(store: Store) -> None:
    with store.new_file("a.tar") as path:
        path.write_bytes(b"half")
        raise RuntimeError("stopped")
