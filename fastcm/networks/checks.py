"""Checks that the network configurations share: each failure is one line that names the field."""

from fastcm.errors import InputError, nearest

# No network has more; a file that asks for millions would keep its reader busy for ever.
MOST_LEVELS, MOST_BLOCKS = 16, 256


def require(condition: bool, field: str, value, remedy: str) -> None:
    """Raises InputError for `network.<field>` unless `condition` holds."""
    if not condition:
        shown = list(value) if isinstance(value, tuple) else value
        raise InputError(f"illegal value in network.{field}: {shown}. {remedy}")


def require_counts(config, names: tuple[str, ...], *, optional: bool = False) -> None:
    """Each named field is a positive integer, or None where that is allowed."""
    for name in names:
        value = getattr(config, name)
        is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        require(
            is_count or (optional and value is None), name, value, "Give a positive integer" + (" or leave it out." if optional else ".")
        )


def require_choice(config, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    require(value in choices, name, value, f"Choose one of {', '.join(choices)}.{nearest(value, choices)}")


def require_dropout(config) -> None:
    is_number = isinstance(config.dropout, (int, float)) and not isinstance(config.dropout, bool)
    require(is_number and 0 <= config.dropout < 1, "dropout", config.dropout, "Give a number from 0 up to but not including 1.")


def require_levels(config) -> None:
    """channel_mult keeps the widths whole, resolution halves evenly, and attention happens at resolutions that halving reaches."""
    mults, count = config.channel_mult, len(config.channel_mult)
    require(count <= MOST_LEVELS, "channel_mult", f"{count} levels", f"Give {MOST_LEVELS} at most.")
    require(config.blocks <= MOST_BLOCKS, "blocks", config.blocks, f"Give {MOST_BLOCKS} at most.")
    whole = all(mult > 0 and config.channels * mult == int(config.channels * mult) for mult in mults)
    require(count > 0 and whole, "channel_mult", mults, "Give positive factors, e.g. 1,2, that keep channels whole.")
    factor = 2 ** (count - 1)
    require(
        config.resolution % factor == 0, "resolution", config.resolution, f"Give a multiple of {factor}: channel_mult has {count} levels."
    )
    # Published option lists name resolutions that a shallow network does not reach; those are harmless, others are mistakes.
    reachable = [config.resolution >> shift for shift in range(config.resolution.bit_length())]
    for pixels in config.attention_resolutions:
        require(pixels in reachable, "attention_resolutions", pixels, f"Choose among {', '.join(map(str, reachable[:count]))} pixels.")
