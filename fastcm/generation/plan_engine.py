"""A TensorRT engine on a CUDA device: buffers allocated once per batch size, pinned on the host, and a captured CUDA graph of each."""

import logging
import threading
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcm.errors import InputError, RunError
from fastcm.generation.onnx_contract import Contract

DEVICE = "cuda"
log = logging.getLogger("fastcm")


class Batches(NamedTuple):
    """The smallest and the largest batch that an engine takes."""

    smallest: int
    largest: int

    def size(self, count: int) -> int:
        """The batch that `count` images are run in: a power of two, so that few graphs serve all sizes, within the engine's limits."""
        return min(max(1 << (count - 1).bit_length(), self.smallest), self.largest)


class BoundEngine:
    """An execution context of one batch size. Not thread-safe: the caller takes turns."""

    def __init__(self, trt: ModuleType, engine, contract: Contract, batch: int):
        self._stream = torch.cuda.Stream()
        self._context = _context(trt, engine)
        values = {**contract.inputs, "images": contract.output}
        on_host = {name: pinned((batch, *shape), dtype) for name, (shape, dtype) in values.items()}
        on_device = {name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=DEVICE) for name, tensor in on_host.items()}
        self._result, self._images = on_host.pop("images"), on_device.pop("images")
        self._sources, self._inputs = on_host, on_device
        for name, tensor in self._inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise RunError(f"the engine takes no {name} of shape {list(tensor.shape)}. Build it for this batch: --profile.")
        for name, tensor in {**self._inputs, "images": self._images}.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._graph = self._captured()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The engine as a CUDA graph; None, and a line that says so, where it cannot be captured."""
        torch.cuda.synchronize()  # the buffers were filled on another stream
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # compiles kernels for these shapes and allocates
                self._enqueue()
            self._stream.synchronize()
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT for RTX alone has it
        if capturable is not None and not capturable(self._stream.cuda_stream):
            log.warning("no CUDA graph of this engine: it allocates while it runs. Images are drawn without it.")
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._enqueue()
        return graph

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RunError("the engine failed to run. Build it again with this version of TensorRT.")

    def __call__(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        with torch.cuda.stream(self._stream):
            for name, source in self._sources.items():
                source.numpy()[:] = feeds[name]
                self._inputs[name].copy_(source, non_blocking=True)
            if self._graph is None:
                self._enqueue()
            else:
                self._graph.replay()
            self._result.copy_(self._images, non_blocking=True)
            self._stream.synchronize()
        return self._result.numpy().copy()


class PlanEngine:
    """A serialised engine as a function of feeds. Safe to call from many threads, which take turns.

    batches: what it was built for. Raises InputError where this device or version cannot run it, or its values are not the contract's.
    """

    def __init__(self, trt: ModuleType, logger, plan: bytes, contract: Contract, batches: Batches, *, name: str):
        self._trt, self._contract, self._batches = trt, contract, batches
        logger.errors.clear()
        self._runtime = trt.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise InputError(f"an engine that cannot run here in MODEL: {name}: {logger.reason()}. Build it again for this card.")
        self._engine = engine
        found = {engine.get_tensor_name(index): index for index in range(engine.num_io_tensors)}
        stated = {**contract.inputs, "images": contract.output}
        for tensor, (shape, dtype) in stated.items():
            form = (tuple(engine.get_tensor_shape(tensor))[1:], engine.get_tensor_dtype(tensor)) if tensor in found else None
            if form != (shape, _type(trt, dtype)) or len(found) != len(stated):
                raise InputError(f"another engine than its manifest says in MODEL: {name}, {tensor} of {', '.join(found)}. Build it again.")
        self._bound: dict[int, BoundEngine] = {}
        self._turn = threading.Lock()

    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Feeds of any batch size, one row per image -> images; what is missing in a batch is filled up by its last row."""
        count = len(next(iter(feeds.values())))
        size, parts = self._batches.size(count), []
        with self._turn:
            for start in range(0, count, size):
                rows = np.minimum(np.arange(start, start + size), count - 1)
                if size not in self._bound:
                    self._bound[size] = BoundEngine(self._trt, self._engine, self._contract, size)
                parts.append(self._bound[size]({name: array[rows] for name, array in feeds.items()}))
        return np.concatenate(parts)[:count]


def pinned(shape: tuple[int, ...], dtype: type) -> Tensor:
    """A buffer on the host that the device copies from and to by itself."""
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), pin_memory=True)


def _type(trt: ModuleType, dtype: type):
    return getattr(trt.DataType, {"float32": "FLOAT", "int64": "INT64", "uint8": "UINT8"}[np.dtype(dtype).name])


def _context(trt: ModuleType, engine):
    """TensorRT for RTX compiles kernels for a shape when it meets it: at once here, since a captured graph keeps what it captured."""
    if not hasattr(engine, "create_runtime_config"):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)
