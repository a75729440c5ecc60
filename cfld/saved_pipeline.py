"""Pipelines in folders, as training and import leave them: what is in one, and loading it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin

from cfld.pipeline import CFLDPipeline
from cfld.schedulers import compatible_schedulers, short_name

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class WeightsError(ValueError):
    """A folder that holds no pipeline of ours, or one that cannot be used as asked."""


def load_pipeline(
    weights: str | Path, *, device: str, dtype: str, scheduler: str | None, num_steps: int
) -> CFLDPipeline:
    """A pipeline from a folder, on its device, with the named scheduler.

    Raises:
        WeightsError: If the folder holds none, or device, dtype or scheduler cannot be had, or the
            scheduler cannot take so many steps.
    """
    read_index(weights)
    device = read_device(device)
    try:
        with warnings.catch_warnings():
            # Later versions of diffusers call it dtype.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = CFLDPipeline.from_pretrained(
                weights,
                torch_dtype=DTYPES[read_dtype(dtype, device)],
                use_safetensors=True,
                local_files_only=True,
            ).to(device)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(f"{weights}: cannot be loaded: {error}") from error
    saved = short_name(type(pipeline.scheduler).__name__)
    name = saved if scheduler is None else short_name(scheduler)
    if name != saved:  # to try them all takes seconds
        choices = compatible_schedulers(pipeline.scheduler)
        if name not in choices:
            raise WeightsError(f"--scheduler {scheduler}: choose one of {', '.join(choices)}")
        pipeline.scheduler = choices[name].from_config(pipeline.scheduler.config)
    _check_steps(pipeline.scheduler, num_steps)
    return pipeline


def _check_steps(scheduler: SchedulerMixin, num_steps: int) -> None:
    """Take so many steps with a latent of one pixel, before a model takes them for hours."""
    trial = type(scheduler).from_config(scheduler.config)
    latent = torch.zeros(1, 1, 1, 1)
    try:
        trial.set_timesteps(num_steps)
        with torch.random.fork_rng(devices=[]):
            for timestep in trial.timesteps:
                predicted = trial.scale_model_input(latent, timestep)
                latent = trial.step(predicted, timestep, latent).prev_sample
    except (ValueError, IndexError, NotImplementedError) as error:
        name = short_name(type(scheduler).__name__)
        raise WeightsError(
            f"--steps {num_steps}: the scheduler {name} cannot take them with these weights: "
            f"{error}"
        ) from error


def read_index(weights: str | Path) -> dict[str, Any]:
    """What `model_index.json` says of a pipeline's components.

    Raises:
        WeightsError: If the folder holds none, or another pipeline.
    """
    try:
        index: dict[str, Any] = json.loads(
            (Path(weights) / "model_index.json").read_text(encoding="utf-8")
        )
        found = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{weights}: no weights of this project (no readable model_index.json); give the "
            "folder that the training or cfld.import_official has written"
        ) from error
    if found != CFLDPipeline.__name__:
        raise WeightsError(f"{weights}: holds a {found}, not a {CFLDPipeline.__name__}")
    return index


def read_device(device: str) -> str:
    """The name of a device; `auto` is the GPU if there is one.

    Raises:
        WeightsError: If there is no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"--device {device}: {error}") from error
    return device


def read_dtype(dtype: str, device: str) -> str:
    """The name of a dtype; `auto` is what suits the device."""
    if dtype == "auto":
        return "fp16" if device.startswith("cuda") else "fp32"
    return dtype
