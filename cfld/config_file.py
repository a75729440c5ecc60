"""Settings by a preset's name, from a YAML file of differences, and by `name=value` overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from cfld.config import PRESETS, CFLDConfig

Settings = TypeVar("Settings")


class ConfigError(ValueError):
    """Settings that do not exist, have the wrong type or do not fit together."""


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> CFLDConfig:
    """A preset by its name, or a YAML file of differences from the preset it names.

    The file's top-level key `preset` names the preset (`paper` without it). Each override is
    `part.field=value`.

    Raises:
        ConfigError: If there is neither such a preset nor such a file, or a setting is wrong.
    """
    if str(name) in PRESETS:
        return merge_settings(PRESETS[str(name)], {}, overrides, place=str(name))
    changes = read_yaml(name)
    preset = changes.pop("preset", "paper")
    if preset not in PRESETS:
        raise ConfigError(f"{name}: preset is {preset!r}; choose one of {list(PRESETS)}")
    return merge_settings(PRESETS[preset], changes, overrides, place=str(name))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: If it cannot be read or holds no keys.
    """
    try:
        changes = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: neither a preset ({', '.join(PRESETS)}) nor a file") from error
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(changes, dict) or not all(isinstance(key, str) for key in changes):
        raise ConfigError(f"{path}: holds no 'name: value' lines")
    return {str(key): value for key, value in changes.items()}


def merge_settings(
    defaults: Settings,
    changes: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    place: str = "settings",
) -> Settings:
    """A copy of a (nested) dataclass with `changes`, then `overrides` (`a.b=value`) applied.

    Raises:
        ConfigError: Naming `place`, if a key is unknown or a value is wrong.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{place}: {override!r} is not of the form part.field=value")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(defaults), dict(changes), OmegaConf.from_dotlist(list(overrides))
        )
        return OmegaConf.to_object(merged)  # type: ignore[return-value]  # typed by `defaults`
    except ConfigKeyError as error:
        valid = ", ".join(error.parent_node or ())
        raise ConfigError(
            f"{place}: there is no setting {error.full_key}; there are {valid}"
        ) from error
    except (OmegaConfBaseException, ValueError) as error:
        message = str(error).partition("\n")[0]
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{place}: {f'{key}: ' if key else ''}{message}") from error
