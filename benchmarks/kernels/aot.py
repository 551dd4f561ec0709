"""Ahead-of-time compilation of kernels as they are launched, and what their machine code shows; needs triton, not a GPU."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastcm.benchmarks.kernels.cases import AotCase, Budget
from fastcm.benchmarks.results_file import Row

ARCHITECTURES = (80, 90, 100)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


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

    def bytes_moved(self, counted: Mapping[str, int]) -> int:
        """Bytes of all tensor arguments, each counted once or as often as `counted` says by name."""
        arguments = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.options
        # A kernel may take a tuple of tensors, which its name counts as one.
        values = [(name, part) for name, value in arguments.items() for part in (value if isinstance(value, tuple) else (value,))]
        tensors = [(counted.get(name, 1), part) for name, part in values if isinstance(part, torch.Tensor)]
        return sum(times * tensor.numel() * tensor.element_size() for times, tensor in tensors)


def record_launches(call: Callable[[], object]) -> list[Launch]:
    """Returns the launches that `call` makes, on tensors of any device, without running one. What `call` returns is uninitialised."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel, *args, grid, warmup, **options):
        launches.append(Launch(kernel, grid if isinstance(grid, tuple) else tuple(grid), args, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return launches


def compile_launch(launch: Launch, architecture: int) -> dict[str, Any]:
    """Returns what this launch would run on sm_<architecture>, with the signature, constants and alignment of just-in-time compilation:
    the stages "ttir", "ttgir", "llir", "ptx" (text) and "cubin" (bytes)."""
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
    return compiled.asm


def machine_code(cubin: bytes) -> dict[str, Any]:
    """Returns figures of a cubin: registers, stack_bytes, spill_bytes, shared_bytes, sass_instructions, loop_instructions, and how wide its
    global accesses are.

    global_loads and global_stores map a width in bits to the number of instructions. spill_bytes counts what local loads and stores move.
    loop_instructions are those that a backward branch repeats; each instruction is counted once, without the padding behind the last.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run_tool("cuobjdump", "-res-usage", str(path))
        listing = _run_tool("nvdisasm", "-c", str(path))
    opcodes, loop_instructions = _parse(listing)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    local = [opcode for opcode in opcodes if opcode.split(".")[0] in ("LDL", "STL")]
    return {
        "registers": resources["REG"],
        "stack_bytes": resources["STACK"],
        "spill_bytes": sum(_width(opcode) // 8 for opcode in local),
        "shared_bytes": resources["SHARED"],
        "sass_instructions": len(opcodes),
        "loop_instructions": loop_instructions,
        "global_loads": _widths(opcodes, ("LDG", "LDGSTS")),
        "global_stores": _widths(opcodes, ("STG",)),
    }


def rows_of(case: AotCase, architecture: int) -> list[Row]:
    """Returns one row for each kernel that the case launches, compiled for sm_<architecture>."""
    rows = []
    for launch in record_launches(case.launch):
        budget, code = case.budgets[launch.name], machine_code(compile_launch(launch, architecture)["cubin"])
        per_thread = code.pop("sass_instructions") + (budget.trips - 1) * code.pop("loop_instructions")
        row = {"bench": "aot", "op": case.op, "variant": case.variant, "shape": list(case.shape), "kernel": launch.name, "sm": architecture}
        row |= {"num_warps": launch.num_warps, **code}
        row["instructions_per_element"] = round(per_thread * 32 * launch.num_warps * launch.programs / case.elements, 1)
        row["bytes_per_element"] = round(launch.bytes_moved(budget.counted) / case.elements, 2)
        row["floor_bytes_per_element"] = budget.bytes_per_element
        rows.append(row)
    return rows


def faults(row: Row, budget: Budget) -> list[str]:
    """Returns what is worse in this row than its budget allows, one sentence each; empty where all is well."""
    found = []
    limits = {"stack_bytes": 0, "spill_bytes": 0, "registers": budget.registers, "instructions_per_element": budget.instructions}
    # Coefficients, seeds and positions per sample are no part of the floor.
    limits["bytes_per_element"] = 1.02 * budget.bytes_per_element
    for name, limit in limits.items():
        if row[name] > limit:
            found.append(f"{name} is {row[name]}, the budget is {limit:g}")
    for name, wanted in (("global_loads", budget.load_bits), ("global_stores", budget.store_bits)):
        for bits, least in wanted.items():
            wide = sum(count for width, count in row[name].items() if int(width) >= bits)
            if wide < least:
                found.append(f"{name} has {wide} accesses of at least {bits} bits, the floor assumes {least}: {row[name]}")
    if budget.store_bits and any(int(width) < min(budget.store_bits) for width in row["global_stores"]):
        found.append(f"global_stores has accesses narrower than {min(budget.store_bits)} bits: {row['global_stores']}")
    return found


def _parse(listing: str) -> tuple[list[str], int]:
    """(opcodes, how many of them a backward branch repeats) of nvdisasm's listing."""
    opcodes, labels, loops = [], {}, []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            opcodes.append(instruction[1])
            target = _TARGET.search(instruction[2]) if instruction[1].startswith("BRA") else None
            start = labels.get(target[1]) if target else None
            if start is not None and start < len(opcodes) - 1:
                loops.append((start, len(opcodes)))
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes.pop()
    # Of nested loops the outermost counts.
    outer = [loop for loop in loops if not any(o != loop and o[0] <= loop[0] and loop[1] <= o[1] for o in loops)]
    return opcodes, sum(end - start for start, end in outer)


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
