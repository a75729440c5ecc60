"""All settings of a training run, from a YAML file of differences and `--set` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cfld.config import PRESETS, CFLDConfig
from cfld.config_file import ConfigError, merge_settings, read_yaml
from train.checkpoint import CheckpointConfig
from train.ema import EmaConfig
from train.engine import EngineConfig
from train.health import HealthConfig
from train.loader import LoaderConfig
from train.log import LogConfig
from train.optimizer import OptimizerConfig
from train.order import OrderConfig
from train.pair_table import SetConfig
from train.pictures import PictureConfig
from train.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run; the defaults are the paper's."""

    output: str = "runs/cfld"
    """Folder of the run: checkpoints, logs, pictures, and the pipeline at its end."""
    data: dict[str, SetConfig] = field(default_factory=dict)
    """Shard sets to train on, by names of your choice."""
    validation: SetConfig | None = None
    """Shard set whose first pairs are drawn in pictures; without it those of `data`."""
    start_from: str | None = None
    """Folder of a pipeline whose weights a new run begins with."""
    model: CFLDConfig = field(default_factory=CFLDConfig)
    order: OrderConfig = field(default_factory=lambda: OrderConfig(global_batch=224))
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    epochs: int = 100
    steps: int | None = None
    """Optimizer steps of the run, instead of `epochs`."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    pictures: PictureConfig = field(default_factory=PictureConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        if min(self.epochs, 1 if self.steps is None else self.steps) < 1:
            raise ValueError(f"epochs is {self.epochs}, steps is {self.steps}: must be positive")

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps

    @property
    def learning_rate(self) -> float:
        """Highest learning rate: that of a pair times the global batch."""
        return self.optimizer.rate_per_pair * self.order.global_batch


def load_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file of differences from the preset that its key `preset` names.

    Raises:
        ConfigError: If it cannot be read, or a setting does not exist, is missing or is wrong.
    """
    changes = read_yaml(path)
    preset = changes.pop("preset", "paper")
    if preset not in PRESETS:
        raise ConfigError(f"{path}: preset is {preset!r}; choose one of {list(PRESETS)}")
    defaults = TrainConfig(model=PRESETS[preset])
    config = merge_settings(defaults, changes, overrides, place=str(path))
    if not config.data:
        raise ConfigError(
            f"{path}: data names no shard set; add '--set data.NAME.url=FOLDER', or in the file "
            "data: {NAME: {url: FOLDER}}"
        )
    return config
