"""A session's inputs and outputs in buffers that are allocated once per batch size and bound to it, as its provider likes them best."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fastcm.generation.onnx_contract import Contract

# Idle buffers that are kept: a caller's batch size, the rest of a division by it, and some more.
KEPT = 4


class BoundBatch:
    """Buffers of one batch size on the session's device. Not thread-safe."""

    def __init__(self, session, contract: Contract, batch: int, device: str):
        import onnxruntime

        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self.batch = batch
        self._session, self._binding, self._options = session, session.io_binding(), onnxruntime.RunOptions()
        self._inputs = {name: make([batch, *shape], dtype, device, 0) for name, (shape, dtype) in contract.inputs.items()}
        shape, dtype = contract.output
        self._images = make([batch, *shape], dtype, device, 0)
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output("images", self._images)
        # Sessions with CUDA graphs keep one per number; others ignore it.
        self._options.add_run_config_entry("gpu_graph_id", str(batch))

    def __call__(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(feeds[name]))
        self._session.run_with_iobinding(self._binding, self._options)
        return self._images.numpy().copy()  # on the CPU it is the buffer itself


class Buffers:
    """Calls of a session through bound buffers. Safe to call from many threads: on the CPU each takes buffers of its own; on CUDA, where a
    captured graph owns its addresses, they take turns, and batches are padded to powers of two so that few graphs serve all sizes."""

    def __init__(self, session, contract: Contract, device: str):
        self._session, self._contract, self._device = session, contract, device
        self._idle: list[BoundBatch] = []
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Feeds of any batch size, one row per image -> images."""
        count = len(next(iter(feeds.values())))
        size = self._contract.batch or (count if self._device == "cpu" else 1 << (count - 1).bit_length())
        parts = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)  # the last row fills up what is missing
            part = feeds if size == count else {name: array[rows] for name, array in feeds.items()}
            with self._bound(size) as bound:
                parts.append(bound(part))
        return parts[0][:count] if len(parts) == 1 else np.concatenate(parts)[:count]

    @contextmanager
    def _bound(self, size: int) -> Iterator[BoundBatch]:
        if self._device != "cpu":
            self._turn.acquire()
        try:
            with self._lock:
                bound = next((idle for idle in self._idle if idle.batch == size), None)
                if bound is not None:
                    self._idle.remove(bound)
            bound = BoundBatch(self._session, self._contract, size, self._device) if bound is None else bound
            yield bound
            with self._lock:
                # Captured graphs live as long as their buffers, so those on CUDA all stay: one per power of two.
                self._idle = [bound, *self._idle][: KEPT if self._device == "cpu" else None]
        finally:
            if self._device != "cpu":
                self._turn.release()
