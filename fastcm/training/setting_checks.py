"""Checks of a single setting, as one line that names it, its value and what it may be."""

import math

from fastcm.errors import InputError, nearest
from fastcm.networks.checks import is_number


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown value in {name}: {value}. Use one of {', '.join(choices)}.{nearest(str(value), choices)}")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, whole: bool = False, open_low: bool = False) -> None:
    good = is_number(value) and (isinstance(value, int) or not whole)
    if not good or value > high or (value <= low if open_low else value < low):
        what = "a whole number" if whole else "a finite number"
        bound = f"above {low:g}" if open_low else f"of at least {low:g}"
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise InputError(f"illegal value in {name}: {value}. Give {what} {bound}{upper}.")
