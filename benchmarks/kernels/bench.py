"""`fastcm bench kernels`: each kernel against torch and torch.compile, and its machine code ahead of time."""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastcm import kernels
from fastcm.benchmarks.kernels import aot
from fastcm.benchmarks.kernels.cases import BenchCase, aot_cases, bench_cases
from fastcm.benchmarks.kernels.timing import launches_of, measure, regime_of
from fastcm.benchmarks.pages import tables
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.errors import InputError, nearest
from fastcm.kernels import launch

AOT_IDENTITY = ("bench", "op", "variant", "shape", "kernel", "sm")
BENCH_IDENTITY = ("bench", "op", "variant", "shape", "regime", "backend")
# On the CPU cases above this are left out: they need gigabytes and tell nothing new.
CPU_BYTES = 64 * 2**20


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 where a kernel breaks its budget (--aot) or gives another result than its reference."""
    parser = argparse.ArgumentParser(prog="fastcm bench kernels", description=__doc__)
    parser.add_argument("--aot", action="store_true", help="compile every kernel for sm_80, sm_90 and sm_100 and table its machine code")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--batch", type=int, help="only cases of this batch size")
    parser.add_argument("--json", type=Path, help="write rows here, each as it is measured; measured rows are not measured again")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and backends, a few minutes at most")
    parser.add_argument("--once", action="store_true", help="the first of the cases of each op alone")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    cases = [case for case in (aot_cases() if args.aot else bench_cases()) if args.op in (None, case.op)]
    if not cases:
        ops = {case.op for case in (aot_cases() if args.aot else bench_cases())}
        raise InputError(f"unknown op in --op: {args.op}. Use one of {', '.join(sorted(ops))}.{nearest(args.op, ops)}")
    if not args.aot:
        return measure_cases(cases, args)
    if args.json is not None and args.op is None:
        # A whole report takes the place of the last one, with its commit and without cases that are gone.
        args.json.unlink(missing_ok=True)
    return report_ahead_of_time(cases, args.json)


def report_ahead_of_time(cases: list[aot.AotCase], path: Path | None) -> int:
    """Compiles the cases for every architecture, prints one line each and what breaks a budget; returns 1 where something does."""
    if not launch.HAS_TRITON:
        raise InputError("triton is not installed, which --aot needs. Install it on Linux: pip install triton.")
    if launch.INTERPRETED:
        raise InputError("illegal environment for --aot: TRITON_INTERPRET is set. Unset it: the interpreter compiles nothing.")
    results = ResultsFile(path, identity=AOT_IDENTITY)
    broken = 0
    for case in cases:
        for architecture in aot.ARCHITECTURES:
            for row in aot.rows_of(case, architecture):
                results.add(row)
                print(tables.aot_line(row), flush=True)
                for fault in aot.faults(row, case.budgets[row["kernel"]]):
                    print(f"  over budget: {fault}", flush=True)
                    broken = 1
    return broken


def measure_cases(cases: list[BenchCase], args: argparse.Namespace) -> int:
    """Measures every backend of every case that is not in the file yet; returns 1 where a kernel's result differs from its reference."""
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device for --device: cuda. Use --device cpu.")
    results = ResultsFile(args.json, identity=BENCH_IDENTITY)
    wrong = 0
    if args.once:
        cases = [case for case in cases if case is next(other for other in cases if other.op == case.op)]
    for case in cases:
        if args.batch not in (None, case.shape[0]) or (args.quick and not case.quick) or (device.type == "cpu" and case.bytes > CPU_BYTES):
            continue
        regime = regime_of(case.bytes, device)
        torch._dynamo.reset()
        inputs = case.inputs(device)
        difference = _difference(case, inputs)
        for backend, call in backends(case, quick=args.quick, device=device).items():
            row = {
                "bench": "kernels",
                "op": case.op,
                "variant": case.variant,
                "shape": list(case.shape),
                "regime": regime,
                "backend": backend,
            }
            if results.find(row):
                continue
            if backend == "fastcm" and difference > case.rtol:
                row["error"] = f"differs from the reference by {difference:.3g}, {case.rtol:g} allowed"
                wrong = 1
            else:
                row |= _figures(case, functools.partial(call, *inputs), regime, copy_gb_s(case.bytes, regime, device), quick=args.quick)
            results.add(row)
            print(tables.bench_line(row), flush=True)
    return wrong


def backends(case: BenchCase, *, quick: bool, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Returns what is measured for a case, by backend name. `compile_reference`: the reference compiled, where the idiom is another."""
    idiom = case.idiom or case.reference
    found = {"eager": idiom, **case.variants, "compile": torch.compile(idiom, dynamic=False)}
    if case.idiom is not None:
        found["compile_reference"] = torch.compile(case.reference, dynamic=False)
    if not quick and device.type == "cuda":
        found["compile_max"] = torch.compile(idiom, dynamic=False, mode="max-autotune-no-cudagraphs")
    found["fastcm"] = _by_kernel(case.fastcm)
    return found


@functools.cache
def copy_gb_s(bytes_moved: int, regime: str, device: torch.device) -> float:
    """Returns the bandwidth of a copy that reads and writes this many bytes together, in the same regime."""
    source = torch.rand(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)
    p50_ms = measure(lambda: target.copy_(source), regime=regime, seconds=0.2)[1]
    return 2 * source.numel() * source.element_size() / p50_ms / 1e6


def _by_kernel(call: Callable[..., Any]) -> Callable[..., Any]:
    def call_kernel(*inputs):
        before = launch._use
        kernels.use("triton")
        try:
            return call(*inputs)
        finally:
            kernels.use(before)

    return call_kernel


def _figures(case: BenchCase, call: Callable[[], Any], regime: str, copy: float, *, quick: bool) -> Row:
    try:
        p20_ms, p50_ms, p80_ms = measure(call, regime=regime, seconds=0.3 if quick else 1.0)
    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
        return {"error": str(error).strip().splitlines()[0][:200]}
    gb_s = case.bytes / p50_ms / 1e6
    row = {"p20_ms": p20_ms, "p50_ms": p50_ms, "p80_ms": p80_ms, "gb_s": gb_s, "percent_of_copy": 100 * gb_s / copy, "bytes": case.bytes}
    row = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
    return row if regime == "cpu" else row | {"launches": launches_of(call)}


@torch.no_grad()
def _difference(case: BenchCase, inputs: tuple[Any, ...]) -> float:
    """The largest |fastcm - reference| / (1 + |reference|) over all results; a byte or a 16-bit float may be one step off."""
    found, expected = (_results(call, inputs, case.in_place) for call in (_by_kernel(case.fastcm), case.reference))
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        step = {torch.uint8: 1.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(theirs.dtype, 0.0)
        error = (ours.double() - theirs.double()).abs() / (1 + theirs.double().abs())
        if not torch.isfinite(ours.double()).all():
            return float("inf")
        worst = max(worst, error.max().item() - step)
    return worst


def _results(call: Callable[..., Any], inputs: tuple[Any, ...], in_place: bool) -> list[torch.Tensor]:
    own = torch.utils._pytree.tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, inputs)
    returned = call(*own)
    return [t for t in torch.utils._pytree.tree_leaves(own if in_place else returned) if isinstance(t, torch.Tensor)]


if __name__ == "__main__":
    sys.exit(main())
