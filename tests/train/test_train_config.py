"""Settings: the YAML files that come with it, differences, overrides, and what is refused."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cfld.config import PRESETS
from cfld.config_file import ConfigError
from train.config import load_train_config

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
DATA = "data.drawn.url=shards"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_load_and_keep_their_meaning_when_written_out(path, tmp_path) -> None:
    config = load_train_config(path, [DATA])
    written = tmp_path / "config.yaml"
    written.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert load_train_config(written) == config


def test_paper_is_the_papers() -> None:
    config = load_train_config(CONFIGS / "paper.yaml", [DATA])
    assert config.model == PRESETS["paper"]
    assert config.learning_rate == pytest.approx(5e-7 * config.order.global_batch)
    assert (config.epochs, config.schedule.warmup_steps) == (100, 1000)
    assert (config.schedule.drop_epochs, config.schedule.drop_factor) == ((50,), 0.1)


def test_overrides_win_over_the_file_and_add_shard_sets(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: tiny\nsteps: 5\ndata: {a: {url: here, weight: 2.0}}\n")
    config = load_train_config(path, ["steps=7", "data.b.url=there", "data.a.split=val"])
    assert config.steps == 7
    assert [(set_.url, set_.split, set_.weight) for set_ in config.data.values()] == [
        ("here", "val", 2.0),
        ("there", "train", 1.0),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["engine.zero_stag=1"], r"no setting engine.zero_stag; there are .*zero_stage"),
        (["engine.zero_stage=x"], r"engine.zero_stage"),
        (["engine.zero_stage=4"], r"choose 0, 1, 2 or 3"),
        (["engine.precision=fp8"], r"choose one of \['fp16', 'bf16', 'autocast', 'fp32'\]"),
        (["engine.zero_stage=0", "engine.offload_optimizer=true"], r"zero_stage of 1, 2 or 3"),
        (["engine.offload_parameters=true"], r"needs zero_stage 3"),
        (["engine.channels_last=true"], r"needs zero_stage 0"),
        (["optimizer.part_factors.encoder=0.1"], r"the parts are \['source_encoder'"),
        (["optimizer.rate_per_pair=0"], r"must be positive"),
        (["optimizer.clip_norm=-1"], r"null is no limit"),
        (["schedule.kind=linear"], r"choose one of \['drops', 'cosine', 'constant'\]"),
        (["schedule.warmup_steps=-1"], r"must be 0 or more"),
        (["ema.decay=1.0"], r"between 0 and 1"),
        (["ema.every_steps=0"], r"must be positive"),
        (["checkpoint.keep=0"], r"both must be positive"),
        (["log.every_steps=0"], r"log.every_steps is 0"),
        (["pictures.num_pairs=0"], r"the other numbers positive"),
        (["health.max_skipped=0"], r"health.max_skipped is 0"),
        (["health.silence_s=1"], r"must be at least 10"),
        (["steps=0"], r"must be positive"),
        (["data.b.split=train"], r"url"),
        (["steps"], r"not of the form"),
    ],
)
def test_what_is_wrong_is_named(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_train_config(CONFIGS / "paper.yaml", [DATA, *changes])


def test_files_that_are_wrong_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"data names no shard set; add '--set data.NAME.url"):
        load_train_config(CONFIGS / "paper.yaml")
    path = tmp_path / "mine.yaml"
    path.write_text("preset: huge\n")
    with pytest.raises(ConfigError, match=r"preset is 'huge'; choose one of \['paper', 'tiny'\]"):
        load_train_config(path)
