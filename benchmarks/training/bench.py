"""Images per second of consistency training: fastcm's step beside the step of the published PyTorch code, eager and under torch.compile."""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from fastcm.benchmarks.device_memory import free_memory
from fastcm.benchmarks.interleaved import Limits, percentiles, rounded, rounds, speedup
from fastcm.benchmarks.models import MODELS, Model, forward_flops, parameters
from fastcm.benchmarks.options import add_options, names, one_line, sizes
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.benchmarks.training import child, growth
from fastcm.benchmarks.training.backends import BACKENDS, Backend, Job, build, synchronize
from fastcm.benchmarks.training.step_split import PHASES
from fastcm.generation.devices import choose_device

# A row of `step` is of one batch; those of `memory` and `scaling` are of a value on an axis.
OPS = ("step", "memory", "scaling")
IDENTITY = ("bench", "op", "model", "batch", "backend", "device", "precision")
GROWTH_IDENTITY = ("bench", "op", "model", "axis", "value", "backend", "recomputed", "device", "precision")
ANCHORS = ("published_step", "fastcm")
# Each takes minutes to compile, so each has a measurement of its own, beside the anchors and after all of theirs.
COMPILED = ("fastcm_compile", "compile")
# A step is a pass forward of the student, one of the target, and one backward that costs two forward.
PASSES = 4
# Floating-point operations of a step on a CPU: from the first number on it takes seconds, and few rounds have to do; steps beyond the
# second are measured where they are asked for.
SLOW_FLOP, UNASKED_FLOP = 1e11, 5e11
# Dense bf16 products, TFLOP/s, from the makers' data sheets; the first name that the device's contains.
BF16_TFLOP_S = {
    "GB200": 2500,
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is asked for, prints tables, and returns 1 if something failed."""
    args = parse(argv)
    device = choose_device(args.device)
    failed = False
    for op in names(args.op, OPS, "--op", ("step",) if args.quick else OPS):
        failed |= {"step": measure_steps, "memory": measure_memory, "scaling": measure_scaling}[op](args, device)
    return int(failed)


def measure_steps(args: argparse.Namespace, device: torch.device) -> bool:
    results, failed, planned = ResultsFile(args.json, identity=IDENTITY), False, plan(args, device)
    ceiling = matmul_tflop_s(device)
    for job, session in planned:
        new = [name for name in session if results.find(identity(name, job)) is None]
        if new:
            rows = measure(job, session, new, limits(job, args.seconds, args.quick), ceiling)
            results.add(*rows)
            failed |= any("error" in row for row in rows)
            print(*table(rows), sep="\n", flush=True)
    return failed


def measure_memory(args: argparse.Namespace, device: torch.device) -> bool:
    results, failed = ResultsFile(args.json, identity=GROWTH_IDENTITY), False
    usual = list(growth.CPU_BATCHES) if device.type == "cpu" else default_models(device, False)
    models = [MODELS[name] for name in names(args.model, MODELS, "--model", usual)]
    for name, recomputed, job in growth.memory_jobs(device, models, job_maker(args, device)):
        if results.find(growth.memory_identity(name, recomputed, job)) is None:
            row = growth.measure_memory(name, recomputed, job)
            results.add(row)
            failed |= "error" in row
            print(growth_line(row), flush=True)
    return failed


def measure_scaling(args: argparse.Namespace, device: torch.device) -> bool:
    results, failed = ResultsFile(args.json, identity=GROWTH_IDENTITY), False
    for axis, jobs in growth.scaling_jobs(device, job_maker(args, device)):
        if any(results.find(growth.scaling_identity(axis, value, job)) is None for value, job in jobs.items()):
            rows = growth.measure_axis(axis, jobs, Limits(args.seconds or (15 if device.type == "cuda" else 20), fewest=3, most=500))
            results.add(*rows)
            failed |= any("error" in row for row in rows)
            print(*map(growth_line, rows), sep="\n", flush=True)
    return failed


def job_maker(args: argparse.Namespace, device: torch.device) -> partial:
    """(model, batch) -> Job, as the options have it."""
    return partial(Job, device=device, precision=args.precision, baseline_precision=args.baseline_precision)


def plan(args: argparse.Namespace, device: torch.device) -> list[tuple[Job, list[str]]]:
    """What is measured together, in order: for every model and batch the anchors, then the compiled steps."""
    planned, make = [], job_maker(args, device)
    for model in (MODELS[name] for name in names(args.model, MODELS, "--model", default_models(device, args.quick))):
        default = model.train_batches.get(device.type, (4,))
        for batch in sizes(args.batch, "--batch", default[:1] if args.quick else default):
            job = make(model, batch)
            wanted = names(args.backend, BACKENDS, "--backend", default_backends(model, batch, device, args.quick))
            planned += [(job, session) for session in sessions(wanted)]
    return sorted(planned, key=lambda item: item[1][-1] in COMPILED)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastcm bench train", description=__doc__)
    add_options(parser, models=MODELS, backends=BACKENDS)
    parser.add_argument("--op", help=f"what is measured, separated by commas: {', '.join(OPS)} (default: all, with --quick step)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of fastcm (default: as its users get it)")
    parser.add_argument(
        "--baseline-precision", default="auto", choices=("auto", "fp32", "bf16"), help="of the others (auto: bf16 on CUDA, fp32 on a CPU)"
    )
    return parser.parse_args(argv)


def default_models(device: torch.device, quick: bool) -> list[str]:
    if quick:
        return ["digits", "mnist"]
    jobs = [(name, model, model.train_batches[device.type][0]) for name, model in MODELS.items() if device.type in model.train_batches]
    return [name for name, model, batch in jobs if device.type == "cuda" or PASSES * forward_flops(model) * batch < UNASKED_FLOP]


def default_backends(model: Model, batch: int, device: torch.device, quick: bool) -> list[str]:
    """On CUDA fastcm compiles by itself. On a CPU that takes minutes: for the smallest network at its first batch, or where asked."""
    if device.type == "cuda":
        return [name for name in BACKENDS if name != "fastcm_compile"]
    compiled = model.name == "digits" and batch == model.train_batches["cpu"][0]
    return [name for name in BACKENDS if name in ANCHORS or (compiled and not (quick and name == "fastcm_compile"))]


def limits(job: Job, seconds: float | None, quick: bool) -> Limits:
    """A round is one step of each backend on a CPU, ten on CUDA."""
    if seconds is None:
        seconds = 15 if quick or job.device.type == "cuda" else 40
    return Limits(seconds, fewest=3 if is_slow(job) else 6, most=500)


def is_slow(job: Job) -> bool:
    return job.device.type == "cpu" and PASSES * forward_flops(job.model) * job.batch > SLOW_FLOP


def sessions(wanted: Sequence[str]) -> list[list[str]]:
    """The backends that are measured in turns: the anchors, then each compiled one beside them."""
    anchors = [name for name in wanted if name in ANCHORS]
    return ([anchors] if anchors else []) + [[*anchors, name] for name in wanted if name in COMPILED]


def identity(name: str, job: Job) -> Row:
    return {
        "bench": "train",
        "op": "step",
        "model": job.model.name,
        "batch": job.batch,
        "backend": name,
        "device": job.device.type,
        "precision": job.precision_of(name),
    }


def measure(job: Job, session: Sequence[str], new: Sequence[str], limit: Limits, ceiling: float | None) -> list[Row]:
    """Builds the session's backends, times blocks of steps in turns, then their parts, and returns the rows of the `new` ones."""
    free_memory(job.device)
    built: dict[str, Backend] = {}
    rows = {name: identity(name, job) for name in session}
    for name in session:
        try:
            built[name] = build(name, job)
        except Exception as error:  # out of memory, a compiler's error: the others are measured all the same
            rows[name]["error"] = one_line(error)
    # A device works through a queue of steps: it is waited for once per block, as in training.
    block = 10 if job.device.type == "cuda" else 1

    def steps(backend: Backend):
        def run(turn: int) -> None:
            for _ in range(block):
                backend.step()
            synchronize(job.device)

        return run

    try:
        times = rounds({name: steps(backend) for name, backend in built.items()}, limit) if built else {}
        for name, backend in built.items():
            rows[name] |= figures(name, {key: values / block for key, values in times.items()}, job, ceiling)
            rows[name] |= backend.split(job.device, steps=10 if block > 1 else 1 if is_slow(job) else 5)
            rows[name]["startup_s"] = rounded(backend.startup_s)
            if backend.is_recorded is not None and job.device.type == "cuda":
                rows[name]["recorded"] = backend.is_recorded()
            if backend.peak_bytes is not None:
                rows[name]["peak_memory_gb"] = rounded(backend.peak_bytes / 1e9)
    except torch.OutOfMemoryError as error:  # each fitted alone, not all beside each other
        for name in built:
            rows[name]["error"] = one_line(error)
    built.clear()
    torch.compiler.reset()
    if job.device.type == "cpu":
        for name in new:
            if name in ANCHORS and "error" not in rows[name]:  # in a process of its own: what one step frees, the next would find
                rows[name] |= child.ask(job, name, seconds=None)
    return [row for name, row in rows.items() if name in new]


def figures(name: str, times: dict[str, np.ndarray], job: Job, ceiling: float | None) -> Row:
    """Percentiles of a step, images per second, the share of the device's arithmetic, and comparisons round by round."""
    images_per_s = 1000 * job.batch / float(np.median(times[name]))
    tflop_s = PASSES * forward_flops(job.model) * images_per_s / 1e12
    row = {
        **percentiles(times[name]),
        "images_per_s": rounded(images_per_s),
        "rounds": len(times[name]),
        "tflop_s": rounded(tflop_s),
        "parameters": parameters(job.model),
    }
    rate = device_tflop_s(job.device)
    if rate is not None and job.precision_of(name) == "bf16":
        row["mfu_percent"] = rounded(100 * tflop_s / rate)
    if ceiling is not None and job.precision_of(name) == MATMUL_PRECISION[job.device.type]:
        row["percent_of_matmul"] = rounded(100 * tflop_s / ceiling)
    if "published_step" in times and name != "published_step":
        row["speedup_over_published_step"] = speedup(times[name], times["published_step"])
    if "fastcm" in times and name != "fastcm":
        row["speedup_of_fastcm"] = speedup(times["fastcm"], times[name])
    return row


def device_tflop_s(device: torch.device) -> float | None:
    """The data sheet's dense bf16 rate of a CUDA device, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(rate) for known, rate in BF16_TFLOP_S.items() if all(word in name for word in known.split())), None)


MATMUL_PRECISION = {"cuda": "bf16", "cpu": "fp32"}


def matmul_tflop_s(device: torch.device) -> float:
    """What a large product of random matrices reaches, bf16 on CUDA and fp32 on a CPU: the median of 20."""
    cuda = device.type == "cuda"
    size, dtype, seconds = (8192, torch.bfloat16, []) if cuda else (1024, torch.float32, [])
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for turn in range(25):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        if turn >= 5:
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(seconds)) / 1e12


COLUMNS = (
    "p50_ms",
    "images_per_s",
    "speedup_over_published_step",
    "speedup_of_fastcm",
    "percent_of_matmul",
    "mfu_percent",
    "peak_memory_gb",
    "startup_s",
)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of text: figures, then the split of each step in percent."""
    head = f"{'model':12}{'batch':>6} {'backend':16}{'precision':10}"
    lines = [head + "".join(f"{column:>{len(column) + 2}}" for column in COLUMNS)]
    for row in rows:
        head = f"{row['model']:12}{row['batch']:>6} {row['backend']:16}{row['precision']:10}"
        if "error" in row:
            lines.append(f"{head}  failed: {row['error']}")
            continue
        lines.append(head + "".join(f"{row.get(column, '-'):>{len(column) + 2}}" for column in COLUMNS))
        whole = sum(row[f"{phase}_ms"] for phase in PHASES)
        lines.append("    " + ", ".join(f"{phase} {100 * row[f'{phase}_ms'] / whole:.1f} %" for phase in PHASES))
    return lines


def growth_line(row: Row) -> str:
    """A row of memory or scaling for the terminal."""
    head = f"{row['op']:9}{row['model']:12}{row['backend']:16}"
    if "error" in row:
        return f"{head}{row.get('axis', 'batch')} {row['value']}: failed: {row['error']}"
    if row["op"] == "scaling":
        return f"{head}{row['axis']} {row['value']}: {row['images_per_s']:g} images/s"
    return f"{head}batch {row['batch']}{', recomputed' if row['recomputed'] else ''}: {row['peak_memory_gb']:g} GB"


if __name__ == "__main__":
    from fastcm import cli

    sys.exit(cli.main(["bench", "train", *sys.argv[1:]]))
