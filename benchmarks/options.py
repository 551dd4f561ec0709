"""What the options that the benchmarks share mean: lists of names and numbers, the device."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastcm.errors import InputError, nearest


def add_options(parser: argparse.ArgumentParser, *, models: Iterable[str], backends: Iterable[str]) -> None:
    """--model, --batch, --backend, --device, --seconds, --quick and --json."""
    parser.add_argument("--model", metavar="NAMES", help=f"what to measure, separated by commas: {', '.join(models)}")
    parser.add_argument("--batch", metavar="SIZES", help="images at once, separated by commas")
    parser.add_argument("--backend", metavar="NAMES", help=f"who competes, separated by commas: {', '.join(backends)}")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--seconds", type=float, help="how long each set of competitors is timed")
    parser.add_argument("--quick", action="store_true", help="a few minutes at most")
    parser.add_argument("--json", type=Path, metavar="OUT", help="the file of results; rows that it holds are not measured again")


def names(text: str | None, choices: Iterable[str], option: str, default: Sequence[str]) -> list[str]:
    """The words of a comma-separated list; InputError for one that is not among the choices."""
    if text is None:
        return list(default)
    choices = list(choices)
    for word in text.split(","):
        if word not in choices:
            raise InputError(f"unknown value in {option}: {word}. Use some of {', '.join(choices)}.{nearest(word, choices)}")
    return text.split(",")


def sizes(text: str | None, option: str, default: Sequence[int]) -> list[int]:
    """The numbers of a comma-separated list; InputError for one that is not a whole number of at least 1."""
    if text is None:
        return list(default)
    for word in text.split(","):
        if not word.isdigit() or int(word) < 1:
            raise InputError(f"illegal value in {option}: {word}. Give whole numbers of 1 or more, separated by commas.")
    return [int(word) for word in text.split(",")]


def one_line(error: BaseException) -> str:
    """An exception's kind and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
