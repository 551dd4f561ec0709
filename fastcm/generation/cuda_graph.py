"""Recording work as CUDA graphs: one capture at a time in a process, on a stream of its device; and one batch size of a generator so."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from fastcm.generation.cuda_choices import tried_convolutions

# CUDA allows one capture at a time in a process: another's beginning waits for the device, which breaks both.
_one_at_a_time = threading.RLock()
# Before 2.12 (pull request 180395 of pytorch) a capture that fails leaves torch's allocator in it.
ENDS_FAILED_CAPTURES = (2, 12)


@contextmanager
def warm_up(stream: torch.cuda.Stream) -> Iterator[None]:
    """Within, the thread works on `stream` as it will while `recorded`: libraries choose algorithms and allocate workspaces here."""
    current = torch.cuda.current_stream(stream.device)
    with _one_at_a_time, torch.cuda.device(stream.device), tried_convolutions():
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)


@contextmanager
def recorded(graph: torch.cuda.CUDAGraph, *, pool: tuple[int, int], stream: torch.cuda.Stream) -> Iterator[None]:
    """Within, the thread's work on the stream's device goes into `graph` and is not done. Other threads go on using CUDA meanwhile.

    Where it fails, the thread's stream and the allocator are as before, and the first error of the chain is raised: that which ends the
    recording says less. An error of the memory's goes before others.
    """
    # The outer stream context is left also where the inner one is not: by a torch.cuda.graph whose end raises.
    with _one_at_a_time, torch.cuda.device(stream.device), torch.cuda.stream(stream), tried_convolutions():
        failed = None
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield
        except Exception as error:
            failed = error
        if failed is not None:  # raised within the handler, the cause would have what follows from it as its context
            _end_allocation(stream.device, pool)
            raise cause_of(failed)


def cause_of(error: BaseException) -> BaseException:
    """The first error of those that were raised while another was handled; where memory ran out on the way, that one."""
    cause = error
    while cause.__context__ is not None and not isinstance(cause, torch.OutOfMemoryError):
        cause = cause.__context__
    return cause


def _end_allocation(device: torch.device, pool: tuple[int, int]) -> None:
    """Takes the allocator out of a capture that older versions of torch have left it in; without, empty_cache and captures would fail."""
    if torch.torch_version.TorchVersion(torch.__version__) >= ENDS_FAILED_CAPTURES:
        return
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    except RuntimeError:  # it was not in one
        pass


class CapturedBatch:
    """Replays run(seeds, labels) -> tensors for one shape of its arguments, int64 [B]. Not thread-safe: the caller holds a lock.

    The buffers on the host are pinned, so that the device copies from and to them by itself, in the order of the stream. The graph reads
    what `run` refers to by its address, so `run` lives as long as the graph.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
        seeds: np.ndarray,
        labels: np.ndarray | None,
        *,
        pool: tuple[int, int],
        stream: torch.cuda.Stream,
    ):
        self._run = run
        with _one_at_a_time:
            given = [torch.from_numpy(array.copy()) for array in (seeds, labels) if array is not None]
            self._sources = [tensor.pin_memory() for tensor in given]
            self._inputs = [tensor.to(stream.device) for tensor in given]
            arguments = (*self._inputs, None)[:2]
            with warm_up(stream):
                for _ in range(3):
                    run(*arguments)
            self.graph = torch.cuda.CUDAGraph()
            # One memory pool for all graphs of a generator: none runs beside another.
            with recorded(self.graph, pool=pool, stream=stream):
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
