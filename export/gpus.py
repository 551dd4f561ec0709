"""The graphics cards that an engine can be built for without one: their names, and the compute capabilities behind them."""

import re
from collections.abc import Iterable

from fastcm.errors import InputError, RunError, nearest

CURRENT = "current"
# By NVIDIA's table of compute capabilities. RTX 20 is Turing, 30 Ampere, 40 Ada Lovelace, 50 Blackwell.
GPUS = {"rtx50": (12, 0), "rtx40": (8, 9), "rtx30": (8, 6), "rtx20": (7, 5), "a100-class": (8, 0)}
# What TensorRT for RTX has code for. sm_121 is GB10's.
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
# Cards of data centres, which have TensorRT proper instead.
DATA_CENTRE = {"h100": (9, 0), "h200": (9, 0), "gh200": (9, 0), "b100": (10, 0), "b200": (10, 0), "gb200": (10, 0), "b300": (10, 3)}


def capabilities(names: Iterable[str]) -> tuple[tuple[int, int], ...] | None:
    """(8, 9), ... of the names of `--gpu`, each once, or None for the card of this machine; InputError for other names."""
    names = [name.strip().lower() for name in names]
    if CURRENT in names:
        if len(names) > 1:
            raise InputError(f"current beside other cards in --gpu: {','.join(names)}. Name each card, or give current alone.")
        return None
    return tuple(dict.fromkeys(_capability(name) for name in names))


def _capability(name: str) -> tuple[int, int]:
    known = [*GPUS, *(f"sm_{major}{minor}" for major, minor in CAPABILITIES), CURRENT]
    capability = GPUS.get(name) or DATA_CENTRE.get(name)
    if capability is None and (match := re.fullmatch(r"sm_?(\d+)(\d)", name)):
        capability = int(match[1]), int(match[2])
    if capability in CAPABILITIES:
        return capability
    if capability in DATA_CENTRE.values():
        remedy = "TensorRT builds for it where the card is: leave --gpu out"
        raise InputError(f"a data-centre card, for which TensorRT for RTX has no code, in --gpu: {name}. {remedy}.")
    raise InputError(f"unknown card in --gpu: {name or 'none'}. Use {', '.join(known)}.{nearest(name, known)}")


def current_capability() -> tuple[int, int]:
    """That of this machine's card; RunError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise RunError("no CUDA device for --gpu: current. Name the card, as --gpu rtx50.")
    return torch.cuda.get_device_capability()


def sm(capability: tuple[int, int]) -> str:
    """(8, 9) as "sm_89"."""
    return f"sm_{capability[0]}{capability[1]}"
