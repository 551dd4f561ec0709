"""Ahead-of-time compilation of kernels as they are launched, and what their machine code shows; needs triton, not a GPU."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ARCHITECTURES = (80, 90, 100)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)


@dataclass(frozen=True)
class Launch:
    """One kernel[grid](...) call as it was made, with everything that decides its machine code."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    @property
    def programs(self) -> int:
        count = 1
        for n in self.grid:
            count *= n
        return count

    @property
    def num_warps(self) -> int:
        return self.options.get("num_warps", 4)


def record_launches(call: Callable[[], object]) -> list[Launch]:
    """Returns the launches that `call` makes, on tensors of any device, without running one. What `call` returns is uninitialised."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel, *args, grid, warmup, **options):
        launches.append(Launch(kernel, grid if isinstance(grid, tuple) else tuple(grid), args, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return launches


def compile_launch(launch: Launch, architecture: int) -> bytes:
    """Returns the cubin that this launch would run on sm_<architecture>: the same signature, constants and alignment as just in time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    keywords = {**launch.options, "debug": False}
    # triton's own binder decides what is a constant and what divides by 16 (3.6, 3.7).
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*launch.args, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)
    return compiled.asm["cubin"]


def machine_code(cubin: bytes) -> dict[str, Any]:
    """Returns figures of a cubin: registers, stack_bytes, spill_bytes, shared_bytes, sass_instructions, and how wide its global accesses are.

    global_loads and global_stores map a width in bits to the number of instructions. spill_bytes counts what local loads and stores move.
    Instructions are counted once each, after the padding behind the last one is dropped.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run_tool("cuobjdump", "-res-usage", str(path))
        listing = _run_tool("nvdisasm", "-c", str(path))
    opcodes = [opcode for opcode, _ in _INSTRUCTION.findall(listing)]
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes.pop()
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    local = [opcode for opcode in opcodes if opcode.split(".")[0] in ("LDL", "STL")]
    return {
        "registers": resources["REG"],
        "stack_bytes": resources["STACK"],
        "spill_bytes": sum(_width(opcode) // 8 for opcode in local),
        "shared_bytes": resources["SHARED"],
        "sass_instructions": len(opcodes),
        "global_loads": _widths(opcodes, ("LDG", "LDGSTS")),
        "global_stores": _widths(opcodes, ("STG",)),
    }


def _run_tool(tool: str, *arguments: str) -> str:
    import triton

    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=True).stdout


def _widths(opcodes: list[str], names: tuple[str, ...]) -> dict[str, int]:
    widths = Counter(_width(opcode) for opcode in opcodes if opcode.split(".")[0] in names)
    return {str(width): count for width, count in sorted(widths.items())}


def _width(opcode: str) -> int:
    parts = opcode.split(".")
    for width in (256, 128, 64):
        if str(width) in parts:
            return width
    return next((bits for name, bits in (("U8", 8), ("S8", 8), ("U16", 16), ("S16", 16)) if name in parts), 32)
