"""A first quarter of an hour on a GPU, cheapest truths first: `make gpu STAGE=all`.

Stages are lists of commands, each with its own time. What a command has done is a row of DIR/stages.json at once: what passed or failed is
not done again, what ran out of time goes on in the next call, by its own file of rows. --dry rehearses everything on the pretended devices
of a checkout's tests/pretend_cuda, with small networks, so that no slip of the pen costs a minute of a GPU.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.pages import tables
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.errors import InputError, nearest

IDENTITY = ("bench", "stage", "command")
CHECKOUT = Path(__file__).resolve().parents[2]
PRETENDED = CHECKOUT / "tests" / "pretend_cuda"
ALL_SECONDS = 720
LATENCY, TRAIN = ("mnist", "cifar10", "imagenet64"), ("cifar10", "imagenet64")
# A command is given what is left of its stage and of the whole call, but not started with less than this.
LEAST_S = 5
# A processor is given so many times the time of a GPU.
DRY_PATIENCE = 20
# Of gpu tests, by what they find: work that only a GPU does, then every kernel against its reference, then what compiles long.
TESTS = (
    ("graphs", "tests/generation/test_cuda_graph.py tests/generation/test_generator.py tests/data tests/networks"),
    ("training", "tests/training/test_captured_step.py"),
    ("images", "tests/kernels/test_perturb.py tests/kernels/test_renoise.py tests/kernels/test_philox.py"),
    ("networks", "tests/kernels/test_group_norm.py tests/kernels/test_group_statistics.py tests/kernels/test_precondition.py"),
    ("losses", "tests/kernels/test_distance.py tests/kernels/test_optimizer_step.py tests/kernels/test_ema_update.py"),
    ("benchmarks", "tests/benchmarks"),
    ("compiled", "tests/generation/test_compiled.py"),
)


@dataclass(frozen=True)
class Command:
    """One row: `arguments` to Python, in a process of its own."""

    name: str
    arguments: list[str]


@dataclass(frozen=True)
class Stage:
    """Commands one after the other, ended after `seconds` together."""

    name: str
    seconds: int
    commands: list[Command]


def main(argv: list[str] | None = None) -> int:
    """Runs what is not done yet within the time; returns 1 if a command failed or ran out of time."""
    parser = argparse.ArgumentParser(prog="make gpu STAGE=all", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of rows, read by the next call")
    parser.add_argument("--only", metavar="NAMES", help="some stages, separated by commas")
    parser.add_argument("--seconds", type=int, default=ALL_SECONDS, help=f"of the whole call (default: {ALL_SECONDS})")
    parser.add_argument("--dry", action="store_true", help="on pretended devices")
    args = parser.parse_args(argv)
    if args.dry and not PRETENDED.is_dir():
        raise InputError(f"no pretended device for --dry: {PRETENDED} is missing. Run it in a checkout.")
    if not args.dry and not torch.cuda.is_available():
        raise InputError(f"no CUDA device for STAGE=all: torch {torch.__version__} sees none. Rehearse it with ARGS=--dry.")
    stages = {stage.name: stage for stage in planned(args.out, dry=args.dry)}
    wanted = list(stages) if args.only is None else args.only.split(",")
    for name in wanted:
        if name not in stages:
            raise InputError(f"unknown stage in --only: {name}. Use some of {', '.join(stages)}.{nearest(name, stages)}")
    results = ResultsFile(args.out / "stages.json", identity=IDENTITY)
    patience = DRY_PATIENCE if args.dry else 1
    end = time.monotonic() + args.seconds * patience
    environ = environment(dry=args.dry)
    rows = [row for name in wanted for row in run_stage(stages[name], results, environ, end, patience)]
    write_auto_table(args.out)
    print(*summary(rows), sep="\n")
    return int(any(row["outcome"] != "passed" for row in rows))


def planned(out: Path, *, dry: bool) -> list[Stage]:
    """The stages, cheapest truths first."""
    fastcm = ["-m", "rehearsal"] if dry else ["-m", "fastcm"]

    def bench(kind: str, *options: str) -> list[str]:
        return [*fastcm, "bench", kind, "--device", "cuda", *options, "--json", str(out / f"{kind}.json")]

    pytest = ["-m", "pytest", "-m", "gpu and not long", "-q", "-p", "no:cacheprovider", "--timeout", "120"]
    if not dry and (os.cpu_count() or 1) >= 8 and importlib.util.find_spec("xdist"):
        pytest += ["-n", "8", "--dist", "worksteal"]
    start = [*fastcm, "start"] if dry else ["-m", "fastcm.benchmarks.first_hour.start"]
    latency = {name: ["--model", name, "--batch", "1", "--backend", "eager,fastcm", "--seconds", "2"] for name in LATENCY if name in MODELS}
    train = {name: ["--model", name, "--batch", str(MODELS[name].train_batches["cuda"][0]), "--seconds", "5"] for name in TRAIN}
    train = {name: ["--op", "step", "--backend", "published_step,fastcm", *options] for name, options in train.items()}
    return [
        Stage("start", 60, [Command("start", [*start, "--json", str(out / "start.json")])]),
        Stage("tests", 240, [Command(name, [*pytest, *files.split()]) for name, files in TESTS[: 1 if dry else None]]),
        Stage("kernels", 180, [Command("kernels", bench("kernels", "--quick", "--once"))]),
        Stage("latency", 100, [Command(name, bench("latency", *options)) for name, options in latency.items()]),
        Stage("train", 140, [Command(name, bench("train", *options)) for name, options in train.items()]),
    ]


def environment(*, dry: bool) -> dict[str, str]:
    """This one, with the pretended devices where they are wanted; the benchmarks see their own folder alone as the place of results."""
    paths = [str(PRETENDED)] if dry else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}


def run_stage(stage: Stage, results: ResultsFile, environ: dict[str, str], end: float, patience: int) -> Iterator[Row]:
    """Yields the row of every command, those of earlier calls included."""
    stage_end = min(end, time.monotonic() + stage.seconds * patience)
    for command in stage.commands:
        row = {"bench": "gpu", "stage": stage.name, "command": command.name}
        if (known := results.find(row)) is None:
            left = stage_end - time.monotonic()
            if left < LEAST_S:
                known = row | {"outcome": "not started", "last": "no time left"}
            else:
                known = row | run(command, environ, left)
                results.add(known)
            print(f"{stage.name:9}{command.name:12}{known['outcome']:12}{known.get('seconds', 0):7.1f} s  {known['last']}", flush=True)
        yield known


def run(command: Command, environ: dict[str, str], seconds: float) -> Row:
    """outcome: passed, failed, or out of time, which alone counts as an error to be run again; last: the last line that was printed."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, *command.arguments], stdout=output, stderr=subprocess.STDOUT, env=environ, cwd=CHECKOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = [line.strip() for line in output.read().splitlines() if line.strip()]
    spent = round(time.monotonic() - began, 1)
    told = {"seconds": spent, "last": (lines or ["no output"])[-1][:300]}
    if process.returncode == -signal.SIGKILL:
        return told | {"outcome": "out of time", "error": f"ended after {spent:g} s"}
    if process.returncode == 0:
        return told | {"outcome": "passed"}
    return told | {"outcome": "failed", "code": process.returncode, "output": lines[-40:]}


def write_auto_table(out: Path) -> None:
    """What `auto` would take by the kernels' rows so far, as DIR/auto-table.json; kernels/launch.py gets it by pages/tables.py --auto."""
    if (out / "kernels.json").exists():
        rows = json.loads((out / "kernels.json").read_text(encoding="utf-8"))["rows"]
        (out / "auto-table.json").write_text(json.dumps(tables.auto_table(rows), indent=1) + "\n", encoding="utf-8")


def summary(rows: list[Row]) -> list[str]:
    """How many commands came to which end, and what to do."""
    outcomes = Counter(row["outcome"] for row in rows)
    lines = [", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())]
    if outcomes["out of time"] or outcomes["not started"]:
        lines.append("The same command goes on where this one stopped.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
