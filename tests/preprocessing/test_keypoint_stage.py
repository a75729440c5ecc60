"""What an actor of the pose network holds in memory, and what it leaves."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa

from cfld.images import encode_jpeg
from cfld.pose_network import PoseEstimatorConfig
from preprocessing.keypoint_stage import KeypointActor, read_estimates
from preprocessing.store import Store

SIZE = (600, 500, 3)


def test_no_more_photos_are_decoded_than_the_network_takes_at_once(
    shared_dir: Path, tmp_path: Path
) -> None:
    network = str(shared_dir / "models/openpose_mobilenet_v2_small.onnx")
    config = PoseEstimatorConfig(network=network, image_height_px=64, num_threads=1, batch_size=2)
    store = Store.open(str(tmp_path / "out"))
    actor = KeypointActor(store, config)
    names = [f"{number:02}.jpg" for number in range(20)]
    photo = encode_jpeg(np.zeros(SIZE, np.uint8))
    for name in names[1:]:
        (tmp_path / name).write_bytes(photo)
    columns = {"name": names, "path": [str(tmp_path / name) for name in names]}
    block = pa.table(columns | {"part": ["000000000.parquet"] * len(names)})
    actor(block.slice(0, 3))  # what is made once
    tracemalloc.start()
    actor(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * np.prod(SIZE)
    found = read_estimates(store).to_pylist()
    assert [row["name"] for row in found] == names
    assert [row["reason"] for row in found] == ["missing_file"] + [None] * 19
