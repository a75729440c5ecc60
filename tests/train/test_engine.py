"""DeepSpeed's settings: derived, merged with a user's file, never contradicting."""

import json

import pytest
import torch

from train.engine import EngineConfig, EngineError, check_precision, deepspeed_settings
from train.optimizer import OptimizerConfig


def derive(theirs=None, tmp_path=None, **engine):
    path = None
    if theirs is not None:
        path = tmp_path / "ds.json"
        path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
    config = EngineConfig(micro_batch=7, **engine)
    return deepspeed_settings(
        config, OptimizerConfig(), global_batch=224, accumulation=4, extra=path
    )


def test_settings_follow_from_the_configuration() -> None:
    settings = derive(zero_stage=3, offload_parameters=True, precision="bf16")
    assert settings["train_batch_size"] == 224
    assert settings["train_micro_batch_size_per_gpu"] == 7
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 1.0
    assert settings["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}
    assert settings["bf16"]["enabled"]
    assert not settings["fp16"]["enabled"]
    assert derive()["fp16"]["enabled"]


def test_a_users_file_adds_and_may_agree(tmp_path) -> None:
    theirs = {
        "train_batch_size": 224,
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5},
        "fp16": {"enabled": True, "initial_scale_power": 12},
        "wall_clock_breakdown": True,
    }
    settings = derive(theirs, tmp_path)
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}
    assert settings["fp16"]["initial_scale_power"] == 12
    assert settings["train_micro_batch_size_per_gpu"] == 7
    assert settings["wall_clock_breakdown"]


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"train_batch_size": 8}, r"train_batch_size is 8, .* says 224 \(order.global_batch\)"),
        ({"zero_optimization": {"stage": 3}}, r"stage is 3, .* says 2 \(engine.zero_stage\)"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled is True, .*\(engine.precision\)"),
        ({"optimizer": {"type": "Lion"}}, r"optimizer is decided by 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler is decided by 'schedule'"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"is decided by 'engine.offload_optimizer'",
        ),
        ("{", r"ds.json: cannot be read as JSON"),
        ("[]", r"ds.json: holds no JSON object"),
    ],
)
def test_contradictions_are_errors(tmp_path, theirs, message) -> None:
    with pytest.raises(EngineError, match=message):
        derive(theirs, tmp_path)


def test_a_cpu_refuses_fp16_and_says_what_to_use() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(EngineError, match=r"use '--set engine.precision=bf16'"):
        check_precision(EngineConfig(), cpu)
    check_precision(EngineConfig(precision="bf16"), cpu)
    check_precision(EngineConfig(), torch.device("cuda"))
