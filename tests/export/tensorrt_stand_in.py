"""TensorRT's calls as its bindings have them, answered by ONNX Runtime on the CPU: an "engine" is the path of its ONNX file."""

import contextlib
import ctypes
import types
from pathlib import Path

import numpy as np
import torch

from fastcm.export.parity import cpu_run
from fastcm.generation import plan_engine


class StandIn(types.ModuleType):
    """log: the calls. broken: images are off by one. versions and refusals can be set by a test."""

    def __init__(self, log, name="tensorrt"):
        super().__init__(name)
        self.broken, self.capturing, self.capturable, self.__version__ = False, None, None, "10.15.1"
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.BuilderFlag = types.SimpleNamespace(TF32="tf32")
        self.DataType = types.SimpleNamespace(FLOAT="float32", INT64="int64", UINT8="uint8")
        self.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "WARNING": 2})
        self._compiler(log)
        self._runtime(log)

    def _compiler(self, log):
        class Shapes:
            def set_shape(self, name, smallest, tuned, largest):
                log.append(("shape", name, smallest, tuned, largest))

        class Cache:
            def serialize(self):
                return b"timings"

        class Config:
            def clear_flag(self, flag):
                log.append(("cleared", flag))

            def create_timing_cache(self, content):
                log.append(("cache", content))
                return Cache()

            def set_timing_cache(self, cache, ignore_mismatch):
                pass

            def add_optimization_profile(self, shapes):
                log.append("profile")

        class Builder:
            def __init__(self, logger):
                self.create_builder_config, self.create_optimization_profile = Config, Shapes

            def create_network(self, flags):
                log.append(("flags", flags))
                return types.SimpleNamespace(num_layers=3)

            def build_serialized_network(self, network, config):
                return network.path.encode()

        class OnnxParser:
            def __init__(self, network, logger):
                self.network = network

            def parse_from_file(self, path):
                self.network.path = path
                return path.endswith(".onnx")

        self.Builder, self.OnnxParser = Builder, OnnxParser

    def _runtime(self, log):
        stand = self

        class Context:
            def __init__(self, engine):
                self.engine, self.shapes, self.addresses = engine, {}, {}
                if stand.capturable is not None:
                    self.is_stream_capturable = lambda stream: stand.capturable

            def set_input_shape(self, name, shape):
                log.append(("bound", name, shape))
                self.shapes[name] = shape
                return True

            def set_tensor_address(self, name, address):
                self.addresses[name] = address
                return True

            def execute_async_v3(self, stream):
                if stand.capturing is not None:
                    stand.capturing.append(self.execute)
                else:
                    self.execute()
                return True

            def execute(self):
                log.append("executed")
                inputs = {name: self.engine.values[name][1] for name in self.shapes}
                images = self.engine.run({name: memory(self.addresses[name], self.shapes[name], kind) for name, kind in inputs.items()})
                memory(self.addresses["images"], images.shape, images.dtype)[:] = images + images.dtype.type(stand.broken)

        class Engine:
            def __init__(self, path):
                import onnx

                graph, kinds = onnx.load(path).graph, onnx.helper.tensor_dtype_to_np_dtype
                self.run, self.values = cpu_run(Path(path)), {}
                for value in (*graph.input, *graph.output):
                    kind = value.type.tensor_type
                    self.values[value.name] = [dim.dim_value or -1 for dim in kind.shape.dim], kinds(kind.elem_type)
                self.num_io_tensors = len(self.values)
                self.get_tensor_name = list(self.values).__getitem__
                self.get_tensor_shape = lambda name: self.values[name][0]
                self.get_tensor_dtype = lambda name: self.values[name][1].name
                self.create_execution_context = lambda: Context(self)

        self.Runtime = lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda plan: Engine(bytes(plan).decode()))


def memory(address, shape, dtype):
    """What lies at an address, as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)


def cpu_as_cuda(monkeypatch, stand, capability=(8, 6)):
    """The CPU in the place of a card, with streams and graphs that run at once."""
    stream = types.SimpleNamespace(cuda_stream=7, synchronize=lambda: None)

    class Graph:
        def __init__(self):
            self.calls = []

        def replay(self):
            for call in self.calls:
                call()

    @contextlib.contextmanager
    def capture(graph, **options):
        stand.capturing = graph.calls
        yield
        stand.capturing = None

    for name, fake in {
        "is_available": lambda: True,
        "get_device_capability": lambda: capability,
        "Stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(plan_engine, "DEVICE", "cpu")
    monkeypatch.setattr(plan_engine, "pinned", lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name)))
