"""Checkpoint files: sharing out, finding, and refusing what is damaged."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from train.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_latest,
    share_out,
)
from train.weights import hash_frozen

STATE = {
    "step": 3, "num_updates": 3, "loader": {}, "scaler": {}, "frozen_sha256": "0", "has_ema": False,
    "num_files": 1, "version": 1,
}  # fmt: skip
PART = "part-00000-of-00001.safetensors"


def write(folder, **changes):
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps(STATE | changes))
    save_file({"weights/a.b": torch.ones(2), "ema/a.b": torch.zeros(2)}, folder / PART)
    return folder


def read_all(checkpoint: Checkpoint) -> dict[str, list[float]]:
    return {name: checkpoint.read("weights", name).tolist() for name in checkpoint.names("weights")}


def test_every_parameter_has_one_owner_and_loads_are_even() -> None:
    sizes = {f"p{number}": number**2 for number in range(40)}
    shares = share_out(sizes, 3)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert share_out(dict(reversed(sizes.items())), 3) == shares


def test_tensors_are_read_by_kind_and_name(tmp_path) -> None:
    checkpoint = Checkpoint(write(tmp_path / "step"))
    assert read_all(checkpoint) == {"a.b": [1, 1]}
    with pytest.raises(CheckpointError, match=r"holds no exp_avg/a.b"):
        checkpoint.read("exp_avg", "a.b")


def test_damage_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"version 7, this trainer reads 1"):
        Checkpoint(write(tmp_path / "version", version=7))
    with pytest.raises(CheckpointError, match=r"part-00000-of-00002.safetensors: cannot be read"):
        Checkpoint(write(tmp_path / "missing", num_files=2))
    torn = write(tmp_path / "torn")
    (torn / PART).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        Checkpoint(torn)
    with pytest.raises(CheckpointError, match=r"state.json: cannot be read"):
        Checkpoint(tmp_path)


def test_a_run_without_checkpoint_has_none(tmp_path) -> None:
    assert find_latest(tmp_path) is None


def test_the_frozen_hash_sees_frozen_weights_only() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    before = hash_frozen(model)
    with torch.no_grad():
        model[1].weight.add_(1)
        assert hash_frozen(model) == before
        model[0].weight[0, 0] += 1
    assert hash_frozen(model) != before
