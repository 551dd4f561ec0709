"""How often a fault is injected: a few times in the test suite, as often as docs/reliability.md states under `make faults`."""

import os

FULL = os.environ.get("FASTCM_FAULTS") == "full"


def times(few: int, full: int) -> int:
    """`full` under `make faults`, else `few`."""
    return full if FULL else few
