"""What a kernel is compiled and measured at: the cases of every `cases_*.py` beside this file.

Such a module may hold AOT_CASES, a sequence of AotCase, and BENCH_CASES, a sequence of BenchCase. `op` is the stem of the kernel's file
(or a second op in it); a module finds launch functions by `kernel_module(op)`, because `fastcm.kernels.perturb` is the function.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one kernel's machine code may cost; a test fails where it costs more. No kernel may use stack or spill.

    instructions: per element of the case, counted over a thread's whole program. load_bits, store_bits: width of a global access in
    bits -> how many instructions of at least that width there must be; a store narrower than every width named is refused.
    trips: iterations of the kernel's loop at this shape, where it has one. bytes_per_element: the floor, what must move.
    counted: how often the kernel passes over an argument, by name, where that is not once (2: read and written, 0: a scalar's table).
    """

    instructions: float
    registers: int = 64
    load_bits: Mapping[int, int] = field(default_factory=dict)
    store_bits: Mapping[int, int] = field(default_factory=dict)
    trips: int = 1
    bytes_per_element: float
    counted: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One set of launches to compile ahead of time.

    launch: calls the op's launch function on CPU tensors of the shape; nothing runs, so what it returns is uninitialised.
    elements: elements that the launch covers. budgets: by kernel name without its underscores and `_kernel`.
    """

    op: str
    variant: str
    shape: tuple[int, ...]
    launch: Callable[[], object]
    elements: int
    budgets: Mapping[str, Budget]


@dataclass(frozen=True, kw_only=True)
class BenchCase:
    """One op at one shape to measure.

    inputs: device -> the arguments, never zeros. fastcm: the public function. reference: the op's own reference. idiom: how one writes it
    in plain torch where that is not the reference (noise by torch.randn); eager and compile measure it. variants: further backends by
    name ("foreach", "fused"). bytes: what the op must move. in_place: the op's results are what it left in its inputs. rtol: how far
    fastcm may be from the reference, relative to 1 + |reference|, before it is refused. quick: also measured under --quick. A training
    shape whose elements `auto` decides on is the number of elements of the op's first tensor: prod(shape).
    """

    op: str
    variant: str
    shape: tuple[int, ...]
    inputs: Callable[[torch.device], tuple[Any, ...]]
    fastcm: Callable[..., Any]
    reference: Callable[..., Any]
    idiom: Callable[..., Any] | None = None
    variants: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    bytes: int
    in_place: bool = False
    rtol: float = 1e-4
    quick: bool = False


def kernel_module(stem: str) -> ModuleType:
    """Returns the module fastcm.kernels.<stem>, which the function of the same name hides in the package."""
    return importlib.import_module(f"fastcm.kernels.{stem}")


def aot_cases() -> list[AotCase]:
    """Returns the AOT cases of every `cases_*.py`, in the order of file names."""
    return [case for module in _case_modules() for case in getattr(module, "AOT_CASES", ())]


def bench_cases() -> list[BenchCase]:
    """Returns the benchmark cases of every `cases_*.py`, in the order of file names."""
    return [case for module in _case_modules() for case in getattr(module, "BENCH_CASES", ())]


def _case_modules() -> list[ModuleType]:
    names = sorted(info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]) if info.name.startswith("cases_"))
    return [importlib.import_module(f"fastcm.benchmarks.kernels.{name}") for name in names]
