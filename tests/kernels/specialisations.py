"""A pytest plugin: kernel tests launch on CPU tensors, and what they launch is compiled for sm_90 to PTX instead of being run.

`python -m pytest -p specialisations FILES` with this folder on PYTHONPATH. Whatever a test asserts fails, as no kernel writes anything; the
last line on stdout is JSON: {"triton": version, "compiled": specialisations, "failed": {"kernel signature": error}}.
"""

import json

import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from fastcm import kernels
from fastcm.benchmarks.kernels.aot import Launch, compile_launch
from fastcm.kernels import launch

SEEN: dict[str, str | None] = {}


def signature(kernel, args, options) -> str:
    """What decides a launch's code, up to what the compiler takes as equal: dtypes, alignments, constants, small numbers."""

    def of(value):
        if isinstance(value, torch.Tensor):
            return f"{value.dtype}{'' if value.data_ptr() % 16 else '/16'}"
        if isinstance(value, tuple):
            return [of(part) for part in value]
        return value if not isinstance(value, int) or abs(value) < 2**31 else "i64"

    return f"{kernel.fn.__name__} {[of(value) for value in args]} { {name: of(value) for name, value in options.items()} }"


def compile_instead(kernel, *args, grid, warmup, **options):
    """In the place of JITFunction.run."""
    key = signature(kernel, args, options)
    if key not in SEEN:
        SEEN[key] = None
        try:
            compile_launch(Launch(kernel, grid, args, options), 90)
        except Exception as error:  # whatever the compiler raises is the finding
            SEEN[key] = f"{type(error).__name__}: {str(error).strip()[-300:]}"


def pytest_configure(config):
    CUDABackend.make_cubin = lambda *arguments: b""  # the assembler does not belong to the version of Triton's language
    JITFunction.run = compile_instead
    launch.INTERPRETED = True  # kernels were made for fast math already: this lets CPU tensors reach them
    for op, launcher in launch._launchers.items():
        op.register_kernel("cpu")(launcher)
    kernels.use("triton")


def pytest_unconfigure(config):
    failed = {key: error for key, error in SEEN.items() if error}
    print("\n" + json.dumps({"triton": triton.__version__, "compiled": len(SEEN) - len(failed), "failed": failed}))
