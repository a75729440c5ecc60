import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cfld.config import PRESETS
from cfld.describe import main
from cfld.description import (
    Memory,
    _fixed_memory,
    _training_cost,
    describe,
    training_hours,
)
from cfld.model import CFLD
from cfld.objective import TrainingBatch, draw_rows


@pytest.fixture(scope="module")
def micro_description(micro):
    return describe(micro["vae"])


def test_parameters_of_each_part(micro, micro_description, build):
    model = build(micro["vae"])
    sizes = {part.name: part for part in micro_description.parts}
    for name in ("source_encoder", "prompt_decoder", "appearance", "pose_adapter", "unet"):
        parameters = list(getattr(model, name).parameters())
        assert sizes[name].total == sum(p.numel() for p in parameters)
        assert sizes[name].trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert sizes["codec"].trainable == 0 < sizes["codec"].total
    assert sizes["unet"].trainable < sizes["unet"].total
    assert sizes["together"].total == sum(p.total for p in micro_description.parts[:-1])
    assert sizes["together"].paper_millions == 248.2


def test_operations_equal_those_of_a_real_step(micro, micro_description, build):
    config = micro["vae"]
    model = build(config)
    batch = TrainingBatch(
        source=torch.rand(1, 3, 32, 32),
        pose_maps=torch.rand(2, 21, 32, 32),
        latents=torch.randn(2, 4, 8, 8),
        draws=draw_rows([torch.Generator().manual_seed(0)], (4, 8, 8)),
    )
    with FlopCounterMode(display=False) as counter:
        model(batch).mean.backward()
    assert micro_description.flops_per_pair == counter.get_total_flops()


@pytest.mark.slow
def test_memory_grows_by_the_same_bytes_with_each_pair(micro, micro_description):
    with torch.device("meta"):
        model = CFLD(micro["vae"], pretrained=False).to(torch.float16)
        peaks = [_training_cost(model, pairs).peak_bytes for pairs in (4, 8)]
    grown = (peaks[1] - peaks[0]) / 4
    assert micro_description.memory.activations_bytes == pytest.approx(grown, rel=0.05)


def test_checkpointing_saves_memory(micro_description):
    plain, small = micro_description.memory, micro_description.memory_with_checkpointing
    assert small.activations_bytes < plain.activations_bytes
    assert replace(small, activations_bytes=plain.activations_bytes) == plain


def test_zero_divides_what_its_stage_says(micro_description):
    def memory(stage, num_gpus=4):
        return _fixed_memory(micro_description.parts, stage, num_gpus)

    alone = memory(0)
    codec = 2 * next(part.total for part in micro_description.parts if part.name == "codec")
    assert alone.optimizer_bytes == 12 * micro_description.parts[-1].trainable
    assert memory(1) == replace(alone, optimizer_bytes=alone.optimizer_bytes // 4)
    assert memory(2) == replace(memory(1), gradients_bytes=alone.gradients_bytes // 4)
    shared_weights = (alone.weights_bytes - codec) // 4 + codec
    assert memory(3).weights_bytes == pytest.approx(shared_weights, abs=2)
    assert replace(memory(3), weights_bytes=alone.weights_bytes) == memory(2)


def test_totals():
    memory = Memory(weights_bytes=5, gradients_bytes=3, optimizer_bytes=2, activations_bytes=10)
    assert memory.total_bytes(4) == 50
    assert training_hours(101_966 * 100 / 3600) == pytest.approx(1.0)


def test_images_cost_steps_and_terms(micro, micro_description):
    assert micro_description.num_terms == 2
    steps = micro_description.num_inference_steps * micro_description.flops_per_step
    others = micro_description.flops_to_condition + micro_description.flops_to_decode
    assert micro_description.flops_per_image == steps + others
    assert micro_description.flops_to_encode_pair > 0


@pytest.mark.slow
def test_the_paper_beside_table_1():
    described = describe(PRESETS["paper"])
    for part in described.parts:
        if part.paper_millions is not None:
            assert round(part.trainable / 1e6, 1) == part.paper_millions
    # Stable Diffusion 1.5 at 512x512 is known to take about 0.68 TFLOP (0.34 TMAC) a prediction.
    assert described.flops_per_step / described.num_terms == pytest.approx(0.68e12, rel=0.2)


@pytest.mark.slow
def test_the_command_prints_text_and_json(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text("preset: tiny\nprompt_decoder: {depth: 1}\n")
    assert main(["--config", str(path), "--pairs-per-second", "8"]) == 0
    text = capsys.readouterr().out
    assert "354.0 hours for the paper's 100 epochs of 101,966 pairs at 8 pairs/s" in text
    assert "S source_encoder" in text
    assert main(["--config", str(path), "--json", "--set", "prompt_decoder.depth=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parts"][-1]["total"] == 7_529_171  # depth 2 is what `tiny` has
    assert found["paper_schedule_hours"] is None
    assert (found["zero_stage"], found["num_gpus"]) == (2, 1)
    small, large = (found["bytes_by_micro_batch"]["plain"][pairs] for pairs in ("1", "2"))
    assert large - small == found["memory"]["activations_bytes"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--num-gpus", "0"),
        ("--steps", "-3"),
        ("--pairs-per-second", "-1"),
        ("--pairs-per-second", "nan"),
    ],
)
def test_numbers_that_cannot_be_are_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"argument {arguments[0]}: {arguments[1]} is not" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("transformers") is not None, reason="transformers is installed")
def test_a_missing_library_is_an_error(caplog):
    assert main(["--config", "tiny", "--set", "prompt_decoder.kind=clip"]) == 2
    assert "pip install cfld[clip]" in caplog.text


def test_an_unknown_configuration_is_an_error(caplog):
    assert main(["--config", "huge"]) == 2
    assert "huge: neither a preset" in caplog.text
