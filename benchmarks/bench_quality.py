"""How good the digits get: trains every method by the public commands, evaluates each, and writes rows, README table and picture.

`python -m fastcm.benchmarks.bench_quality --json OUT` trains into runs/ (what is there is resumed or reused) and measures;
`--readme` puts the committed rows into README.md.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from fastcm.benchmarks.results_file import ResultsFile, Row

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = ("bench", "model", "training", "sampling")
TEACHER = "runs/digits-edm"
# What is trained, by name: the run's folder and the arguments of `fastcm train`.
TRAININGS = {
    "ict": ("runs/digits", ""),
    "edm teacher": (TEACHER, "digits --method edm"),
    "cd, Heun": ("runs/digits-cd", f"digits --method cd --teacher {TEACHER}"),
    "cd, Euler": (
        "runs/digits-cd-euler",
        f"digits --method cd --teacher {TEACHER} --set objective.solver=euler --out runs/digits-cd-euler",
    ),
}
MARK = "<!-- quality -->"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.bench_quality", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the rows go; measured rows are kept")
    parser.add_argument("--only", choices=TRAININGS, help="one training alone")
    parser.add_argument("--readme", type=Path, metavar="RESULTS", help="write the table of this file into README.md, and measure nothing")
    args = parser.parse_args(argv)
    if args.readme is not None:
        put_table(ROOT / "README.md", json.loads(args.readme.read_text(encoding="utf-8")))
        return 0
    file = ResultsFile(args.json, identity=IDENTITY)
    for name, (folder, arguments) in TRAININGS.items():
        if args.only in (None, name):
            file.add(*measure(name, folder, arguments))
    return 0


def measure(name: str, folder: str, arguments: str) -> list[Row]:
    """Trains one run and returns a row per number of network calls, and one of the real images."""
    train = f"fastcm train {arguments}".strip()
    call(train)
    out = Path(folder) / "evaluation.json"
    evaluate = f"fastcm evaluate {folder} --data digits --json {out}"
    call(evaluate)
    report = json.loads(out.read_text(encoding="utf-8"))
    kimg = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["duration_kimg"]
    shared = {"bench": "quality", "model": "digits", "command": f"{train} && fastcm evaluate {folder} --data digits"}
    own = {**shared, "training": name, "kimg": kimg}
    rows = [{**own, "sampling": row["name"], "nfe": row["nfe"], **figures(row)} for row in report["sets"]]
    real = report["sets"][0]
    return [
        *rows,
        {**shared, "training": "real images", "sampling": "halves", "accuracy": report["real"]["accuracy"], **real_figures(real)},
    ]


def call(command: str) -> None:
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)


def figures(row: Row) -> Row:
    flat: Row = {"count": row["count"], "accuracy": row["accuracy"]}
    for name in ("fd", "fd_balanced"):
        flat |= {f"{name}_mean": row[name]["mean"], f"{name}_std": row[name]["std"], f"{name}_ratio": row[name]["ratio"]}
    near = row["neighbours"]
    return {**flat, "nearest_median": near["generated_median"], "closer_than_real_p1": near["closer_share"], "copies": near["identical"]}


def real_figures(row: Row) -> Row:
    flat: Row = {}
    for name in ("fd", "fd_balanced"):
        flat |= {f"{name}_mean": row[name]["real"]["mean"], f"{name}_std": row[name]["real"]["std"], f"{name}_ratio": 1.0}
    return {**flat, "nearest_median": row["neighbours"]["real_median"]}


def put_table(readme: Path, results: dict) -> None:
    """Replaces what stands between the two marks of README.md by the table of the results."""
    text = readme.read_text(encoding="utf-8")
    block = f"{MARK}\n{table(results)}\n{MARK}"
    new, count = re.subn(f"{MARK}.*?{MARK}", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"bench_quality: {readme} needs the mark {MARK} twice.")
    readme.write_text(new, encoding="utf-8")


def table(results: dict) -> str:
    """Markdown: one line per training and number of calls, then the machine."""
    lines = [
        "| trained by | calls | recognised | Fréchet distance | times real | balanced, times real | nearest training image | images seen |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in results["rows"]:
        seen = f"{row['kimg']:g} kimg" if "kimg" in row else ""
        distance = f"{row['fd_mean']:.2f} ± {row['fd_std']:.2f}"
        lines.append(
            f"| {row['training']} | {row.get('nfe') or ''} | {row['accuracy']:.2%} | {distance} | {row['fd_ratio']:.2f} "
            f"| {row['fd_balanced_ratio']:.2f} | {row['nearest_median']:.1f} | {seen} |"
        )
    machine = results["machine"]
    lines.append("")
    lines.append(
        f"{machine['cores']} cores of {machine['processor']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
