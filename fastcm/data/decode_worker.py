"""A process that decodes pictures into a file of raw pixels: one JSON line in per block, one out. Started by decode_pool.py.

Not `multiprocessing`: its children import the user's script again, which then needs a guard, and its pipes carry pickles.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastcm.data.decoding import BadImageError, OtherSizeError, bombs_raise, decode, read_header
from fastcm.data.spans import ChangedError, Span, read_span


class Task(NamedTuple):
    """What to do with every picture. out: the file of pixels; exact: pictures must have the resolution already."""

    out: str
    resolution: int
    channels: int
    exact: bool

    @property
    def row_bytes(self) -> int:
        return self.channels * self.resolution**2


class Result(NamedTuple):
    """What became of one block.

    bad: (place in the block, reason) of unreadable pictures, whose pixels stay zero. other: (place, width, height) of the first picture
    that is not of the exact size. changed: the path of a file that is not the one listed. failed: why the pixels could not be written.
    """

    bad: list[tuple[int, str]]
    other: tuple[int, int, int] | None = None
    changed: str | None = None
    failed: str | None = None


def decode_block(task: Task, descriptor: int, slot: int, spans: Sequence[Span]) -> Result:
    """Decodes the pictures and writes them, uint8 [C, resolution, resolution] each, at row `slot` of the open file."""
    pixels = np.zeros((len(spans), task.channels, task.resolution, task.resolution), np.uint8)
    bad = []
    for place, span in enumerate(spans):
        try:
            pixels[place] = decode(read_span(span), resolution=task.resolution, channels=task.channels, exact=task.exact)
        except BadImageError as error:
            bad.append((place, str(error)))
        except OtherSizeError as error:
            return Result(bad, other=(place, *error.size))
        except ChangedError as error:
            return Result(bad, changed=str(error))
    try:
        data, offset = memoryview(pixels).cast("B"), slot * task.row_bytes
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        return Result(bad, failed=error.strerror or str(error))
    return Result(bad)


def find_colour(spans: Sequence[Span]) -> bool:
    """Whether one of the pictures is not grey; unreadable ones say nothing."""
    for span in spans:
        try:
            if not read_header(read_span(span)).is_grey:
                return True
        except (BadImageError, ChangedError):
            continue
    return False


def answer(task: Task, descriptor: int, job: dict[str, Any]) -> Any:
    spans = [Span(*fields) for fields in job["spans"]]
    return find_colour(spans) if job["slot"] is None else decode_block(task, descriptor, job["slot"], spans)


def main() -> None:
    """Answers lines until the input ends; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bombs_raise()
    task = Task(*json.loads(sys.stdin.readline()))
    descriptor = os.open(task.out, os.O_WRONLY | os.O_CLOEXEC)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(task, descriptor, json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
