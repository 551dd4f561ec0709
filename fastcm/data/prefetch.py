"""The next batch is always ready: prepared ahead by a thread, or taken from a data set that lies on the device as a whole."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastcm.data.dataset import Dataset
from fastcm.data.streaming import StreamedImages

Parts = tuple[Tensor, Tensor | None, Tensor]  # images uint8 [B, C, H, W], labels int64 [B] or None, positions int64 [B]
RESIDENT_SHARE = 0.1  # of a GPU's memory: a data set up to this size is kept there
COPY_BYTES = 64 << 20


class Prefetcher:
    """Gives what `dataset.batch(first, size, seed=seed)` gives, and has the batches after it (each `stride` further) prepared meanwhile.

    wait_s: seconds that the caller has waited for batches so far. depth: batches prepared ahead. pin: in page-locked memory, from where the
    host does not wait for copies to a GPU, which take their turn among its work. An error of the data set is raised by the call for its
    batch. Close it, or use it as a context.
    """

    def __init__(self, dataset: Dataset, *, seed: int, size: int, stride: int, depth: int = 2, pin: bool = False):
        self.dataset, self.seed, self.size, self.stride, self.depth, self.pin = dataset, seed, size, stride, depth, pin
        self.wait_s = 0.0
        self._thread = ThreadPoolExecutor(1, "fastcm-batches")
        self._ahead: deque[tuple[int, Future[Parts]]] = deque()
        self._last: tuple[int, Parts] | None = None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def batch(self, first: int) -> Parts:
        """The `size` images from place `first` of the run on. Out of order (a resumed run, a batch once more) it is merely not ready."""
        if self._last is not None and self._last[0] == first:
            return self._last[1]
        began = time.perf_counter()
        if not self._ahead or self._ahead[0][0] != first:
            self._drop()
            self._submit(first)
        place, future = self._ahead.popleft()
        while len(self._ahead) < self.depth:  # asked for before the wait, so that the thread is never idle
            self._submit(self._ahead[-1][0] + self.stride if self._ahead else place + self.stride)
        try:
            self._last = first, future.result()
        except BaseException:
            self._drop()
            raise
        self.wait_s += time.perf_counter() - began
        return self._last[1]

    def close(self) -> None:
        """Ends the thread, after the batch that it is at."""
        self._drop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, first: int) -> None:
        self._ahead.append((first, self._thread.submit(self._prepare, first)))

    def _prepare(self, first: int) -> Parts:
        images, labels, positions = self.dataset.batch(first, self.size, seed=self.seed)
        if not self.pin:
            return images, labels, positions
        return images.pin_memory(), None if labels is None else labels.pin_memory(), positions.pin_memory()

    def _drop(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()


class ResidentBatches:
    """As Prefetcher, from a copy of the whole data set in the device's memory: only row numbers travel, nothing is waited for."""

    def __init__(self, dataset: Dataset, *, seed: int, size: int, device: torch.device):
        self.dataset, self.seed, self.size, self.wait_s = dataset, seed, size, 0.0
        self.images = torch.empty(dataset.images.shape, dtype=torch.uint8, device=device)
        self.places = torch.arange(size, device=device)
        rows = max(1, COPY_BYTES // int(np.prod(dataset.images.shape[1:])))
        for start in range(0, len(dataset), rows):
            self.images[start : start + rows].copy_(torch.from_numpy(np.array(dataset.images[start : start + rows])))
        self.labels = None if dataset.labels is None else torch.from_numpy(np.array(dataset.labels)).to(device)

    def batch(self, first: int) -> Parts:
        """The `size` images from place `first` of the run on, on the device."""
        rows = torch.from_numpy(self.dataset.rows(first + np.arange(self.size, dtype=np.int64), seed=self.seed))
        if self.images.is_cuda:  # from memory that can be paged the copy would wait for the device
            rows = rows.pin_memory()
        rows = rows.to(self.images.device, non_blocking=True)
        labels = None if self.labels is None else self.labels[rows]
        return self.images[rows], labels, self.places + first

    def close(self) -> None:
        """Frees the copy."""
        self.images, self.labels = self.images[:0], None


def batches(dataset: Dataset, *, seed: int, size: int, stride: int, device: torch.device) -> Prefetcher | ResidentBatches:
    """The way to batches that suits the device: resident where the set is small beside a GPU's memory, else prepared ahead."""
    if device.type == "cuda" and not isinstance(dataset.images, StreamedImages):
        if dataset.images.nbytes <= RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory:
            return ResidentBatches(dataset, seed=seed, size=size, device=device)
    return Prefetcher(dataset, seed=seed, size=size, stride=stride, pin=device.type == "cuda")
