"""The fields of a configuration that somebody else wrote: each of the kind that is needed, or refused by its name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastcm.errors import InputError, shown
from fastcm.networks.checks import is_count, is_number
from fastcm.weights.class_names import check_names


def _list_of(kind) -> Any:
    return lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(map(kind, value))


COUNT, NUMBER, TEXT = "a positive whole number", "a finite number", "text"
COUNTS, TEXTS = "a list of positive whole numbers", "a list of texts"
LEVELS = "lists of noise levels by number of steps"
SECTION = "an object of named fields"
KINDS = {
    COUNT: is_count,
    NUMBER: is_number,
    TEXT: lambda value: isinstance(value, str),
    COUNTS: _list_of(is_count),
    TEXTS: _list_of(lambda value: isinstance(value, str)),
    LEVELS: lambda value: isinstance(value, dict) and all(isinstance(k, str) and _list_of(is_number)(v) for k, v in value.items()),
    SECTION: lambda value: isinstance(value, dict),
}
NEEDED = object()  # the default of a field that may not be absent
# What fastcm's own config.json and exported files say about a model beside its network and preconditioning; each may be null.
MODEL_FIELDS = {"resolution": COUNT, "channels": COUNT, "classes": TEXTS, "sampling": LEVELS, "training": SECTION, "licence": TEXT}


def field(config: Mapping[str, Any], name: str, kind: str, path: Path, *, default: Any = NEEDED, null: bool = False) -> Any:
    """config[name], or `default` where it is absent; null: the value may be null as well, which gives None.

    kind: a key of KINDS. Raises InputError naming `path`, the field and its value where it is missing or of another kind.
    """
    if name not in config and default is not NEEDED:
        return default
    value = config.get(name)
    if name not in config:
        raise InputError(f"missing field in {path}: {name}. It has to be {kind}.")
    if value is None and null:
        return None
    if not KINDS[kind](value):
        raise InputError(f"illegal value in {path}: {name} is {shown(value)}. It has to be {kind}.")
    return value


def check_model_fields(config: Mapping[str, Any], path: Path, *, network: nn.Module | None = None) -> None:
    """Raises InputError where a field of MODEL_FIELDS is of another kind, or says otherwise than the configuration of `network`."""
    values = {name: field(config, name, kind, path, default=None, null=True) for name, kind in MODEL_FIELDS.items()}
    classes = values["classes"]
    check_names(classes or (), str(path))
    built = getattr(network, "config", None)
    for name, found, theirs in (
        ("resolution", values["resolution"], "resolution"),
        ("channels", values["channels"], "in_channels"),
        ("classes", len(classes) if classes else None, "num_classes"),
    ):
        expected = getattr(built, theirs, None)
        if None not in (found, expected) and found != expected:
            raise InputError(
                f"two sizes of one model in {path}: {name} is {found}, network.{theirs} {expected}. Restore the file from a copy."
            )
