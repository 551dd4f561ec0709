"""The U-Net's forward pass beside diffusers' with the same weights, and the memory that loading a model takes."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

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
    parser = argparse.ArgumentParser(prog="bench_networks", description=__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), action="append", help="all by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)} only, a minute")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = args.model or (QUICK if args.quick else tuple(MODELS))
    rows = []
    for row in measure(models, args.batch, seconds=4 if args.quick else 20):
        rows.append(row)
        shown = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
        print("  ".join(shown), flush=True)
        if args.json:  # after each row: what was measured stays measured
            args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(models: Sequence[str], batches: Sequence[int], *, seconds: float) -> Iterator[dict]:
    for model in models:
        for batch in batches:
            yield from forward_rows(model, batch, seconds=seconds)
    if LARGE in models:  # what a small file adds is lost beside the imports
        yield from load_rows(LARGE)


def machine() -> dict:
    """Where the figures come from."""
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "driver": None,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def random_network(model: str) -> torch.nn.Module:
    """The ADM network of MODELS with no zero layer left."""
    from fastcm import networks

    torch.manual_seed(0)
    network = networks.build("adm", MODELS[model]).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network


def forward_rows(model: str, batch: int, *, seconds: float) -> list[dict]:
    """Two rows, fastcm and diffusers, measured in turns in one process; raises where the outputs differ by more than 1e-4 of their size."""
    import diffusers

    from fastcm.weights.diffusers import to_config, to_state

    network = random_network(model)
    unet = diffusers.UNet2DModel(**{name: value for name, value in to_config(network).items() if not name.startswith("_")})
    unet.load_state_dict(to_state(network))
    unet.eval().requires_grad_(False)
    config = network.config
    x = torch.randn(batch, config.in_channels, config.resolution, config.resolution)
    c_noise, labels = torch.randn(batch) * 300, torch.arange(batch) % config.num_classes
    calls = {"fastcm": lambda: network(x, c_noise, labels), "diffusers": lambda: unet(x, c_noise, labels).sample}
    difference = (calls["fastcm"]() - calls["diffusers"]()).abs().max() / calls["diffusers"]().abs().max()
    if difference > 1e-4:
        raise RuntimeError(f"outputs differ by {difference:.2g} in {model}")
    times = in_turns(calls, seconds=seconds)
    middle = {name: percentile(values, 50) for name, values in times.items()}
    return [
        {
            "bench": "forward", "model": model, "batch": batch, "backend": name,
            **{f"p{p}_ms": percentile(values, p) for p in (20, 50, 80, 95, 99)},
            "images_per_s": 1000 * batch / middle[name], "ratio_to_diffusers": middle[name] / middle["diffusers"],
        }
        for name, values in times.items()
    ]  # fmt: skip


def in_turns(calls: dict[str, Callable[[], object]], *, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, one after the other, so that what else the machine does falls on all alike; at least five rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, round(percent / 100 * (len(values) - 1)))]


def load_rows(model: str) -> Iterator[dict]:
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
