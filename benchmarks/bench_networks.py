"""The U-Net's forward pass beside diffusers' with the same weights, and the memory that loading a model takes."""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastcm.benchmarks.interleaved import Limits, percentiles, rounded, rounds, speedup
from fastcm.benchmarks.options import add_options, names, sizes
from fastcm.benchmarks.results_file import ResultsFile, Row

IDENTITY = ("bench", "model", "batch", "backend")
BACKENDS = ("fastcm", "diffusers", "diffusers_channels_last")
MODELS = {
    "digits": {
        "resolution": 8, "in_channels": 1, "out_channels": 1, "channels": 24, "channel_mult": (1, 2), "blocks": 1,
        "attention_resolutions": (4,), "head_channels": 24, "num_classes": 10,
    },
    "colour32": {
        "resolution": 32, "channels": 64, "channel_mult": (1, 2, 2), "blocks": 2, "attention_resolutions": (16, 8), "num_classes": 10,
    },
    "imagenet64": {"num_classes": 1000},
}  # fmt: skip
QUICK = ("digits", "colour32")
LARGE = "imagenet64"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is asked for, prints a line per row, and writes the rows to --json."""
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.bench_networks", description=__doc__)
    add_options(parser, models=MODELS, backends=BACKENDS)
    args = parser.parse_args(argv)
    results = ResultsFile(args.json, identity=IDENTITY)
    models = names(args.model, MODELS, "--model", QUICK if args.quick else tuple(MODELS))
    backends = {"diffusers", *names(args.backend, BACKENDS, "--backend", BACKENDS)}  # what the others are compared with is always there
    limits = Limits(args.seconds if args.seconds is not None else 4 if args.quick else 20, fewest=5, most=1000)
    for row in measure(models, sizes(args.batch, "--batch", (1, 8)), backends, limits):
        results.add(row)
        print(json.dumps(row), flush=True)
    return 0


def measure(models: Sequence[str], batches: Sequence[int], backends: set[str], limits: Limits) -> Iterator[Row]:
    for model in models:
        for batch in batches:
            yield from forward_rows(model, batch, backends, limits)
    if LARGE in models:  # what a small file adds is lost beside the imports
        yield from load_rows(LARGE)


def random_network(model: str) -> torch.nn.Module:
    """The ADM network of MODELS with no zero layer left."""
    from fastcm import networks

    torch.manual_seed(0)
    network = networks.build("adm", MODELS[model]).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network


def forward_rows(model: str, batch: int, backends: set[str], limits: Limits) -> list[Row]:
    """Rows of fastcm, of diffusers as it comes, and of diffusers in fastcm's layout, measured in turns in one process.

    fastcm's weights are channels last, as fastcm.load puts them. Raises where outputs differ by more than 1e-4 of their size.
    """
    import diffusers

    from fastcm.weights.diffusers import to_config, to_state

    network = random_network(model).to(memory_format=torch.channels_last)
    unet = diffusers.UNet2DModel(**{name: value for name, value in to_config(network).items() if not name.startswith("_")})
    unet.load_state_dict(to_state(network))
    unet.eval().requires_grad_(False)
    other = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    config = network.config
    x = torch.randn(batch, config.in_channels, config.resolution, config.resolution)
    c_noise, labels = torch.randn(batch) * 300, torch.arange(batch) % config.num_classes
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
            "bench": "forward", "model": model, "batch": batch, "backend": name, "rounds": len(values), **percentiles(values),
            "images_per_s": rounded(1000 * batch / percentiles(values)["p50_ms"]),
            "speedup_over_diffusers": speedup(values, times["diffusers"]),
        }
        for name, values in times.items()
    ]  # fmt: skip


def load_rows(model: str) -> Iterator[Row]:
    """A row per format: peak memory of a process that loads the model and reads every weight, beyond its imports, over the file's size."""
    from fastcm.consistency.denoiser import Denoiser, Preconditioning
    from fastcm.weights.diffusers import write_diffusers
    from fastcm.weights.model_folder import save_model
    from fastcm.weights.openai import write_openai

    denoiser = Denoiser(random_network(model), Preconditioning())
    writers = {"fastcm": save_model, "diffusers": write_diffusers, "openai": write_openai}
    for name, write in writers.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("model.pt" if name == "openai" else "model")
            write(path, denoiser, {})
            command = [sys.executable, __file__, "--load", str(path), str(denoiser.network.config.resolution)]
            peak, milliseconds = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
            size = max(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
        yield {
            "bench": "load", "model": model, "backend": name, "p50_ms": milliseconds, "file_bytes": size, "peak_bytes": int(peak),
            "peak_over_file": peak / size,
        }  # fmt: skip


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
