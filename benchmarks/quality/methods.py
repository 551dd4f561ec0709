"""Every training method on built-in digits with the same number of network calls: three seeds each, and which of the papers' orderings
show.

`make methods`, or `python -m fastcm.benchmarks.quality.methods --json OUT [--preset mnist]`: as many cells at once as there are cores, one
thread each; cells in the file are not run again, cells that were interrupted go on. `--docs RESULTS...` writes the tables of these files,
the later ones' cells before the earlier ones', into docs/training.md.
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
IDENTITY = ("bench", "preset", "cell", "seed", "steps")
PRESETS = ("digits", "mnist")
SEEDS = (0, 1, 2)
BUDGET_KCALLS = 40  # network calls of each run, in thousands times one image


@dataclass(frozen=True)
class Cell:
    """One way to train. calls: of a network, for one image of training (a pass of the derivative counts as two)."""

    name: str
    calls: int
    arguments: str
    model: str | None = None  # the option that names the teacher, or the first stage
    teaching: str = ""  # what its teacher's training has beside that of the others'
    first: "Cell | None" = None  # its first stage, which takes half of the network calls

    @property
    def teacher(self) -> str | None:
        """The folder of the teacher that it or its first stage learns from."""
        if self.first is not None:
            return self.first.teacher
        return None if self.model is None else f"teacher{slug(self.teaching)}"


HEUN = "--method cd --set objective.solver=heun"
FEATURES = "--set objective.loss_weight=uniform --set objective.distance"
ECT = Cell("ect", 2, "--method ect", "--init")
CELLS = (
    Cell("edm, 18 steps of Heun", 1, "--method edm"),
    Cell("cd, Heun", 4, HEUN, "--teacher"),
    Cell("cd, Euler", 3, "--method cd --set objective.solver=euler", "--teacher"),
    Cell("cd, Heun, l2", 4, f"{HEUN} {FEATURES}=l2", "--teacher"),
    Cell("cd, Heun, classifier distance", 4, f"{HEUN} {FEATURES}=classifier", "--teacher"),
    # Two calls more: each of the teacher's is one with the class and one without.
    Cell("cd, Heun, guided by 1.5", 6, f"{HEUN} --guidance 1.5", "--teacher", teaching=" --label-drop 0.1"),
    Cell("ct, adaptive N and mu", 2, "--method ct --set objective.s1=40"),
    Cell(
        "ct, fixed N and mu",
        2,
        "--method ct --set objective.curriculum=fixed --set objective.s0=41 --set objective.s1=41 "
        "--set objective.mu_schedule=fixed --set objective.mu0=0.99",
    ),
    Cell("ict", 2, "--method ict"),
    ECT,
    Cell("tcm, from ect", 3, "--method tcm", "--init", first=ECT),
    Cell("scd", 4, "--method scd", "--teacher"),
    Cell("sct", 3, "--method sct"),
    Cell("meanflow", 3, "--method meanflow"),
    Cell("meanflow, from a diffusion model", 3, "--method meanflow", "--init"),
)
# What the papers find, as (better, worse) by the Frechet distance of one step.
ORDERINGS = (
    ("distillation from a good teacher beats training from data", "cd, Heun", "ct, adaptive N and mu"),
    ("Heun beats Euler", "cd, Heun", "cd, Euler"),
    ("a distance of features beats l2", "cd, Heun, classifier distance", "cd, Heun, l2"),
    ("adaptive schedules beat fixed ones", "ct, adaptive N and mu", "ct, fixed N and mu"),
    ("iCT beats CT", "ict", "ct, adaptive N and mu"),
    ("tuning a diffusion model (ECT) beats training from nothing (iCT)", "ect", "ict"),
    ("a guided teacher's student beats an unguided one's", "cd, Heun, guided by 1.5", "cd, Heun"),
    ("average velocities (MeanFlow) beat iCT", "meanflow", "ict"),
    ("a second stage of half the calls (TCM) beats its first stage's method alone", "tcm, from ect", "ect"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.methods", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the rows go; cells that it holds are not run again")
    parser.add_argument("--preset", choices=PRESETS, default="digits", help="the data set and its networks (digits)")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="where the runs lie (runs/methods, or runs/methods-mnist)")
    parser.add_argument("--budget", type=float, default=BUDGET_KCALLS, metavar="KCALLS", help="network calls of a run, in thousands")
    parser.add_argument("--teacher-kimg", type=float, metavar="KIMG", help="how long the shared teachers train; as their preset says")
    parser.add_argument("--only", choices=[cell.name for cell in CELLS], action="append", help="this cell alone; may be repeated")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=list(SEEDS), metavar="S,S")
    parser.add_argument("--docs", type=Path, nargs="+", metavar="RESULTS", help="write these files' tables into docs/training.md")
    args = parser.parse_args(argv)
    if args.docs is not None:
        put_table(DOCS, tables([json.loads(path.read_text(encoding="utf-8")) for path in args.docs]), mark=MARK)
        return 0
    file = ResultsFile(args.json, identity=IDENTITY)
    file.rows = [{"preset": "digits", **row} for row in file.rows]
    runs = args.runs or Path("runs") / ("methods" if args.preset == "digits" else f"methods-{args.preset}")
    cells = [cell for cell in CELLS if not args.only or cell.name in args.only]
    wanted = [
        (cell, seed)
        for seed in args.seeds
        for cell in cells
        if file.find({"bench": "methods", "preset": args.preset, "cell": cell.name, "seed": seed, "steps": 1}) is None
    ]
    duration = "" if args.teacher_kimg is None else f" --duration {args.teacher_kimg:g}kimg"
    for cell in {cell.teacher: cell.first or cell for cell, _ in wanted if cell.teacher}.values():
        call(f"fastcm train {args.preset} --method edm{cell.teaching}{duration} --out {runs / cell.teacher}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows in pool.map(lambda item: measure(*item, args.preset, runs, args.budget), wanted):
            file.add(*rows)
            print(f"{rows[0]['cell']}, seed {rows[0]['seed']}: {rows[0]['accuracy']:.2%}, {rows[0]['fd_ratio']:.2f} times real", flush=True)
    return 0


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub("[^a-z0-9.]+", "-", name.lower())


def measure(cell: Cell, seed: int, preset: str, runs: Path, budget_kcalls: float) -> list[Row]:
    """Trains one cell (or goes on with it), its first stage before it, and evaluates it: a row per number of sampling steps."""
    out, model, trains = runs / f"{slug(cell.name)}-{seed}", cell.teacher, []
    stages = [(cell, out)] if cell.first is None else [(cell.first, runs / f"{slug(cell.name)}-first-{seed}"), (cell, out)]
    for stage, folder in stages:
        kimg = budget_kcalls / len(stages) / stage.calls
        given = "" if stage.model is None else f" {stage.model} {runs / model}"
        trains.append(f"fastcm train {preset} {stage.arguments}{given} --duration {kimg:g}kimg --seed {seed} --out {folder}")
        model = folder.name
    began = time.monotonic()
    for train in trains:
        call(train)
    train_s = time.monotonic() - began
    evaluation = out / "evaluation.json"
    call(f"fastcm evaluate {out} --data {preset} --metrics accuracy,fd --json {evaluation}")
    report = json.loads(evaluation.read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    consistency = next((row["self_consistency"] for row in reversed(log) if "self_consistency" in row), None)
    shared = {
        "bench": "methods",
        "preset": preset,
        "cell": cell.name,
        "seed": seed,
        "kimg": kimg,
        **({} if cell.first is None else {"first_kimg": budget_kcalls / 2 / cell.first.calls, "first_calls": cell.first.calls}),
        "calls": cell.calls,
        "train_s": round(train_s, 1),
        "self_consistency": consistency,
        "command": " && ".join(trains),
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


def tables(files: list[dict]) -> str:
    """Markdown: a part per data set, of the files' cells in the order of CELLS; a cell in several files is the last one's."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for results in files:
        for cell in dict.fromkeys((row.get("preset", "digits"), row["cell"]) for row in results["rows"]):
            cells[cell] = [row for row in results["rows"] if (row.get("preset", "digits"), row["cell"]) == cell]
    order = [cell.name for cell in CELLS]
    parts = []
    for preset in PRESETS:
        names = sorted((name for own, name in cells if own == preset), key=lambda name: order.index(name) if name in order else len(order))
        if names:
            parts += [f"### {preset}", "", table([row for name in names for row in cells[preset, name]]), ""]
    for machine in (results["machine"] for results in files):
        parts.append(
            f"{machine['cores']} cores of {machine['processor']}, one thread a run, torch {machine['torch']}, {machine['date']}, "
            f"commit {machine['commit']}."
        )
    return "\n".join(parts)


def table(rows: list[Row]) -> str:
    """Markdown: a line per cell with its mean and standard deviation over the seeds, and the orderings."""
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
        seen, calls = f"{own[0]['kimg']:.3g} kimg", f"{own[0]['calls']}"
        if "first_kimg" in own[0]:
            seen, calls = f"{own[0]['first_kimg']:.3g} and {seen}", f"{own[0]['first_calls']} and {calls}"
        lines.append(f"| {cell} | {seen} | {calls} | {' | '.join(figures)} | {consistency} |")
    lines += ["", *orderings(rows), "", f"Slowest run {max(row['train_s'] for row in rows):.0f} s."]
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
