"""How a step's cost grows: images per second against batch, resolution, parameters and processes; memory with and without recomputation."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fastcm.benchmarks.device_memory import free_memory
from fastcm.benchmarks.interleaved import Limits, percentiles, rounded, rounds
from fastcm.benchmarks.models import MODELS, Model, parameters
from fastcm.benchmarks.options import one_line
from fastcm.benchmarks.results_file import Row
from fastcm.benchmarks.training import child
from fastcm.benchmarks.training.backends import Job, build, synchronize

AXES = ("batch", "resolution", "parameters", "processes")
# By device: the model that is varied, its batch, and the values on each axis; widths are channels at full resolution.
VARIED = {
    "cpu": ("digits", 64, {"batch": (8, 32, 128, 512), "resolution": (8, 16, 32), "parameters": (24, 48, 96), "processes": (1, 2)}),
    "cuda": (
        "cifar10",
        128,
        {"batch": (16, 64, 256, 1024), "resolution": (32, 64), "parameters": (64, 128, 256), "processes": (1, 2, 4, 8)},
    ),
}
# Batches whose memory is measured on a CPU; on CUDA the largest that fits is looked for.
CPU_BATCHES = {"digits": (64, 512), "colour32": (8, 16)}
LARGEST_BATCH = 4096


def varied(axis: str, value: int, job: Job) -> Job:
    """The job with one value on one axis."""
    if axis in ("batch", "processes"):
        return replace(job, batch=value) if axis == "batch" else job
    changes = {"resolution": value} if axis == "resolution" else {"channels": value}
    if axis == "parameters" and "head_channels" in job.model.options:
        changes["head_channels"] = value
    return replace(job, model=changed(job.model, changes))


def changed(model: Model, options: dict) -> Model:
    return replace(model, options={**model.options, **options})


def scaling_jobs(device: torch.device, make: partial) -> Iterator[tuple[str, dict[int, Job]]]:
    """(axis, job by value). make(model, batch) -> Job."""
    name, batch, axes = VARIED[device.type]
    base = make(MODELS[name], batch)
    for axis, values in axes.items():
        if axis == "processes" and device.type == "cuda":
            values = [value for value in values if value <= torch.cuda.device_count()]
        yield axis, {value: varied(axis, value, base) for value in values}


def scaling_identity(axis: str, value: int, job: Job) -> Row:
    return {
        "bench": "train",
        "op": "scaling",
        "model": job.model.name,
        "axis": axis,
        "value": value,
        "batch": job.batch,
        "backend": "fastcm",
        "device": job.device.type,
        "precision": job.precision_of("fastcm"),
    }


def measure_axis(axis: str, jobs: dict[int, Job], limit: Limits) -> list[Row]:
    """Steps of every value in turns; processes, which are children, one after the other."""
    rows = {value: scaling_identity(axis, value, job) | {"parameters": parameters(job.model)} for value, job in jobs.items()}
    built = {}
    free_memory(next(iter(jobs.values())).device)
    for value, job in jobs.items():
        try:
            if axis == "processes":
                rows[value] |= child.ask(job, "fastcm", seconds=limit.seconds / len(jobs), processes=value)
            else:
                backend = build("fastcm", job)
                built[value] = backend.step
                if backend.is_recorded():  # what is replayed needs no compiled code any more, whose variants torch counts
                    torch.compiler.reset()
        except Exception as error:  # the other values are measured all the same
            rows[value]["error"] = one_line(error)

    def run(step, device: torch.device, turn: int) -> None:
        step()
        synchronize(device)

    times = rounds({value: partial(run, step, jobs[value].device) for value, step in built.items()}, limit) if built else {}
    for value, measured in times.items():
        images_per_s = 1000 * jobs[value].batch / float(np.median(measured))
        rows[value] |= {**percentiles(measured), "images_per_s": rounded(images_per_s), "rounds": len(measured)}
    torch.compiler.reset()
    return list(rows.values())


def memory_jobs(device: torch.device, models: list[Model], make: partial) -> Iterator[tuple[str, bool, Job]]:
    """(backend, recomputed, job): uncompiled steps; on CUDA a job's batch is the largest that is tried."""
    for model in models:
        for batch in CPU_BATCHES.get(model.name, (4,)) if device.type == "cpu" else (LARGEST_BATCH,):
            for name, recomputed in (("published_step", False), ("fastcm", False), ("fastcm", True)):
                yield name, recomputed, make(changed(model, {"checkpoint": recomputed}), batch)


def memory_identity(name: str, recomputed: bool, job: Job) -> Row:
    return {
        "bench": "train",
        "op": "memory",
        "model": job.model.name,
        "value": job.batch,
        "backend": name,
        "recomputed": recomputed,
        "device": job.device.type,
        "precision": job.precision_of(name),
    }


def measure_memory(name: str, recomputed: bool, job: Job) -> Row:
    """On a CPU the peak of a step, in a child; on CUDA the largest batch that fits, to an eighth, and the peak at it."""
    row = memory_identity(name, recomputed, job)
    try:
        if job.device.type == "cpu":
            return {**row, "batch": job.batch, **child.ask(job, name, seconds=None)}
        peaks = {}

        def fits(batch: int) -> bool:
            peaks[batch] = _peak(name, replace(job, batch=batch))
            return peaks[batch] is not None

        batch = largest(fits, most=job.batch)
        if batch == 0:
            return {**row, "error": "out of memory with one image"}
        total = torch.cuda.get_device_properties(job.device).total_memory
        return {**row, "batch": batch, "peak_memory_gb": peaks[batch], "device_memory_gb": rounded(total / 1e9)}
    except Exception as error:
        return {**row, "error": one_line(error)}


def _peak(name: str, job: Job) -> float | None:
    """Gigabytes of a step on CUDA; None where they are more than there are."""
    free_memory(job.device)
    try:
        return rounded(build(name, job, compiled=False).peak_bytes / 1e9)
    except torch.OutOfMemoryError:
        return None


def largest(fits, *, most: int) -> int:
    """The largest whole number up to `most` that fits, to an eighth of it; 0 where 1 does not."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    if high > most:
        return low
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
