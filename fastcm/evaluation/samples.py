"""Sets of images to be measured: arrays, or streams that are drawn block by block so that memory does not grow with their number."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fastcm.errors import InputError

BLOCK = 256


@dataclass(frozen=True, eq=False)
class Stream:
    """Images made on demand. shape: [N, C, H, W]; draw() yields uint8 [B, C, H, W] blocks, N images in all, the same at every call."""

    shape: tuple[int, int, int, int]
    draw: Callable[[], Iterable[np.ndarray]]

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True, eq=False)
class Samples:
    """A set of generated images: uint8 [N, C, H, W] or a stream of them, the labels they were asked for, int64 [N] or None.

    nfe: network calls per image, where known.
    """

    name: str
    images: np.ndarray | Stream
    labels: np.ndarray | None = None
    nfe: int | None = None

    def blocks(self) -> Iterator[np.ndarray]:
        """The images once, in order, in blocks of 256 and a last one, however they were drawn: what follows has a cost per block."""
        if not isinstance(self.images, Stream):
            yield from (self.images[start : start + BLOCK] for start in range(0, len(self.images), BLOCK))
            return
        seen, held, waiting = 0, 0, []
        for part in self.images.draw():
            seen, held = seen + len(part), held + len(part)
            waiting.append(part)
            if held >= BLOCK:
                whole = np.concatenate(waiting)
                last = held - held % BLOCK
                yield from (whole[start : start + BLOCK] for start in range(0, last, BLOCK))
                waiting, held = [whole[last:].copy()], held - last
        if held:
            yield np.concatenate(waiting)
        if seen != len(self.images):
            raise InputError(f"other number of samples than announced in {self.name}: {seen} of {len(self.images)}. Draw them all.")


def check_shape(name: str, shape: Iterable[int], wanted: Iterable[int]) -> None:
    """Refuses samples of another (C, H, W) than the data's."""
    if tuple(shape) != tuple(wanted):
        shapes = f"{list(shape)} for {list(wanted)} (channels, height, width)"
        raise InputError(f"images of another shape than --data in {name}: {shapes}. Give data of their size and channels.")
