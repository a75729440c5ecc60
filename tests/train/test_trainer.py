"""Runs: the same losses however they are spread, and whenever and however they are interrupted."""

import hashlib
import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cfld.images import decode_image
from cfld.pipeline import CFLDPipeline
from tests.train.conftest import write_shards

# Losses of small models in their first steps swing with the last bit of a gradient.
EXACTLY = {"abs": 1e-5}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    checkpoints = folder / "checkpoints"
    newest = checkpoints / (checkpoints / "latest").read_text()
    return {
        name: tensor
        for path in newest.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_state(folder: Path, expected: Path, **tolerance: float) -> None:
    found, wanted = tensors(folder), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=name)


def spoil_latent(folder: Path, key: str) -> None:
    """Make one number of an image's stored latent infinite, and the shard's hash fit it."""
    index = pq.read_table(folder / "index.parquet").to_pylist()
    row = next(row for row in index if row["key"] == key)
    path = folder / row["shard"]
    data = bytearray(path.read_bytes())
    end = row["latent_offset"] + row["latent_size"] // 2
    data[end - end % 2 : end - end % 2 + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["name"] == row["shard"]:
            shard["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_run_trains_and_leaves_its_results(runs) -> None:
    settings = ("pictures.every_steps=2", "pictures.num_inference_steps=2", "ema.decay=0.9")
    losses = runs.check(*settings, "log.tensorboard=true", "engine.zero_stage=2")
    folder = runs.folder / "run"
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    picture = decode_image((folder / "pictures" / "step-00000004.png").read_bytes())
    assert picture.shape == (4 * 64, 4 * 64, 3)
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "starts.jsonl").read_text())["num_ranks"] == 1
    pipeline = CFLDPipeline.from_pretrained(folder / "pipeline")
    exported = pipeline.to_model().state_dict()
    state = tensors(folder)
    for name in ("learnable_vector", "pose_adapter.conv_in.weight"):
        torch.testing.assert_close(exported[name], state[f"ema/{name}"], atol=0, rtol=0)
        assert not torch.equal(state[f"ema/{name}"], state[f"weights/{name}"])
    assert runs.check() == losses  # a run that is complete is left as it is


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumes_on_other_ranks_stage_and_micro_batch(runs, stage) -> None:
    schedule = ("schedule.kind=constant", "ema.decay=0.5", "ema.every_steps=2")
    expected = runs.check(*schedule, "steps=6", output="unbroken")
    first = ("steps=3", f"engine.zero_stage={stage}", "loader.num_workers=1")
    runs.check(*schedule, *first, ranks=2)
    shutil.rmtree(runs.folder / "run" / "pipeline")
    other = ("steps=6", f"engine.zero_stage={(stage + 3) % 4}", "engine.micro_batch=4")
    ranks = 3 if stage == 0 else 1
    losses = runs.check(*schedule, *other, ranks=ranks)
    assert losses == pytest.approx(expected, **EXACTLY)
    assert_same_state(runs.folder / "run", runs.folder / "unbroken", atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        (1, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_told_to_stop_it_saves_and_the_same_command_goes_on_exactly(runs, ranks, number) -> None:
    schedule = "schedule.kind=constant"  # which does not depend on how many steps there will be
    pids, lines = runs.start_and_watch("steps=1000", schedule, ranks=ranks)
    assert any("step 1 of 1000" in line for line in lines)
    os.kill(pids[-1], number)  # one rank is told, all stop
    assert "stopped after step" in "".join(lines)
    assert runs.wait(pids) == [0] * ranks
    assert not (runs.folder / "run" / "pipeline").exists()
    steps = f"steps={len(runs.losses()) + 2}"
    losses = runs.check(steps, schedule, ranks=ranks)
    assert losses == runs.check(steps, schedule, output="unbroken", ranks=ranks)
    assert_same_state(runs.folder / "run", runs.folder / "unbroken", atol=0, rtol=0)


@pytest.mark.slow
def test_a_preempted_launcher_leaves_a_checkpoint(runs) -> None:
    """As on a cluster, where the launcher, its helper and all ranks get the signal."""
    launcher = psutil.Process(runs.launch("steps=1000", "schedule.kind=constant", ranks=2).pid)
    metrics = runs.folder / "run" / "metrics.jsonl"
    while not metrics.exists() or "\n" not in metrics.read_text():
        assert not psutil.wait_procs([launcher], timeout=0.1)[0]
    processes = [launcher, *launcher.children(recursive=True)]
    os.killpg(launcher.pid, signal.SIGTERM)
    psutil.wait_procs(processes)
    steps = len(runs.losses())
    assert (runs.folder / "run" / "checkpoints" / "latest").read_text() == f"step-{steps:08d}"
    assert len(runs.check(f"steps={steps + 1}", "schedule.kind=constant", ranks=2)) == steps + 1


@pytest.mark.slow
def test_what_a_kill_left_behind_is_cleaned_up(runs) -> None:
    runs.check("steps=2", "checkpoint.every_steps=1")
    folder = runs.folder / "run"
    shutil.rmtree(folder / "pipeline")
    torn = folder / "checkpoints" / ".torn-step-00000003"
    torn.mkdir()
    (torn / "part-00000-of-00001.safetensors").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as file:  # written after the newest checkpoint
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    runs.check("steps=4")
    assert [line["step"] for line in runs.lines("metrics.jsonl")] == [1, 2, 3, 4]
    assert not torn.exists()
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_is_skipped_and_named(runs, stage) -> None:
    folder = write_shards(runs.folder / "spoilt", latent_shape=(96, 16, 16))
    spoil_latent(folder, "s0p0004v1")
    data = f"data.drawn.url={folder}"
    codes = runs.run(data, "steps=6", f"engine.zero_stage={stage}", ranks=2)
    assert codes == [0, 0], runs.said()
    skipped = runs.lines("skipped.jsonl")
    assert len(runs.lines("metrics.jsonl")) == 6
    assert 0 < len(skipped) <= 4
    named = [pair for line in skipped for pair in line["pairs"]]
    assert len(named) == 4  # it is the source of two pairs and the target of two
    assert all("s0p0004v1" in pair for pair in named)
    assert all(tensor.isfinite().all() for tensor in tensors(runs.folder / "run").values())
    assert "loss not finite" in runs.said()


@pytest.mark.slow
def test_many_skipped_steps_in_a_row_stop_the_run_with_advice(runs) -> None:
    limit = "health.max_skipped=3"
    codes = runs.run("optimizer.rate_per_pair=1e30", "schedule.warmup_steps=0", "steps=9", limit)
    assert codes == [1]
    assert "3 steps in a row" in runs.said()
    assert "Lower optimizer.rate_per_pair" in runs.said()
    assert len(runs.lines("skipped.jsonl")) == 3


def test_a_killed_rank_ends_the_others(runs) -> None:
    pids, lines = runs.start_and_watch("steps=100000", ranks=2)
    assert any("step 1 of" in line for line in lines)
    os.kill(pids[1], signal.SIGKILL)
    assert "another rank is gone" in "".join(lines)
    assert runs.wait(pids) == [1, -signal.SIGKILL]


@pytest.mark.slow  # waits for a silence
@pytest.mark.parametrize("hung", [0, 1, 2])
def test_a_rank_that_hangs_ends_the_others(runs, hung) -> None:
    """As a machine does that is gone: its connections stay open, and nothing comes."""
    silence = "health.silence_s=10"
    pids, lines = runs.start_and_watch("steps=100000", silence, "engine.micro_batch=4", ranks=3)
    assert any("step 1 of" in line for line in lines)
    os.kill(pids[hung], signal.SIGSTOP)
    others = [pid for rank, pid in enumerate(pids) if rank != hung]
    assert runs.wait(others) == [1, 1]
    os.kill(pids[hung], signal.SIGKILL)
    runs.wait([pids[hung]])
    assert f"rank {hung} is gone (silent for" in "".join(lines)


def test_a_damaged_shard_stops_the_run_and_is_named(runs) -> None:
    folder = write_shards(runs.folder / "damaged")
    shard = next(folder.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert runs.run(f"data.drawn.url={folder}", "steps=6") == [1]
    assert f"{shard}: has sha256" in runs.said()


@pytest.mark.slow
def test_other_frozen_weights_or_another_order_are_refused(runs) -> None:
    runs.check("steps=2")
    shutil.rmtree(runs.folder / "run" / "pipeline")
    assert runs.run("steps=4", "order.seed=1") == [2]
    assert "was trained on frozen weights" in runs.said()
    assert runs.run("steps=4", "order.block_shards=3") == [2]
    assert "order of pairs cannot be continued" in runs.said()


@pytest.mark.slow
def test_another_model_is_refused(runs) -> None:
    all_trained = "model.unet.is_frozen=false"
    runs.check("steps=2", all_trained)
    shutil.rmtree(runs.folder / "run" / "pipeline")
    assert runs.run("steps=4", all_trained, "model.prompt_decoder.depth=2") == [2]
    assert "trained parameters, such as prompt_decoder.blocks.1" in runs.said()
    assert runs.run("steps=4", all_trained, "model.prompt_decoder.num_queries=3") == [2]
    assert "learnable_vector has the shape [1, 2, 16], the model's [1, 3, 16]" in runs.said()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (3, 3)])
def test_goes_on_from_two_ranks_of_stage_2_for_20_steps(runs, ranks, stage) -> None:
    schedule = "schedule.kind=constant"
    first = (schedule, "engine.zero_stage=2")
    expected = runs.check(*first, "steps=25", output="unbroken", ranks=2)
    runs.check(*first, "steps=5", ranks=2)
    shutil.rmtree(runs.folder / "run" / "pipeline")
    other = (schedule, f"engine.zero_stage={stage}", "engine.micro_batch=4")
    losses = runs.check(*other, "steps=25", ranks=ranks)
    assert losses == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_changes_nothing_and_resumes(runs, stage) -> None:
    schedule = "schedule.kind=constant"
    expected = runs.check(schedule, "steps=5", output="unbroken")
    offload = [f"engine.zero_stage={stage}", "engine.offload_optimizer=true"]
    if stage == 3:
        offload.append("engine.offload_parameters=true")
    runs.check(schedule, *offload, "steps=3", ranks=2)
    shutil.rmtree(runs.folder / "run" / "pipeline")
    losses = runs.check(schedule, *offload, "steps=5")
    assert losses == pytest.approx(expected, **EXACTLY)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_and_trained_weights_survive_saving_and_loading(runs, stage, precision) -> None:
    settings = (f"engine.zero_stage={stage}", f"engine.precision={precision}", "steps=3")
    runs.check(*settings, "schedule.kind=constant", "pictures.every_steps=3", ranks=2)
    folder = runs.folder / "run"
    shutil.rmtree(folder / "pipeline")
    expected = tensors(folder)
    picture = (folder / "pictures" / "step-00000003.png").read_bytes()
    # One more step that changes nothing: what it draws are the loaded weights' images.
    (folder / "pictures" / "step-00000003.png").unlink()
    frozen = ("schedule.kind=drops", "schedule.drop_epochs=[0]", "schedule.drop_factor=0.0")
    runs.check(*settings, "steps=4", *frozen, "pictures.every_steps=4", ranks=2)
    assert (folder / "pictures" / "step-00000004.png").read_bytes() == picture
    found = tensors(folder)
    for name in (name for name in expected if name.startswith("weights/")):
        torch.testing.assert_close(found[name], expected[name], atol=0, rtol=0)


@pytest.mark.slow
def test_loss_curves_agree_on_1_2_and_4_ranks(runs) -> None:
    settings = ("steps=50", "optimizer.rate_per_pair=2e-5")
    curves = [
        runs.check(*settings, f"engine.zero_stage={stage}", output=f"on{ranks}", ranks=ranks)
        for ranks, stage in ((1, 0), (2, 1), (4, 2))
    ]
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(runs) -> None:
    settings = ("steps=60", "checkpoint.every_steps=2", "loader.num_workers=1")
    runs.check(*settings, output="unbroken", ranks=2)
    moments = random.Random(0)
    kills = 0
    while kills < 20:
        pids = runs.start(*settings, ranks=2)
        threading.Event().wait(moments.uniform(1.0, 8.0))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        codes = runs.wait(pids)
        kills += any(code == -signal.SIGKILL for code in codes)
        if codes == [0, 0]:
            shutil.rmtree(runs.folder / "run")
    runs.check(*settings, ranks=2)
    assert runs.losses() == runs.losses("unbroken")
    assert_same_state(runs.folder / "run", runs.folder / "unbroken", atol=0, rtol=0)
