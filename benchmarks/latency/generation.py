"""How busy the network is in a long job: images to an .npz and to a folder of PNGs, as `fastcm sample` writes them, split by phase.

`python -m fastcm.benchmarks.latency.generation --model digits,colour32 --images 10000 --json OUT`. On a CPU a phase is its time on the
thread that draws; writing goes on beside it. On CUDA phases are the profiler's kernels, and the network is what is neither a kernel of
noise or uint8 nor a copy; what runs by kernels.use("reference") has no such names and counts as network.
"""

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from fastcm import kernels
from fastcm.benchmarks.models import MODELS, Model
from fastcm.benchmarks.options import add_options, names
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.cli.sample import write_folder, write_npz
from fastcm.errors import InputError
from fastcm.generation.background import Background
from fastcm.generation.generator import Generator

IDENTITY = ("bench", "model", "images", "backend", "output", "steps", "precision")
OUTPUTS = ("npz", "folder")
QUICK_IMAGES = {"digits": 2048, "colour32": 64}
# Kernels of CUDA that are not the network's, by a part of their names.
OTHER_KERNELS = {"noise": ("philox", "renoise"), "uint8": ("uint8",), "copies": ("memcpy", "memset")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.latency.generation", description=__doc__)
    add_options(parser, models=MODELS, backends=("fastcm",))
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="images of a job (default: 10000; --quick: few)")
    parser.add_argument("--steps", type=int, default=1, metavar="K", help="network calls per image (default: 1)")
    parser.add_argument("--output", metavar="NAMES", help=f"what is written, separated by commas: {', '.join(OUTPUTS)}")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise InputError(f"illegal value in --images: {args.images}. Give 1 or more.")
    file = ResultsFile(args.json, identity=IDENTITY)
    for name in names(args.model, MODELS, "--model", ("digits", "colour32")):
        generator = Generator(MODELS[name].denoiser(), MODELS[name].info, device=args.device)
        images = min(args.images, QUICK_IMAGES.get(name, 256)) if args.quick else args.images
        for output in names(args.output, OUTPUTS, "--output", OUTPUTS):
            row = measure(MODELS[name], generator, images, output, args.steps)
            print(described(row), flush=True)
            file.add(row)
    return 0


def measure(model: Model, generator: Generator, images: int, output: str, steps: int) -> Row:
    """One job after a warm-up of its batch sizes: wall time, and the share of it that each phase took."""
    for size in {min(images, generator.batch_size), images % generator.batch_size}:
        generator(range(size), steps=steps)
    profile = cuda_phases if generator.device.type == "cuda" else cpu_phases
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / ("x.npz" if output == "npz" else "pngs")
        seeds = list(range(images))
        with profile(generator, steps) as phases:
            start = time.perf_counter()
            batches = generator.batches(seeds, steps=steps)
            if output == "npz":
                write_npz(out, batches, seeds, None, generator)
            else:
                write_folder(out, batches, images, {})
            wall = time.perf_counter() - start
    shares = {f"{phase}_percent": round(100 * seconds / wall, 2) for phase, seconds in sorted(phases.items())}
    row = {"bench": "generation", "model": model.name, "backend": "fastcm", "output": output, "images": images, "steps": steps}
    row |= {"device": generator.device.type, "precision": generator.precision, "batch": generator.batch_size}
    return {**row, "wall_s": round(wall, 3), "images_per_s": round(images / wall, 1), **shares}


@contextlib.contextmanager
def cpu_phases(generator: Generator, steps: int) -> Iterator[dict[str, float]]:
    """Seconds in the network, in noise and in uint8 on the thread that draws, and of writing on the others ("written_beside")."""
    phases, lock, undo = defaultdict(float), threading.Lock(), []

    def timed(phase: str, function):
        def run(*arguments, **options):
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                with lock:
                    phases[phase] += time.perf_counter() - start

        return run

    def replace(owner, name: str, by) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, by)

    # Noise within a network call does not occur, so no time counts twice.
    for level in {id(level): level for level in map(generator.level, generator.sigmas(steps))}.values():
        replace(level, "forward", timed("network", level.forward))
    for name, phase in (("normal", "noise"), ("renoise", "noise"), ("to_uint8", "uint8")):
        replace(kernels, name, timed(phase, getattr(kernels, name)))
    run = Background.run
    replace(Background, "run", lambda self, function, *arguments: run(self, timed("written_beside", function), *arguments))
    try:
        yield phases
    finally:
        for owner, name, own in undo:
            setattr(owner, name, own)


@contextlib.contextmanager
def cuda_phases(generator: Generator, steps: int) -> Iterator[dict[str, float]]:
    """Seconds that the GPU worked on the network, on noise, uint8 and copies, by the profiler; "gpu" is their union."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    phases: dict[str, float] = {}
    with profiler(activities=[ProfilerActivity.CUDA]) as record:
        yield phases
        torch.cuda.synchronize(generator.device)
    events = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = defaultdict(list)
    for event in events:
        spans[phase_of(event.name)].append((event.time_range.start, event.time_range.end))
    phases |= {phase: union(places) / 1e6 for phase, places in spans.items()}
    phases["gpu"] = union(place for places in spans.values() for place in places) / 1e6


def phase_of(kernel: str) -> str:
    """Which phase a CUDA kernel belongs to, by its name."""
    return next((phase for phase, parts in OTHER_KERNELS.items() if any(part in kernel.lower() for part in parts)), "network")


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length that intervals (start, end) cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def described(row: Row) -> str:
    """The profile of a job in one line."""
    shares = ", ".join(f"{name.removesuffix('_percent').replace('_', ' ')} {row[name]:g} %" for name in row if name.endswith("_percent"))
    job = f"{row['model']}: {row['images']} images to {row['output']}, {row['device']} {row['precision']}, batches of {row['batch']}"
    return f"{job}: {row['wall_s']:g} s, {row['images_per_s']:g} images/s; {shares}"


if __name__ == "__main__":
    sys.exit(main())
