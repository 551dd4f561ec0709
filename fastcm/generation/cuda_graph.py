"""One batch size of a generator captured as a CUDA graph: seeds and labels are copied in, one replay, images are copied out, one wait."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class CapturedBatch:
    """Replays run(seeds, labels) -> tensors for one shape of its arguments, int64 [B]. Not thread-safe: the caller holds a lock.

    The buffers on the host are pinned, so that the device copies from and to them by itself, in the order of the stream.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]], seeds: np.ndarray, labels: np.ndarray | None, *, device, pool
    ):
        given = [torch.from_numpy(array.copy()) for array in (seeds, labels) if array is not None]
        self._sources = [tensor.pin_memory() for tensor in given]
        self._inputs = [tensor.to(device) for tensor in given]
        arguments = (*self._inputs, None)[:2]
        # Libraries choose algorithms and allocate workspaces in their first calls, which a capture must not see.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                run(*arguments)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # One memory pool for all graphs: none runs beside another. Other threads may go on using CUDA meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = run(*arguments)
        self._results = [torch.empty(output.shape, dtype=output.dtype, pin_memory=True) for output in self._outputs]

    def __call__(self, seeds: np.ndarray, labels: np.ndarray | None) -> list[np.ndarray]:
        """The outputs, in buffers that the next call overwrites."""
        for source, tensor, array in zip(self._sources, self._inputs, (seeds, labels), strict=False):
            source.numpy()[:] = array
            tensor.copy_(source, non_blocking=True)
        self.graph.replay()
        for result, output in zip(self._results, self._outputs, strict=True):
            result.copy_(output, non_blocking=True)
        torch.cuda.current_stream(self._inputs[0].device).synchronize()
        return [result.numpy() for result in self._results]
