"""Every training method on the digits with the same number of network calls: three seeds each, and which of the paper's orderings show.

`make methods`, or `python -m fastcm.benchmarks.quality.methods --json OUT`: as many cells at once as there are cores, one thread each;
cells in the file are not run again, cells that were interrupted go on. `--docs RESULTS` writes that file's table into docs/training.md.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastcm.benchmarks.quality.generators import put_table
from fastcm.benchmarks.results_file import ResultsFile, Row

DOCS = Path(__file__).resolve().parents[2] / "docs" / "training.md"
MARK = "<!-- methods -->"
IDENTITY = ("bench", "cell", "seed", "steps")
SEEDS = (0, 1, 2)
BUDGET_KCALLS = 40  # network calls of each run, in thousands times one image
TEACHER_KIMG = 150


@dataclass(frozen=True)
class Cell:
    """One way to train. calls: of a network, for one image of training (a pass of the derivative counts as two)."""

    name: str
    calls: int
    arguments: str
    teacher: str | None = None  # the option that names the teacher


FEATURES = "--set objective.loss_weight=uniform --set objective.distance"
CELLS = (
    Cell("edm, 18 steps of Heun", 1, "--method edm"),
    Cell("cd, Heun", 4, "--method cd", "--teacher"),
    Cell("cd, Euler", 3, "--method cd --set objective.solver=euler", "--teacher"),
    Cell("cd, Heun, l2", 4, f"--method cd {FEATURES}=l2", "--teacher"),
    Cell("cd, Heun, classifier distance", 4, f"--method cd {FEATURES}=classifier", "--teacher"),
    Cell("ct, adaptive N and mu", 2, "--method ct --set objective.s1=40"),
    Cell(
        "ct, fixed N and mu",
        2,
        "--method ct --set objective.curriculum=fixed --set objective.s0=41 --set objective.s1=41 "
        "--set objective.mu_schedule=fixed --set objective.mu0=0.99",
    ),
    Cell("ict", 2, "--method ict"),
    Cell("ect", 2, "--method ect", "--init"),
    Cell("scd", 4, "--method scd", "--teacher"),
    Cell("sct", 3, "--method sct"),
)
# What the papers find, as (better, worse) by the Frechet distance of one step.
ORDERINGS = (
    ("distillation from a good teacher beats training from data", "cd, Heun", "ct, adaptive N and mu"),
    ("Heun beats Euler", "cd, Heun", "cd, Euler"),
    ("a distance of features beats l2", "cd, Heun, classifier distance", "cd, Heun, l2"),
    ("adaptive schedules beat fixed ones", "ct, adaptive N and mu", "ct, fixed N and mu"),
    ("iCT beats CT", "ict", "ct, adaptive N and mu"),
    ("tuning a diffusion model (ECT) beats training from nothing (iCT)", "ect", "ict"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.methods", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the rows go; cells that it holds are not run again")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), metavar="DIR", help="where the runs lie (runs/methods)")
    parser.add_argument("--budget", type=float, default=BUDGET_KCALLS, metavar="KCALLS", help="network calls of a run, in thousands")
    parser.add_argument("--teacher-kimg", type=float, default=TEACHER_KIMG, metavar="KIMG", help="how long the shared teacher trains")
    parser.add_argument("--only", choices=[cell.name for cell in CELLS], action="append", help="this cell alone; may be repeated")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=list(SEEDS), metavar="S,S")
    parser.add_argument("--docs", type=Path, metavar="RESULTS", help="write the table of this file into docs/training.md, run nothing")
    args = parser.parse_args(argv)
    if args.docs is not None:
        put_table(DOCS, table(json.loads(args.docs.read_text(encoding="utf-8"))), mark=MARK)
        return 0
    file = ResultsFile(args.json, identity=IDENTITY)
    cells = [cell for cell in CELLS if not args.only or cell.name in args.only]
    wanted = [
        (cell, seed)
        for seed in args.seeds
        for cell in cells
        if file.find({"bench": "methods", "cell": cell.name, "seed": seed, "steps": 1}) is None
    ]
    teacher = args.runs / "teacher"
    if any(cell.teacher for cell, _ in wanted):
        call(f"fastcm train digits --method edm --duration {args.teacher_kimg:g}kimg --out {teacher}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows in pool.map(lambda item: measure(*item, args.runs, teacher, args.budget), wanted):
            file.add(*rows)
            print(f"{rows[0]['cell']}, seed {rows[0]['seed']}: {rows[0]['accuracy']:.2%}, {rows[0]['fd_ratio']:.2f} times real", flush=True)
    return 0


def measure(cell: Cell, seed: int, runs: Path, teacher: Path, budget_kcalls: float) -> list[Row]:
    """Trains one cell (or goes on with it) and evaluates it: a row per number of sampling steps."""
    out = runs / f"{re.sub('[^a-z0-9]+', '-', cell.name.lower())}-{seed}"
    kimg = budget_kcalls / cell.calls
    guide = f" {cell.teacher} {teacher}" if cell.teacher else ""
    train = f"fastcm train digits {cell.arguments}{guide} --duration {kimg:g}kimg --seed {seed} --out {out}"
    began = time.monotonic()
    call(train)
    train_s = time.monotonic() - began
    evaluation = out / "evaluation.json"
    call(f"fastcm evaluate {out} --data digits --metrics accuracy,fd --json {evaluation}")
    report = json.loads(evaluation.read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    consistency = next((row["self_consistency"] for row in reversed(log) if "self_consistency" in row), None)
    shared = {
        "bench": "methods",
        "cell": cell.name,
        "seed": seed,
        "kimg": kimg,
        "calls": cell.calls,
        "train_s": round(train_s, 1),
        "self_consistency": consistency,
        "command": train,
    }
    return [
        {
            **shared,
            "steps": row["nfe"] if len(report["sets"]) > 1 else 1,
            "nfe": row["nfe"],
            "accuracy": row["accuracy"],
            "fd_mean": row["fd"]["mean"],
            "fd_ratio": row["fd"]["ratio"],
        }
        for row in report["sets"]
    ]


def call(command: str) -> None:
    """Runs a command of fastcm quietly and on one thread; its error ends the benchmark."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-m", *shlex.split(command)], env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"quality.methods: {command} ended with {result.returncode}: {result.stderr.strip().splitlines()[-1]}")


def table(results: dict) -> str:
    """Markdown: a line per cell with its mean and standard deviation over the seeds, the orderings, and the machine."""
    rows, machine = results["rows"], results["machine"]
    lines = [
        "| trained by | images seen | calls per image | recognised, 1 step | Fréchet, times real, 1 step | recognised, 2 steps "
        "| Fréchet, times real, 2 steps | self-consistency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in dict.fromkeys(row["cell"] for row in rows):
        own = [row for row in rows if row["cell"] == cell]
        first, second = ([row for row in own if row["steps"] == steps] for steps in (1, 2))
        figures = [spread(part, name, form) for part in (first, second) for name, form in (("accuracy", ".1%"), ("fd_ratio", ".2f"))]
        consistency = spread([row for row in first if row["self_consistency"] is not None], "self_consistency", ".3f")
        lines.append(f"| {cell} | {own[0]['kimg']:g} kimg | {own[0]['calls']} | {' | '.join(figures)} | {consistency} |")
    lines += ["", *orderings(rows), ""]
    lines.append(
        f"{machine['cores']} cores of {machine['processor']}, one thread a run, torch {machine['torch']}, {machine['date']}, "
        f"commit {machine['commit']}; slowest run {max(row['train_s'] for row in rows):.0f} s."
    )
    return "\n".join(lines)


def spread(rows: list[Row], name: str, form: str) -> str:
    """Mean and standard deviation over the rows; nothing where there are none."""
    values = [row[name] for row in rows]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def orderings(rows: list[Row]) -> list[str]:
    """One line per ordering of the papers: shown, reversed, or not told apart (means nearer than their standard deviations together)."""
    lines = []
    for claim, better, worse in ORDERINGS:
        a, b = ([row["fd_mean"] for row in rows if row["cell"] == cell and row["steps"] == 1] for cell in (better, worse))
        if len(a) < 2 or len(b) < 2:
            continue
        gap, noise = statistics.mean(b) - statistics.mean(a), statistics.stdev(a) + statistics.stdev(b)
        verdict = "not told apart here" if abs(gap) <= noise else "shown" if gap > 0 else "reversed here"
        lines.append(f"- {claim}: **{verdict}** (Fréchet {statistics.mean(a):.1f} against {statistics.mean(b):.1f}).")
    return lines


if __name__ == "__main__":
    sys.exit(main())
