"""Checks that the network configurations share: each failure is one line that names the field."""

import sys

from fastcm.errors import InputError, nearest
from fastcm.networks import patches

# No network has more; a file that asks for millions would keep its reader busy for ever.
MOST_LEVELS, MOST_BLOCKS, MAX_CLASSES = 16, 256, 100_000
SECOND_TIMES = ("gap", "end")  # of blocks.SecondTime


def is_number(value) -> bool:
    """True for an int or float that is finite as a float; JSON and command lines bring booleans, text, NaN and integers of any length."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value) -> bool:
    """True for a positive int below 2^31."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def require(condition: bool, field: str, value, remedy: str) -> None:
    """Raises InputError for `network.<field>` unless `condition` holds."""
    if not condition:
        text = str(list(value) if isinstance(value, tuple) else value)
        text = text if len(text) <= 80 else f"{text[:77]}..."
        raise InputError(f"illegal value in network.{field}: {text}. {remedy}")


def require_counts(config, names: tuple[str, ...], *, optional: bool = False) -> None:
    """Each named field is a positive integer, or None where that is allowed."""
    for name in names:
        value = getattr(config, name)
        good = is_count(value) or (optional and value is None)
        require(good, name, value, "Give a positive integer" + (" or leave it out." if optional else "."))


def require_flags(config, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        require(isinstance(value, bool), name, value, "Give true or false.")


def require_tuples(config, names: tuple[str, ...]) -> None:
    """Each named field becomes a tuple of numbers; JSON has lists."""
    for name in names:
        value = getattr(config, name)
        good = isinstance(value, (list, tuple)) and all(map(is_number, value))
        require(good, name, value, "Give a list of numbers, e.g. 1,2.")
        object.__setattr__(config, name, tuple(value))


def require_choice(config, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    require(value in choices, name, value, f"Choose one of {', '.join(choices)}.{nearest(value, choices)}")


def require_second_time(config) -> None:
    if config.second_time is not None:
        require_choice(config, "second_time", SECOND_TIMES)


def takes_end(config, end) -> bool:
    """Whether the network has a second time. Raises InputError where it is told one and has none."""
    if config.second_time is None and end is not None:
        raise InputError("the end of an average velocity given to a network with network.second_time: None. Leave it out.")
    return config.second_time is not None


def require_classes(config) -> None:
    require_counts(config, ("num_classes",), optional=True)
    require((config.num_classes or 0) <= MAX_CLASSES, "num_classes", config.num_classes, f"At most {MAX_CLASSES:,} are supported.")


def require_guidance(config) -> None:
    weight = config.default_guidance
    require(weight is None or (is_number(weight) and weight >= 0), "default_guidance", weight, "Give a number from 0 on, or leave it out.")


def require_dropout(config) -> None:
    require(
        is_number(config.dropout) and 0 <= config.dropout < 1, "dropout", config.dropout, "Give a number from 0 up to but not including 1."
    )


def require_levels(config) -> None:
    """patch is one of a few, channel_mult keeps the widths whole, and attention happens at resolutions that halving reaches."""
    mults, count = config.channel_mult, len(config.channel_mult)
    require(count <= MOST_LEVELS, "channel_mult", f"{count} levels", f"Give {MOST_LEVELS} at most.")
    require(config.blocks <= MOST_BLOCKS, "blocks", config.blocks, f"Give {MOST_BLOCKS} at most.")
    whole = all(mult > 0 and config.channels * mult == int(config.channels * mult) for mult in mults)
    require(count > 0 and whole, "channel_mult", mults, "Give positive factors, e.g. 1,2, that keep channels whole.")
    known = ", ".join(map(str, patches.PATCHES))
    require(config.patch in patches.PATCHES and type(config.patch) is int, "patch", config.patch, f"Choose one of {known}.")
    # Published option lists name resolutions that a shallow network does not reach; those are harmless, others are mistakes.
    reachable = [config.pixels(0) >> shift for shift in range(config.pixels(0).bit_length())]
    for pixels in config.attention_resolutions:
        require(pixels in reachable, "attention_resolutions", pixels, f"Choose among {', '.join(map(str, reachable[:count]))} pixels.")
