"""The command itself: what it refuses, how it plans, and the launcher."""

import re

import pytest
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine.precision=fp16"], r"--set engine.precision=bf16"),
        (["engine.micro_batch=5"], r"micro-batch 5 does not divide the 12 pairs"),
        (["data.drawn.url=nowhere"], r"nowhere"),
        (["order.global_batch=75"], r"an epoch has 72 pairs, less than one global batch"),
        (["data.drawn.split=test"], r"no pairs in split 'test'"),
        (["start_from=nowhere"], r"start_from: nowhere"),
        (["epoch=5"], r"there is no setting epoch; there are .*epochs"),
    ],
)
def test_wrong_use_is_told_before_any_work(runs, arguments, message) -> None:
    assert runs.run(*arguments) == [2]
    assert re.search(message, runs.said())
    assert "Traceback" not in runs.said()
    assert not (runs.folder / "run").exists()


@pytest.mark.slow
def test_the_plan_touches_nothing(runs) -> None:
    assert runs.run("--plan", "4") == [0]
    assert "x ranks 4" in runs.said()
    assert not (runs.folder / "run").exists()


@pytest.mark.slow
def test_training_goes_on_from_a_pipeline(runs) -> None:
    first = runs.check("schedule.warmup_steps=0", output="first")
    start = f"start_from={runs.folder / 'first' / 'pipeline'}"
    second = runs.check("schedule.warmup_steps=0", start, output="second")
    assert second[0] < first[0]
    assert runs.run(start, "model.prompt_decoder.depth=2", output="third") == [2]
    assert "was made with other settings than 'model'" in runs.said()
    (weights,) = (runs.folder / "first/pipeline/conditioner").glob("*.safetensors")
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    assert runs.run(start, output="fourth") == [2]
    assert next(iter(tensors)) in runs.said()


@pytest.mark.slow
def test_the_launcher_runs_two_ranks_with_a_users_settings(runs) -> None:
    settings = runs.folder / "ds.json"
    settings.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 100000}}')
    launcher = runs.launch("engine.zero_stage=2", "--deepspeed_config", str(settings), ranks=2)
    assert launcher.wait() == 0
    assert runs.losses() == pytest.approx(runs.check(output="alone"), abs=1e-5)
    assert (runs.folder / "run" / "pipeline" / "model_index.json").exists()
