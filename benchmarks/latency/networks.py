"""The U-Net's forward pass beside diffusers' with the same weights, and the memory that loading a model takes."""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fastcm.benchmarks.interleaved import Limits, percentiles, rounded, rounds, speedup
from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.options import add_options, names, sizes
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.errors import InputError

IDENTITY = ("bench", "model", "batch", "backend")
BACKENDS = ("fastcm", "diffusers", "diffusers_channels_last")
ADM = {name: model for name, model in MODELS.items() if model.in_diffusers}
QUICK = ("digits", "colour32")
LARGE = "imagenet64"
WRITERS = ("fastcm", "diffusers", "openai")  # the formats of load rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is asked for, prints a line per row, and writes the rows to --json."""
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.latency.networks", description=__doc__)
    add_options(parser, models=ADM, backends=BACKENDS)
    args = parser.parse_args(argv)
    if args.device not in ("auto", "cpu"):
        raise InputError(f"a comparison of CPUs in --device: {args.device}. Use --device cpu; fastcm bench latency has diffusers on CUDA.")
    results = ResultsFile(args.json, identity=IDENTITY)
    models = names(args.model, ADM, "--model", QUICK if args.quick else (*QUICK, LARGE))
    backends = {"diffusers", *names(args.backend, BACKENDS, "--backend", BACKENDS)}  # what the others are compared with is always there
    limits = Limits(args.seconds if args.seconds is not None else 4 if args.quick else 20, fewest=5, most=1000)
    for model in models:
        for batch in sizes(args.batch, "--batch", (1, 8)):
            if not _stands(results, backends, bench="forward", model=model, batch=batch):
                _take(results, forward_rows(model, batch, backends, limits))
    # What a small file adds is lost beside the imports.
    if LARGE in models and not _stands(results, WRITERS, bench="load", model=LARGE):
        _take(results, load_rows(LARGE))
    return 0


def _stands(results: ResultsFile, backends: Iterable[str], **fields) -> bool:
    return all(results.find({**fields, "backend": backend}) is not None for backend in backends)


def _take(results: ResultsFile, rows: Iterable[Row]) -> None:
    for row in rows:
        results.add(row)
        print(json.dumps(row), flush=True)


def forward_rows(model: str, batch: int, backends: set[str], limits: Limits) -> list[Row]:
    """Rows of fastcm, of diffusers as it comes, and of diffusers in fastcm's layout, measured in turns in one process.

    fastcm's weights are channels last, as fastcm.load puts them. Raises where outputs differ by more than 1e-4 of their size.
    """
    import diffusers

    from fastcm.weights.diffusers import to_config, to_state

    network = ADM[model].denoiser().network.to(memory_format=torch.channels_last)
    unet = diffusers.UNet2DModel(**{name: value for name, value in to_config(network).items() if not name.startswith("_")})
    unet.load_state_dict(to_state(network))
    unet.eval().requires_grad_(False)
    other = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    x = torch.randn(batch, ADM[model].channels, ADM[model].resolution, ADM[model].resolution)
    c_noise = torch.randn(batch) * 300
    labels = torch.arange(batch) % ADM[model].classes if ADM[model].classes else None
    calls = {
        "fastcm": lambda turn: network(x, c_noise, labels),
        "diffusers": lambda turn: unet(x, c_noise, labels).sample,
        "diffusers_channels_last": lambda turn: other(x, c_noise, labels).sample,
    }
    calls = {name: call for name, call in calls.items() if name in backends}
    images = {name: call(0) for name, call in calls.items()}
    difference = max((image - images["diffusers"]).abs().max() for image in images.values()) / images["diffusers"].abs().max()
    if difference > 1e-4:
        raise RuntimeError(f"outputs differ by {difference:.2g} in {model}")
    times = rounds(calls, limits)
    return [
        {
            "bench": "forward",
            "model": model,
            "batch": batch,
            "backend": name,
            "rounds": len(values),
            **percentiles(values),
            "images_per_s": rounded(1000 * batch / percentiles(values)["p50_ms"]),
            "speedup_over_diffusers": speedup(values, times["diffusers"]),
        }
        for name, values in times.items()
    ]


def load_rows(model: str) -> Iterator[Row]:
    """A row per format: peak memory of a process that loads the model and reads every weight, beyond its imports, over the file's size."""
    from fastcm.weights.diffusers import write_diffusers
    from fastcm.weights.model_folder import save_model
    from fastcm.weights.openai import write_openai

    denoiser = ADM[model].denoiser()
    for name, write in zip(WRITERS, (save_model, write_diffusers, write_openai), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("model.pt" if name == "openai" else "model")
            write(path, denoiser, {})
            command = [sys.executable, __file__, "--load", str(path), str(ADM[model].resolution)]
            peak, milliseconds = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
            size = max(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
        yield {
            "bench": "load",
            "model": model,
            "backend": name,
            "p50_ms": rounded(milliseconds),
            "file_bytes": size,
            "peak_bytes": int(peak),
            "peak_over_file": rounded(peak / size),
        }


def load_once(path: str, resolution: int) -> None:
    """Prints the peak memory in bytes beyond the imports, and the milliseconds of the load without the reading of every weight."""
    import fastcm.weights.diffusers  # noqa: F401, imported before memory is counted
    from fastcm.api import load_denoiser
    from fastcm.weights.openai import read_openai

    before = peak_bytes()
    start = time.perf_counter()
    network = read_openai(path, image_size=resolution)[0] if os.path.isfile(path) else load_denoiser(path)[0].network
    milliseconds = 1000 * (time.perf_counter() - start)
    assert all(torch.isfinite(parameter.sum()) for parameter in network.parameters())
    print(peak_bytes() - before, milliseconds)


def peak_bytes() -> int:
    """Peak resident memory of this process since it began to run this program (Linux; getrusage would include the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load_once(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main())
