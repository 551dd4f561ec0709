"""Every published run, one function each with its source: a method in, the run's settings out.

Owns the numbers of the papers and of their code, and this project's own runs. In: a preset's name, a method, a data set's size and classes.
Out: a `TrainConfig` that the user's overrides may follow. Opens nothing and runs nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastcm.errors import InputError, nearest
from fastcm.presets.cifar10 import cifar10, cifar10_code, cifar10_ect_hour, cifar10_fastgen, cifar10_ict_deep
from fastcm.presets.imagenet64 import (
    imagenet64,
    imagenet64_code,
    imagenet64_edm2,
    imagenet64_edm2_fastgen,
    imagenet64_edm2_xl_fastgen,
    imagenet64_l2,
)
from fastcm.presets.lsun256 import lsun256, lsun256_code, lsun256_l2
from fastcm.presets.own import digits, emoji32, emoji32_large, folder, mnist
from fastcm.presets.settings import ema_halflife_kimg, noise, objective
from fastcm.training.config import TrainConfig

__all__ = ["DEFAULT", "PRESETS", "TEACH_THEMSELVES", "digits", "ema_halflife_kimg", "folder", "noise", "objective", "preset"]

DEFAULT = "mnist"
# Where a method needs a teacher and none is named, the same command first trains one: the preset's own edm run.
TEACH_THEMSELVES = ("mnist", "folder")

PRESETS: dict[str, Callable[..., TrainConfig]] = {
    "mnist": mnist,
    "digits": digits,
    "emoji32": emoji32,
    "emoji32-large": emoji32_large,
    "folder": folder,
    "cifar10": cifar10,
    "cifar10-code": cifar10_code,
    "cifar10-ict-deep": cifar10_ict_deep,
    "cifar10-ect-hour": cifar10_ect_hour,
    "cifar10-fastgen": cifar10_fastgen,
    "imagenet64": imagenet64,
    "imagenet64-code": imagenet64_code,
    "imagenet64-l2": imagenet64_l2,
    "imagenet64-edm2": imagenet64_edm2,
    "imagenet64-edm2-fastgen": imagenet64_edm2_fastgen,
    "imagenet64-edm2-xl-fastgen": imagenet64_edm2_xl_fastgen,
    "lsun256": lsun256,
    "lsun256-code": lsun256_code,
    "lsun256-l2": lsun256_l2,
}


def preset(name: str, *, method: str | None, **arguments: Any) -> TrainConfig:
    """The named preset for a method, or for its own where method is None."""
    if name not in PRESETS:
        raise InputError(f"unknown preset in PRESET: {name}. Use one of {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    config = PRESETS[name](**arguments) if method is None else PRESETS[name](method, **arguments)
    return replace(config)
