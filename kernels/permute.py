"""The order of data: a keyed permutation of range(n), one per epoch, that is computed and never stored."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from fastcm.kernels.philox import philox_words

STREAM_DATA_ORDER = 4


def permute(index: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Returns the places [...] int64 of the indices [...] int64 in a permutation of range(n) keyed by (seed, epoch), in O(1) memory.

    An eight-round Feistel network over a grid a x b >= n whose sides differ by at most one, with cycle walking (Black and Rogaway 2002,
    Ciphers with arbitrary finite domains). Round keys are the words of stream 4 at position = epoch; the round function is the finalizer
    of splitmix64. Stateless: data order needs no shuffle buffer. ValueError for an index outside range(n).
    """
    index = np.asarray(index)
    if not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"wrong dtype in permute(index): {index.dtype}. Use int64.")
    if n < 1:
        raise ValueError(f"illegal value in permute(n): {n}. Use at least 1.")
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"index out of range in permute(index): {index.min()} to {index.max()}. Use 0 to {n - 1}.")
    side_a = math.isqrt(n - 1) + 1
    side_b = -(-n // side_a)
    keys = _round_keys(seed, epoch)
    place = _feistel(index.astype(np.uint64).ravel(), side_a, side_b, keys)
    # The image of a walk that starts inside range(n) returns to it, because the network is a permutation of the whole grid.
    while (outside := np.flatnonzero(place >= n)).size:
        place[outside] = _feistel(place[outside], side_a, side_b, keys)
    return place.astype(np.int64).reshape(index.shape)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    """Eight 64-bit keys: the words of the counters 0 .. 3, joined in pairs, low word first."""
    words = philox_words(torch.tensor([seed]), torch.tensor([epoch]), torch.arange(4), stream=STREAM_DATA_ORDER)
    low, high = words.view(8, 2).unbind(-1)
    return tuple(np.uint64((int(h) << 32) | int(w)) for w, h in zip(low, high, strict=True))


def _feistel(place: np.ndarray, side_a: int, side_b: int, keys: Sequence[np.uint64]) -> np.ndarray:
    a, b = np.uint64(side_a), np.uint64(side_b)
    left, right = place // b, place % b
    for i, key in enumerate(keys):
        if i % 2:
            right = (right + _mix(left ^ key) % b) % b
        else:
            left = (left + _mix(right ^ key) % a) % a
    return left * b + right


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
