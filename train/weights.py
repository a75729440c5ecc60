"""The model of a run before any training: pretrained, or from a pipeline's folder."""

from __future__ import annotations

from cfld.config_file import ConfigError
from cfld.model import CFLD
from cfld.pipeline import CFLDPipeline
from train.config import TrainConfig


def build_model(config: TrainConfig) -> CFLD:
    """Build the model with the weights that training starts from.

    Raises:
        ConfigError: If `start_from` is no folder of a pipeline of the same model.
    """
    if config.start_from is None:
        return CFLD(config.model)
    try:
        pipeline = CFLDPipeline.from_pretrained(config.start_from)
    except OSError as error:
        raise ConfigError(f"start_from: {config.start_from}: {error}") from error
    if pipeline.conditioner.settings != config.model:
        raise ConfigError(
            f"start_from: {config.start_from} was made with other settings than 'model' here; "
            "choose the preset and settings it was trained with"
        )
    return pipeline.to_model()
