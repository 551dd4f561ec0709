"""Gives a torch without CUDA two CUDA devices in the CPU's memory (device.cpp): `install()` after torch's import, before its use."""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEVICES = 2
# Three processors, so that kernels that loop over more blocks than programs do so.
PROPERTIES = types.SimpleNamespace(
    name="pretended CUDA device",
    major=9,
    minor=0,
    total_memory=16 << 30,
    multi_processor_count=3,
    L2_cache_size=1 << 20,
    is_integrated=0,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    regs_per_multiprocessor=65536,
)
ops = None  # torch.ops.pretended, once installed
# As in torch before 2.12: the allocator takes a capture that failed for one underway, until its pool is ended by hand.
failed_captures_stay = False
broken: list[tuple[int, int]] = []


def library(torch) -> Path:
    """The compiled device.cpp, made once for each text of it and each torch."""
    source = HERE / "device.cpp"
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("PRETENDED_CUDA_BUILD") or Path(tempfile.gettempdir()) / "fastcm-pretended-cuda")
    built = folder / f"{key}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        root, partial = Path(torch.__file__).parent, built.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-w", str(source), "-o", str(partial)]
        command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include", f"-L{root}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True)
        partial.replace(built)
    return built


def install() -> None:
    """Once a process: from here on torch.cuda has devices, and torch.compile leaves alone what it would make code for."""
    global ops
    if ops is not None:
        return
    import torch

    path = library(torch)
    torch.ops.load_library(str(path))
    ops = torch.ops.pretended
    ops.install()
    _patch_cuda(torch)
    _patch_compile(torch)
    _patch_triton(torch, ctypes.CDLL(str(path)))


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device=None, priority=0, *, stream_id=None, device_index=None, device_type=1):
        self.device_index = index_of(device) if device_index is None else device_index
        self.stream_id = ops.new_stream() if stream_id is None else stream_id
        self.device_type, self.priority, self._before = 1, priority, []

    @property
    def device(self):
        import torch

        return torch.device("cuda", self.device_index)

    cuda_stream = property(lambda self: self.stream_id)

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def query(self):
        return True

    def synchronize(self):
        ops.wait_for_stream(self.stream_id)

    def __eq__(self, other):
        return isinstance(other, Stream) and (other.stream_id, other.device_index) == (self.stream_id, self.device_index)

    def __hash__(self):
        return hash((self.stream_id, self.device_index))


class Event:
    """torch.cuda.Event: the host's clock stands for the device's."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self._at = None

    def record(self, stream=None):
        self._at = time.perf_counter()

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        ops.wait_for_stream(ops.current_stream(ops.current_device()))

    def elapsed_time(self, end):
        return max((end._at - self._at) * 1000, 1e-3)


class CUDAGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph=False):
        self.number = ops.new_graph()

    def capture_begin(self, pool=None, capture_error_mode="global", check_input_liveness=False):
        self._pool = graph_pool_handle() if pool is None else pool
        ops.begin_capture(self.number, self._pool[0], ops.current_stream(ops.current_device()))

    def capture_end(self):
        try:
            ops.end_capture(self.number)
        except RuntimeError:
            if failed_captures_stay:
                broken.append(self._pool)
            raise

    def replay(self):
        import torch

        with torch.profiler.record_function("cudaGraphLaunch"):
            ops.replay(self.number)

    def pool(self):
        return self._pool

    def reset(self):
        ops.drop_graph(self.number)

    def nodes(self):
        """The names of what it repeats, in order."""
        return ops.nodes(self.number)

    def __del__(self):
        if not sys.is_finalizing():
            ops.drop_graph(self.number)


def graph_pool_handle():
    return (ops.new_pool(), 0)


def index_of(device) -> int:
    """The number of a device given as torch.cuda takes it; the current one for None."""
    import torch

    if device is None:
        return ops.current_device()
    index = device if isinstance(device, int) else torch.device(device).index
    return ops.current_device() if index is None or index < 0 else index


def _set_device(device):
    ops.set_device(index_of(device))


def _exchange_device(index):
    before = ops.current_device()
    if index >= 0:
        ops.set_device(index)
    return before


def _set_stream(stream):
    if stream is not None:  # as CUDA has it, whose current device is the stream's from here on
        ops.set_stream(stream.device_index, stream.stream_id)
        ops.set_device(stream.device_index)


def _empty_cache():
    if broken:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


def _end_allocation(device, pool):
    if pool not in broken:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    broken.remove(pool)


def _memory_stats(device=None):
    now, peak = ops.memory()
    return {
        "allocated_bytes.all.current": now,
        "allocated_bytes.all.peak": peak,
        "num_device_alloc": 0,
        "num_ooms": 0,
        "num_alloc_retries": 0,
    }


def _patch_cuda(torch) -> None:
    cuda, now = torch.cuda, lambda device=None: ops.memory()[0]
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: ops.current_device(),
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "_exchange_device": lambda index: _exchange_device(index),
        "_maybe_exchange_device": lambda index: _exchange_device(index),
        "set_device": _set_device,
        "get_device_properties": lambda device=None: PROPERTIES,
        "_get_device_properties": lambda device=None: PROPERTIES,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "current_stream": lambda device=None: Stream(stream_id=ops.current_stream(index_of(device)), device_index=index_of(device)),
        "default_stream": lambda device=None: Stream(stream_id=0, device_index=index_of(device)),
        "set_stream": _set_stream,
        "synchronize": lambda device=None: ops.wait_for_device(),
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": lambda: ops.is_capturing(),
        "memory_stats": _memory_stats,
        "memory_allocated": now,
        "memory_reserved": lambda device=None: ops.memory()[0],
        "max_memory_allocated": lambda device=None: ops.memory()[1],
        "max_memory_reserved": lambda device=None: ops.memory()[1],
        "reset_peak_memory_stats": lambda device=None: ops.reset_peak(),
        "empty_cache": _empty_cache,
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory - ops.memory()[0], PROPERTIES.total_memory),
        "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state.cpu()),
        "set_sync_debug_mode": lambda mode: ops.forbid_waits(mode in ("error", 2)),
        "default_generators": (torch.default_generator,) * DEVICES,
    }
    for name, value in replaced.items():
        for part in (cuda, cuda.graphs, cuda.streams, cuda.memory, cuda.random):
            if part is cuda or hasattr(part, name):
                setattr(part, name, value)
    cuda._initialized = True
    native = {
        "_cuda_getDeviceCount": lambda: DEVICES,
        "_cuda_getDevice": lambda: ops.current_device(),
        "_cuda_setDevice": lambda index: ops.set_device(index),
        "_cuda_synchronize": lambda: ops.wait_for_device(),
        "_host_emptyCache": lambda: None,
        "_cuda_emptyCache": lambda: None,
        "_cuda_getCurrentRawStream": lambda index: ops.current_stream(index),
        "_cuda_isCurrentStreamCapturing": lambda: ops.is_capturing(),
        "_cuda_isInBadFork": lambda: False,
        "_cuda_endAllocateToPool": _end_allocation,
        "_cuda_releasePool": lambda device, pool: None,
    }
    for name, value in native.items():
        setattr(torch._C, name, value)
    torch.version.cuda = "0.0"
    torch.backends.cuda.is_built = lambda: True
    torch.backends.cudnn.version = lambda: 0
    _patch_profiler(torch)


def _patch_profiler(torch) -> None:
    begin = torch.profiler.profile.__init__

    def begin_on_host(self, *, activities=None, **options):  # the device has no activity of its own to ask for
        begin(self, activities=[torch.profiler.ProfilerActivity.CPU], **options)

    torch.profiler.profile.__init__ = begin_on_host


def _patch_compile(torch) -> None:
    """Inductor would write code for a GPU: what is compiled runs as it is. Its CUDA graphs need the real allocator."""

    class Uncompiled(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)

        def forward(self, *arguments, **options):
            return self._orig_mod(*arguments, **options)

    def compile(model=None, **options):
        if model is None:
            return lambda function: function
        return Uncompiled(model) if isinstance(model, torch.nn.Module) else model

    trees = types.ModuleType("torch._inductor.cudagraph_trees")
    trees.reset_cudagraph_trees = trees.mark_step_begin = lambda: None
    sys.modules[trees.__name__] = trees
    torch.compile = compile


def _patch_triton(torch, library) -> None:
    """Launches under TRITON_INTERPRET=1 work on a device's memory, and are recorded where its stream is capturing."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    launch, interpreter, launches = GridExecutor.__call__, threading.RLock(), []
    called = ctypes.CFUNCTYPE(None, ctypes.c_int64)(lambda number: launches[number]())
    library.call_for_launches(called)

    def tensors(values):
        for value in values:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (tuple, list)):
                yield from tensors(value)

    def on_host(value):
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return ops.host_alias(value.detach())
        return type(value)(map(on_host, value)) if type(value) in (tuple, list) else value

    def launch_here(self, *arguments, **options):
        used = [tensor for tensor in tensors([*arguments, *options.values()])]
        if any(tensor.is_cuda for tensor in used):
            if not all(tensor.is_cuda for tensor in used):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            if {tensor.get_device() for tensor in used} != {ops.current_device()}:
                raise ValueError("Pointer argument cannot be accessed from Triton (another device than the current one)")
            arguments = tuple(map(on_host, arguments))
            options = {name: on_host(value) for name, value in options.items()}

        def run():
            with interpreter, torch.no_grad():
                launch(self, *arguments, **options)

        if used and used[0].is_cuda and ops.is_capturing():
            launches.append(run)
            ops.record_launch(getattr(self.fn, "__name__", "kernel"), len(launches) - 1, [tensor.detach() for tensor in used])
        else:
            run()

    launch_here.keeps = called
    GridExecutor.__call__ = launch_here
