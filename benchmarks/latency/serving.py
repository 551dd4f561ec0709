"""`fastcm serve` under load: clients that each wait for their image before they ask for the next, against the generator's own batches.

`python -m fastcm.benchmarks.latency.serving --model digits,colour32 --concurrency 16 --json OUT`. Server, clients and generator
share the machine, over loopback. The generator draws batches of `concurrency` images by itself, before the server starts and after it ends.
"""

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastcm import api
from fastcm.benchmarks.interleaved import percentiles, rounded
from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.options import add_options, names, sizes
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.errors import InputError, RunError
from fastcm.weights.model_folder import save_model

IDENTITY = ("bench", "model", "concurrency", "device", "precision")
QUICK_REQUESTS = 300


def main(argv: list[str] | None = None) -> int:
    """Prints a line per model and concurrency, and returns 1 if a request failed."""
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.latency.serving", description=__doc__)
    add_options(parser, models=MODELS, backends=("fastcm",))
    parser.add_argument("--concurrency", default="16", metavar="SIZES", help="clients at once, separated by commas (default: 16)")
    number = f"of one image each (default: 10000; --quick: {QUICK_REQUESTS})"
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help=number)
    args = parser.parse_args(argv)
    if args.requests < 1:
        raise InputError(f"illegal value in --requests: {args.requests}. Give 1 or more.")
    requests = min(args.requests, QUICK_REQUESTS) if args.quick else args.requests
    file, failed = ResultsFile(args.json, identity=IDENTITY), 0
    for name in names(args.model, MODELS, "--model", ("digits",) if args.quick else ("digits", "colour32")):
        for concurrency in sizes(args.concurrency, "--concurrency", ()):
            row = measure(name, args.device, concurrency, requests, args.seconds or (2 if args.quick else 10))
            print(described(row), flush=True)
            file.add(row)
            failed += row["failed"]
    return int(failed > 0)


def described(row: Row) -> str:
    return (
        f"{row['model']} at concurrency {row['concurrency']}: {row['images_per_s']:g} images/s, {row['percent_of_generator']:g}% of the "
        f"generator's {row['generator_images_per_s']:g}; p50 {row['p50_ms']:g} ms, p99 {row['p99_ms']:g} ms; "
        f"{row['failed']} of {row['requests']} failed; batches of {row['images_per_batch']:g} on average"
    )


def measure(name: str, device: str, concurrency: int, requests: int, seconds: float) -> Row:
    with tempfile.TemporaryDirectory(prefix="fastcm-serve-") as folder:
        path = Path(folder) / name
        save_model(path, MODELS[name].denoiser(), MODELS[name].info)
        generator = api.load(path, device=device)
        before = generator_rate(generator, concurrency, seconds)
        with served(path, device) as port:
            asyncio.run(load(port, concurrency, 4 * concurrency))  # the first of each batch size prepares it
            start = time.perf_counter()
            milliseconds, failed = asyncio.run(load(port, concurrency, requests))
            took = time.perf_counter() - start
            per_batch = asyncio.run(average_batch(port))
        alone = max(before, generator_rate(generator, concurrency, seconds))
    if not len(milliseconds):
        raise RunError(f"every request failed in latency.serving: {failed}. Look at the server's own words.")
    rate = (requests - failed) / took
    return {
        "bench": "serve",
        "model": name,
        "concurrency": concurrency,
        "device": generator.device.type,
        "precision": generator.precision,
        "requests": requests,
        "failed": failed,
        "images_per_s": rounded(rate),
        "generator_images_per_s": rounded(alone),
        "percent_of_generator": rounded(100 * rate / alone),
        "images_per_batch": rounded(per_batch),
        **percentiles(milliseconds),
    }


def generator_rate(generator, batch: int, seconds: float) -> float:
    """Images per second of the generator by itself, in batches of one size."""
    generator(range(batch))
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        generator(range(done, done + batch))
        done += batch
    return done / took


@contextlib.contextmanager
def served(model: Path, device: str) -> Iterator[int]:
    """The port of a server in a process of its own."""
    command = [sys.executable, "-m", "fastcm", "serve", str(model), "--port", "0", "--device", device]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://[^:]+:(\d+)", process.stdout.readline())
        if address is None:
            raise RunError(f"fastcm serve did not start in latency.serving: exit code {process.wait()}. Its own line says why.")
        yield int(address[1])
    finally:
        process.terminate()
        process.wait()


async def load(port: int, concurrency: int, requests: int) -> tuple[np.ndarray, int]:
    """(milliseconds of every request that was answered with an image, how many were not)."""
    seeds, milliseconds, failures = iter(range(requests)), [], []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for seed in seeds:
            start = time.perf_counter_ns()
            try:
                status, _ = await asked(reader, writer, "POST", "/generate", json.dumps({"seeds": [seed]}).encode())
            except (OSError, EOFError, ValueError) as error:
                failures.append(error)
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                continue
            if status == 200:
                milliseconds.append((time.perf_counter_ns() - start) / 1e6)
            else:
                failures.append(status)
        writer.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return np.array(milliseconds), len(failures)


async def asked(reader, writer, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of one request on an open connection: a client that takes little of the machine from the server."""
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length:")[2].split("\r\n")[0])
    return int(head.split(" ", 2)[1]), await reader.readexactly(length)


async def average_batch(port: int) -> float:
    """Images per batch since the server's start, from its metrics."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    _, body = await asked(reader, writer, "GET", "/metrics")
    writer.close()
    figures = dict(line.split() for line in body.decode().splitlines() if line.startswith(("fastcm_images", "fastcm_batches")))
    return float(figures["fastcm_images_total"]) / float(figures["fastcm_batches_total"])


if __name__ == "__main__":
    sys.exit(main())
