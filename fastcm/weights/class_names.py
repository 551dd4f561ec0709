"""The names of classes: what they may be, their order, and the class that a name or a number asks for."""

import operator
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from fastcm.errors import InputError, nearest

# Control characters and the separators of lines and paragraphs: a name stands in one line of a report, a list or a picture.
UNPRINTABLE = ("Cc", "Zl", "Zp")
SHOWN = 10


def check_names(names: Iterable[object], where: str) -> tuple[str, ...]:
    """The names as they are; raises InputError for one that is no text, has bytes that are not UTF-8, or a control character."""
    names = tuple(names)
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"a class name that is no text in {where}: {name!r}. Write names as text.")
        if any(0xD800 <= ord(letter) < 0xE000 for letter in name):
            raise InputError(f"a class name that is not UTF-8 in {where}: {name!r}. Rename it, as with convmv -f latin1 -t utf8.")
        if any(unicodedata.category(letter) in UNPRINTABLE for letter in name):
            raise InputError(f"a class name with a control character in {where}: {name!r}. Rename it.")
    return names


def is_number(name: str) -> bool:
    """Whether a name is a whole number."""
    return name.isascii() and name.isdecimal()


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The names sorted: whole numbers first, by value (2 before 10), then text."""
    return tuple(sorted(names, key=lambda name: (0, int(name), name) if is_number(name) else (1, 0, name)))


def class_number(label: object, classes: Sequence[str], numbers: Mapping[str, int] | None = None) -> int:
    """The class of a label: an int is its number; text is a name, or a number where no class has another number for its name.

    numbers: the classes by name, where the caller has them at hand. Raises InputError.
    """
    if isinstance(label, str):
        numbers = by_name(classes) if numbers is None else numbers
        if label in numbers:
            return numbers[label]
        if not is_number(label) or _numbers_are_names(classes):
            remedy = nearest(label, classes) or f" Give {_choices(classes)}."
            raise InputError(f"unknown class in labels: {label}.{remedy}")
        label = int(label)
    try:
        number = operator.index(label)
    except TypeError:
        raise InputError(f"unknown class in labels: {label}. Give {_choices(classes)}.") from None
    if not 0 <= number < len(classes):
        raise InputError(f"class out of range in labels: {number}. The model has the classes 0 to {len(classes) - 1}.")
    return number


def by_name(classes: Sequence[str]) -> dict[str, int]:
    """The number of each class; of two with one name the first."""
    return {name: len(classes) - 1 - index for index, name in enumerate(reversed(classes))}


def listed(names: Sequence[str]) -> str:
    """Up to SHOWN names as a list in which one with a comma is quoted, as `--labels` reads it."""
    quoted = ['"{}"'.format(name.replace('"', '""')) if "," in name or '"' in name else name for name in names[:SHOWN]]
    return ", ".join(quoted) + (f", … ({len(names):,})" if len(names) > SHOWN else "")


def _numbers_are_names(classes: Sequence[str]) -> bool:
    """Whether a whole number is the name of a class that has another number."""
    return any(is_number(name) and name != str(index) for index, name in enumerate(classes))


def _choices(classes: Sequence[str]) -> str:
    if _numbers_are_names(classes):
        return f"one of the names {listed(classes)}"
    return f"a name or a number from 0 to {len(classes) - 1}"
