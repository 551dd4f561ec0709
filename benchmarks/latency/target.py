"""`fastcm bench latency FILE|URL`: milliseconds of one call of what an app would embed, from a seed to uint8 on the host: all together,
and for files its parts by themselves, the noise and the rest.

FILE is a model that fastcm.load takes; URL the address of a `fastcm serve`. Percentiles are of single calls after a warm-up.
"""

import argparse
import http.client
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

from fastcm import api
from fastcm.benchmarks.interleaved import Limits, percentiles, rounds
from fastcm.benchmarks.options import sizes
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.errors import InputError, RunError
from fastcm.generation.sampler import SeedNoise

IDENTITY = ("bench", "model", "batch", "backend", "part")
SECONDS, QUICK_SECONDS, FEWEST = 10.0, 1.0, 20
Call = Callable[[int], object]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastcm bench latency FILE|URL", description=__doc__)
    parser.add_argument("target", metavar="FILE|URL", help="a model folder, an .onnx, or http://HOST:PORT of a fastcm serve")
    parser.add_argument("--batch", metavar="SIZES", help="images of one call, separated by commas (default: 1,16)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda; of a file")
    parser.add_argument("--seconds", type=float, help=f"how long each batch is timed (default: {SECONDS:g})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS:g} second each")
    parser.add_argument("--json", type=Path, metavar="OUT", help="the file of results")
    parser.add_argument("--trust", action="store_true", help="load files that hold programs")
    args = parser.parse_args(argv)
    seconds = args.seconds if args.seconds is not None else QUICK_SECONDS if args.quick else SECONDS
    limits = Limits(seconds, fewest=FEWEST, most=10_000)
    is_url = args.target.startswith(("http://", "https://"))
    generator = None if is_url else api.load(args.target, device=args.device, trust=args.trust)
    results = ResultsFile(args.json, identity=IDENTITY)
    print(f"{'batch':>5}  {'part':<9} {'p50':>9} {'p95':>9} {'p99':>9} ms   {args.target}")
    for batch in sizes(args.batch, "--batch", (1, 16)):
        calls = server_calls(args.target, batch) if is_url else file_calls(generator, batch)
        for call in calls.values():
            for index in range(3):
                call(index)
        times = rounds(calls, limits)
        backend = "fastcm serve" if is_url else generator.provider
        for part, milliseconds in times.items():
            row: Row = {
                "bench": "latency",
                "model": Path(args.target).name if not is_url else args.target,
                "batch": batch,
                "backend": backend,
                "part": part,
                "rounds": len(milliseconds),
                **percentiles(milliseconds),
            }
            results.add(row)
            print(f"{batch:5d}  {part:<9} {row['p50_ms']:9.4g} {row['p95_ms']:9.4g} {row['p99_ms']:9.4g}")
    return 0


def file_calls(generator, batch: int) -> dict[str, Call]:
    """together: seeds to images. noise: the noise of the seeds, on the generator's device. graph, of an exported file: given inputs to
    its output, copies included."""
    shape = (generator.channels, generator.resolution, generator.resolution)
    device = torch.device(generator.device)

    def noise(index: int) -> torch.Tensor:
        field = SeedNoise(torch.arange(index * batch, (index + 1) * batch).to(device), shape).normal(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return field

    calls: dict[str, Call] = {"together": lambda index: generator(range(index * batch, (index + 1) * batch)), "noise": noise}
    if hasattr(generator, "contract"):
        contract = generator.contract
        random = np.random.default_rng(0)
        feeds = {
            name: np.zeros(contract.shape(name, batch), dtype)
            if dtype == np.int64
            else random.standard_normal(contract.shape(name, batch)).astype(dtype)
            for name, (_, dtype) in contract.inputs.items()
        }
        calls["graph"] = lambda index: generator.run(feeds)
    return calls


def server_calls(url: str, batch: int) -> dict[str, Call]:
    """together: a request of `batch` seeds to the last byte of its answer, on one open connection. health: the same way without images."""
    address = urlsplit(url)
    if address.scheme != "http" or not address.hostname:
        raise InputError(f"not the address of a server in FILE|URL: {url}. Give it as http://127.0.0.1:8000.")
    connection = http.client.HTTPConnection(address.hostname, address.port or 80, timeout=60)

    def ask(method: str, path: str, body: dict | None) -> None:
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise RunError(f"no answer in FILE|URL: {url} ({error}). Start it with fastcm serve MODEL.") from None
        if answer.status != 200:
            raise RunError(f"an error of the server in FILE|URL: {url} ({answer.status} {text.decode(errors='replace')[:200].strip()}).")

    def together(index: int) -> None:
        ask("POST", "/generate", {"seeds": list(range(index * batch, (index + 1) * batch))})

    return {"together": together, "health": lambda index: ask("GET", "/health", None)}
