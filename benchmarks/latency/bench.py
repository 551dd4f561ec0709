"""Milliseconds of a one-step image, from a seed on the host to uint8 on the host, for fastcm and for what users would take instead.

All backends of a model and batch live in one process and are called in turns, in shuffled order, so that a slow second of the machine
meets all of them. Their thread pools would meet too: idle threads of OpenMP and of ONNX Runtime go on spinning, on the cores that the next
backend needs. So on a CPU each turn begins with a pause in which they go to sleep, and with one call that is not counted, as the next one
finds them awake. A process for each backend would need no pause, but would measure them minutes apart.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import numpy as np
import torch

from fastcm.benchmarks.device_memory import free_memory
from fastcm.benchmarks.interleaved import Limits, device_rounds, percentiles, rounded, rounds, speedup
from fastcm.benchmarks.latency.backends import BACKENDS, Backend, Job, UnavailableError, build, plain, precision_of
from fastcm.benchmarks.latency.floor import floor_row, profile_row
from fastcm.benchmarks.models import MODELS, Model
from fastcm.benchmarks.options import add_options, names, one_line, sizes
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.errors import RunError
from fastcm.generation.devices import choose_device

IDENTITY = ("bench", "model", "batch", "backend", "device", "precision")
# Measured together with every compiled backend; their own rows come from the first such measurement.
ANCHORS = ("eager", "diffusers", "fastcm", "onnxruntime_seeded")
# Each is compiled, which takes minutes: it has a measurement of its own, that a call cut short does not lose, after all others,
# and unasked it is measured for these batches alone; on a CPU for the smallest of them, and not for models that are slow there.
COMPILED = {"fastcm_compile": (1, 16), "compile": (1, 16), "compile_max": (1,)}
# Largest difference from the fp32 images, in levels of 255.
ALLOWED_LEVELS = {"fp32": 1, "bf16": 4, "fp16": 4}
# The pause of a turn, in which idle threads stop spinning.
SETTLE_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is asked for, prints a table per model and batch, and returns 1 if a backend failed or drew other images."""
    args = parse(argv)
    device = choose_device(args.device)
    results = ResultsFile(args.json, identity=IDENTITY)
    failed = False
    for job, session in plan(args, device):
        if args.backend is None:
            facts(job, results)
        new = [name for name in session if results.find(identity(name, job)) is None]
        if new:
            rows = measure(job, session, new, limits(device, args.seconds, args.quick))
            results.add(*rows)
            failed |= any("error" in row for row in rows)
            print(*table(rows), sep="\n", flush=True)
    return int(failed)


def facts(job: Job, results: ResultsFile) -> None:
    """Stores the model's floor at this batch, and for one image on a CPU where ONNX Runtime spends its time."""
    floor = {**identity("floor", job), "precision": precision_of("fastcm", job)}
    if results.find(floor) is None:
        results.add(floor_row(job, floor))
    profile = {**identity("onnxruntime_seeded", job), "bench": "latency_profile"}
    wanted = job.device.type == "cpu" and job.batch == 1 and job.model.in_onnx
    if wanted and importlib.util.find_spec("onnxruntime") and results.find(profile) is None:
        results.add(profile_row(job, profile))


def plan(args: argparse.Namespace, device: torch.device) -> list[tuple[Job, list[str]]]:
    """What is measured together, in order: for every model and batch the backends that start at once, then the compiled ones."""
    planned = []
    for model in (MODELS[name] for name in names(args.model, MODELS, "--model", default_models(device, args.quick))):
        for batch in sizes(args.batch, "--batch", default_batches(model, device, args.quick)):
            job = Job(model, batch, device, args.precision)
            wanted = names(args.backend, BACKENDS, "--backend", default_backends(job, args.quick))
            planned += [(job, session) for session in sessions(wanted)]
    order = ("", *COMPILED)
    return sorted(planned, key=lambda item: order.index(item[1][-1] if item[1][-1] in COMPILED else ""))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastcm bench latency", description=__doc__)
    add_options(parser, models=MODELS, backends=BACKENDS)
    parser.add_argument("--precision", default="auto", help="auto (fastcm as users get it; others bf16 on CUDA), fp32, bf16 or fp16")
    return parser.parse_args(argv)


def default_models(device: torch.device, quick: bool) -> list[str]:
    if quick:
        return ["digits", "mnist", "colour32"]
    return [name for name, model in MODELS.items() if device.type == "cuda" or model.cpu_batches]


def default_batches(model: Model, device: torch.device, quick: bool) -> Sequence[int]:
    batches = model.cuda_batches if device.type == "cuda" else model.cpu_batches or (1,)
    return batches[:2] if quick else batches


def default_backends(job: Job, quick: bool) -> list[str]:
    """What the machine may have, without what takes too long."""
    on_cpu = job.device.type == "cpu"
    skipped = {name for name, batches in COMPILED.items() if job.batch not in (batches[:1] if quick or on_cpu else batches)}
    if not job.model.in_onnx:
        skipped |= {"onnxruntime_cpu", "onnxruntime_seeded", "onnxruntime_unfolded", "onnxruntime_cuda"}
    if on_cpu:
        skipped |= {"compile_max", "onnxruntime_cuda"} | (set() if job.model.compiled_on_cpu else set(COMPILED))
    else:
        skipped |= {"onnxruntime_cpu", "onnxruntime_seeded", "onnxruntime_unfolded"}  # beside a GPU hours, and no competitor
    return [name for name in BACKENDS if name not in skipped]


def limits(device: torch.device, seconds: float | None, quick: bool) -> Limits:
    """On CUDA, where a round takes milliseconds, at least 100 rounds, so that the 99th percentile is one."""
    if seconds is None:
        seconds = 6 if quick or device.type == "cuda" else 15
    return Limits(seconds, fewest=100 if device.type == "cuda" else 7, most=2000)


def sessions(wanted: Sequence[str]) -> list[list[str]]:
    """The backends that are measured in turns: all that start at once, and each compiled one beside the anchors."""
    first = [name for name in wanted if name not in COMPILED]
    anchors = [name for name in first if name in ANCHORS]
    return ([first] if first else []) + [[*anchors, name] for name in wanted if name in COMPILED]


def identity(name: str, job: Job) -> Row:
    return {
        "bench": "latency",
        "model": job.model.name,
        "batch": job.batch,
        "backend": name,
        "device": job.device.type,
        "precision": precision_of(name, job),
    }


def measure(job: Job, session: Sequence[str], new: Sequence[str], limit: Limits) -> list[Row]:
    """Builds and checks the session's backends, times them in turns, and returns the rows of the `new` ones."""
    free_memory(job.device)
    built, rows = {}, {name: identity(name, job) for name in session}
    expected = reference_images(job)
    for name in session:
        try:
            backend = build(name, job)
            rows[name]["levels_apart"] = check(backend, job, expected, precision_of(name, job))
            built[name] = backend
        except UnavailableError as reason:
            print(f"{job.model.name} {name}: not measured, {reason}", file=sys.stderr)
            del rows[name]
        except Exception as error:  # a competitor that fails must not end the others' measurement
            rows[name]["error"] = one_line(error)
    host = rounds({name: timed(backend, job) for name, backend in built.items()}, limit, **turns(job)) if built else {}
    on_device = {name: backend.on_device for name, backend in built.items() if backend.on_device is not None}
    device = device_rounds(on_device, limit) if job.device.type == "cuda" and on_device else {}
    for name, backend in built.items():
        rows[name] |= figures(name, host, device, job) | {"startup_s": rounded(backend.startup_s)}
        if backend.first_images:
            cold, warm = backend.first_images
            rows[name] |= {"first_image_cold_s": rounded(cold), "first_image_warm_s": rounded(warm)}
    built.clear()
    torch.compiler.reset()
    return [row for name, row in rows.items() if name in new]


def timed(backend: Backend, job: Job):
    return lambda turn: backend.images(job.seeds(turn))


def turns(job: Job) -> dict[str, float | int]:
    """How a backend's turn begins."""
    return {"settle_s": SETTLE_S, "warm": 1} if job.device.type == "cpu" else {}


def figures(name: str, host: dict[str, np.ndarray], device: dict[str, np.ndarray], job: Job) -> Row:
    """Percentiles of a backend's calls, and how it compares with others round by round."""
    row = {**percentiles(host[name]), "images_per_s": rounded(1000 * job.batch / np.median(host[name])), "rounds": len(host[name])}
    if name in device:
        row |= percentiles(device[name], prefix="device_")
    for other in ("eager", "diffusers", "onnxruntime_unfolded"):
        if other in host and other != name:
            row[f"speedup_over_{other}"] = speedup(host[name], host[other])
    if "fastcm" in host and name != "fastcm":
        row["speedup_of_fastcm"] = speedup(host["fastcm"], host[name])
    return row


def reference_images(job: Job) -> np.ndarray:
    """The plain network's images in fp32 without TF32. Raises RunError where they say nothing about the network."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        images = plain(job, job.model.denoiser(), precision="fp32").same_noise(job.seeds(0))
    if images.std() < 10:
        raise RunError(f"images of {job.model.name} hardly vary ({images.std():.2g} levels): a comparison would say nothing.")
    return images


def check(backend: Backend, job: Job, expected: np.ndarray, precision: str) -> int:
    """The largest difference from the expected images in levels of 255; RunError where it is over what the precision explains."""
    images = backend.same_noise(job.seeds(0))
    if images.dtype != np.uint8 or images.shape != expected.shape:
        raise RunError(f"not the images asked for: {images.dtype} {list(images.shape)} for uint8 {list(expected.shape)}.")
    apart = int(np.abs(images.astype(np.int16) - expected.astype(np.int16)).max())
    if apart > ALLOWED_LEVELS[precision]:
        raise RunError(f"other images than the fp32 network's: {apart} levels apart, {ALLOWED_LEVELS[precision]} allowed in {precision}.")
    return apart


COLUMNS = (
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "device_p50_ms",
    "speedup_over_eager",
    "speedup_over_diffusers",
    "speedup_over_onnxruntime_unfolded",
    "speedup_of_fastcm",
    "startup_s",
    "first_image_cold_s",
    "first_image_warm_s",
)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of text."""
    lines = [f"{'model':12}{'batch':>6} {'backend':22}{'precision':10}" + "".join(f"{column:>{len(column) + 2}}" for column in COLUMNS)]
    for row in rows:
        head = f"{row['model']:12}{row['batch']:>6} {row['backend']:22}{row['precision']:10}"
        values = "".join(f"{row.get(column, '-'):>{len(column) + 2}}" for column in COLUMNS)
        lines.append(head + (f"  failed: {row['error']}" if "error" in row else values))
    return lines


if __name__ == "__main__":
    from fastcm import cli

    sys.exit(cli.main(["bench", "latency", *sys.argv[1:]]))
