"""Hours in minutes: train, sample, export and serve again and again, many threads on one generator; memory must stay flat.

    python -m fastcm.benchmarks.reliability.soak --minutes 30 [--json OUT]

Ends with 1 at the first error, at the first image that differs from the first round's, or where memory grew by more than 2 %.
"""

import argparse
import contextlib
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import fastcm
from fastcm import runs
from fastcm.errors import RunError

THREADS, SEEDS, GROWTH = 4, 8, 0.02
SMALL = {
    "network.channels": 8,
    "network.head_channels": 8,
    "network.channel_mult": (1, 2),
    "network.blocks": 1,
    "batch": 16,
    "precision": "fp32",
    "device": "cpu",
    "compile": "off",
}
STEPS = 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.reliability.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--json", type=Path, help="where each round's memory is written")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rounds = soak(Path(folder), seconds=60 * args.minutes, on_round=print_round)
    if args.json is not None:
        args.json.write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")
    for name in ("here_mb", "server_mb"):
        print(f"{name}: {growth([row[name] for row in rounds]):+.2%} over {len(rounds)} rounds")
    check_flat(rounds)
    return 0


def soak(folder: Path, *, seconds: float, on_round: Callable[[dict], None]) -> list[dict]:
    """Rounds until the time is over, two at least: {"round", "here_mb", "server_mb"} of each. Raises what goes wrong."""
    train(folder / "served", nimg=16 * STEPS)
    rounds, end, expected = [], time.monotonic() + seconds, None
    with server(folder / "served") as (address, pid):
        while time.monotonic() < end or len(rounds) < 2:
            images = one_round(folder / "run", address)
            expected = images if expected is None else expected
            for name, array in images.items():
                if not np.array_equal(array, expected[name]):
                    raise RunError(f"images that differ from the first round's in soak: {name}, round {len(rounds)}. Seek shared state.")
            gc.collect()
            rounds.append({"round": len(rounds), "here_mb": resident_mb("self"), "server_mb": resident_mb(pid)})
            on_round(rounds[-1])
    return rounds


def one_round(out: Path, address: str) -> dict[str, np.ndarray]:
    """Trains and resumes a run, samples it by torch and by ONNX from many threads, asks the server; the images by name."""
    shutil.rmtree(out, ignore_errors=True)
    train(out, nimg=8 * STEPS)
    train(out, nimg=16 * STEPS)  # resumed
    generator = fastcm.load(out, device="cpu")
    torch_images = from_threads(lambda seed: generator([seed], labels=seed % 10)[0])
    # By the command, in a process of its own: torch.export keeps what it traced, 2 MB of a small network, as long as a process lives.
    subprocess.run([sys.executable, "-m", "fastcm", "export", str(out), "--onnx", str(out / "model.onnx")], check=True, capture_output=True)
    onnx_generator = fastcm.load(out / "model.onnx")
    onnx_images = from_threads(lambda seed: onnx_generator([seed], labels=seed % 10)[0])
    served = from_threads(lambda seed: np.frombuffer(fetch(f"{address}/image?seed={seed}&label={seed % 10}"), np.uint8))
    return {"torch": torch_images, "onnx": onnx_images, "served": np.concatenate([len(served), *served], axis=None)}


def train(out: Path, *, nimg: int) -> None:
    runs.start(runs.plan("digits", out=out, changes={**SMALL, "duration_kimg": nimg / 1000}))


def from_threads(draw: Callable[[int], np.ndarray]) -> list[np.ndarray] | np.ndarray:
    """draw(seed) of every seed, by several threads at once, each of which draws all; they must agree."""
    results: list[list] = [[] for _ in range(THREADS)]
    errors: list[BaseException] = []

    def work(mine: list) -> None:
        try:
            mine += [draw(seed) for seed in range(SEEDS)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    for other in results[1:]:
        if not all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True)):
            raise RunError("images that differ between threads in soak: the same seeds. Look for shared state.")
    first = results[0]
    return np.stack(first) if len({image.shape for image in first}) == 1 else first


@contextlib.contextmanager
def server(model: Path) -> Iterator[tuple[str, int]]:
    """`fastcm serve` of the model: its address and its process id; ended, and looked at, in the end."""
    command = [sys.executable, "-m", "fastcm", "serve", str(model), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if " at http" not in line:
                raise RunError(f"server that does not start in soak: {line.strip() or process.wait()}. Run fastcm serve by itself.")
            yield line.split(" at ")[1].split(" ")[0], process.pid
            process.terminate()
            if process.wait(60) != 143:
                raise RunError(f"server that does not end as it should in soak: exit code {process.returncode}.")
        finally:
            process.kill()


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def resident_mb(pid: int | str) -> float:
    """Memory that a process holds, MB."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RunError(f"process that ended in soak: {pid}.")


def growth(values: list[float]) -> float:
    """How much the last third is above the first one after the warm-up (a third of the rounds), by their medians."""
    part = max(1, len(values) // 3)
    return statistics.median(values[-part:]) / statistics.median(values[part : 2 * part] or values[:part]) - 1


def check_flat(rounds: list[dict]) -> None:
    """RunError where the memory of this process or of the server grew."""
    for name in ("here_mb", "server_mb"):
        grown = growth([row[name] for row in rounds])
        if grown > GROWTH:
            raise RunError(f"memory that grows in soak: {name} by {grown:.1%} over {len(rounds)} rounds ({GROWTH:.0%} at most).")


def print_round(row: dict) -> None:
    print(f"round {row['round']:4d}  here {row['here_mb']:7.1f} MB  server {row['server_mb']:7.1f} MB", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunError as error:
        sys.exit(f"soak: {error}")
