"""A run's settings from a file: TOML or JSON, or the config.json of another run, as the dotted names that --set takes."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcm.errors import InputError
from fastcm.training.config import TrainConfig
from fastcm.training.methods import FIELDS_OF
from fastcm.training.resumed_settings import FACTS

SECTIONS = ("noise", "objective", "optimizer", "network")
# Facts of a run folder's config.json that are not settings.
RUN_FACTS = ("format", "version", *FACTS)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Returns settings by name: `preset`, fields of TrainConfig, and those of its sections as `objective.s1`, from tables or dotted names.

    Raises InputError where the file is missing or no TOML or JSON object. Names are checked where they are applied.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"unreadable file in --config: {path} ({error}). Give a TOML or JSON file of settings.") from None
    try:
        content = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:  # broken, or nested or long beyond what the readers take
        raise InputError(f"broken file in --config: {path} ({error}). Write it as TOML (.toml) or JSON.") from None
    if not isinstance(content, dict):
        raise InputError(f"no settings in --config: {path} ({type(content).__name__} at the top). Give names and values.")
    if content.get("format") == "fastcm-run":
        try:
            content = _settings_of_run(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"broken settings of a run in --config: {path} ({error}). Restore the file from a copy.") from None
    return flat(content)


def flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose sections are dictionaries or dotted names, all as dotted names."""
    settings = {}
    for name, value in content.items():
        if name in SECTIONS and isinstance(value, dict):
            settings |= {f"{name}.{field}": item for field, item in value.items()}
        else:
            settings[name] = value
    return settings


def _settings_of_run(content: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run's config.json, without those that its method does not read."""
    config = TrainConfig.from_dict({name: value for name, value in content.items() if name not in RUN_FACTS}).as_dict()
    read = FIELDS_OF[config["method"]]
    return {**config, "objective": {name: value for name, value in config["objective"].items() if name in read}}
