"""Timing of competitors in turns: one call of each per round, in shuffled order, so that a slow second of the machine meets all of them."""

import gc
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

PERCENTILES = (20, 50, 80, 95, 99)


class Limits(NamedTuple):
    """How long one interleaved measurement runs: at least `fewest` rounds, then until `seconds` have passed or `most` rounds are done.

    Where `fewest` would take ten times the seconds, three rounds have to do.
    """

    seconds: float
    fewest: int
    most: int

    def go_on(self, done: int, began: float) -> bool:
        passed = time.perf_counter() - began
        least = self.fewest if self.seconds == 0 or passed < 10 * self.seconds else min(self.fewest, 3)
        return done < least or (done < self.most and passed < self.seconds)


def rounds(
    calls: dict[str, Callable[[int], object]],
    limits: Limits,
    *,
    settle_s: float = 0.0,
    warm: int = 0,
    clock: Callable[[], int] | None = None,
) -> dict[str, np.ndarray]:
    """Milliseconds of call(round), fp64 [rounds] per name, on the host's clock; a call returns when its work is done.

    clock: nanoseconds, in place of the host's: `time.process_time_ns` counts the processor's work alone, whatever else runs.
    settle_s: idle time before each turn, in which the worker threads of the one before go to sleep. warm: calls of a turn before the one
    that counts, which find its own threads asleep and its caches cold.
    """
    clock = clock or time.perf_counter_ns

    def milliseconds(call: Callable[[int], object], done: int) -> float:
        time.sleep(settle_s)
        for _ in range(warm):
            call(done)
        start = clock()
        call(done)
        return (clock() - start) / 1e6

    return _in_turns(calls, limits, milliseconds)


def device_rounds(calls: dict[str, Callable[[], object]], limits: Limits) -> dict[str, np.ndarray]:
    """As `rounds`, between two events on the current CUDA stream: without what the host does before and after."""

    def milliseconds(call: Callable[[], object], _: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return _in_turns(calls, limits, milliseconds)


def _in_turns(calls: dict[str, Callable], limits: Limits, milliseconds: Callable[[Callable, int], float]) -> dict[str, np.ndarray]:
    times = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    with _no_collection():
        began, done = time.perf_counter(), 0
        while limits.go_on(done, began):
            shuffle(order)
            for name in order:
                times[name].append(milliseconds(calls[name], done))
            done += 1
    return {name: np.array(values) for name, values in times.items()}


@contextmanager
def _no_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def percentiles(milliseconds: np.ndarray, *, prefix: str = "") -> dict[str, float]:
    """{"p20_ms": ..., ..., "p99_ms": ...} to four digits."""
    values = np.percentile(milliseconds, PERCENTILES)
    return {f"{prefix}p{percent}_ms": rounded(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def speedup(of: np.ndarray, over: np.ndarray) -> float:
    """How many times faster `of` was than `over`: the median of over / of, round by round."""
    return rounded(np.median(over / of))


def rounded(value: float) -> float:
    return float(f"{value:.4g}")
