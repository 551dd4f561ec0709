"""How good mnist and the digits get: trains by the public commands, evaluates each model, the shipped one too, and writes rows and tables.

`python -m fastcm.benchmarks.quality.generators --json OUT` trains into runs/ (what is there is resumed or reused) and measures;
`--tables` puts the committed rows into README.md (mnist) and docs/evaluation.md (digits), `--docs` those of the search into the latter.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from fastcm.api import load_denoiser
from fastcm.benchmarks.results_file import ResultsFile, Row

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = ("bench", "model", "training", "sampling")
TEACHER = "runs/digits-edm"
# What is measured, by data set and name: MODEL and the arguments of `fastcm train`, None where nothing is trained.
TRAININGS = {
    ("mnist", "shipped model"): ("mnist", None),
    ("mnist", "`make demo`"): ("runs/mnist", "mnist"),
    ("digits", "ict"): ("runs/digits", "digits"),
    ("digits", "edm teacher"): (TEACHER, "digits --method edm"),
    ("digits", "cd, Heun"): ("runs/digits-cd", f"digits --method cd --teacher {TEACHER}"),
    ("digits", "cd, Euler"): (
        "runs/digits-cd-euler",
        f"digits --method cd --teacher {TEACHER} --set objective.solver=euler --out runs/digits-cd-euler",
    ),
}
PAGES = {"mnist": ROOT / "README.md", "digits": ROOT / "docs" / "evaluation.md"}
MARK, SEARCH_MARK = "<!-- quality -->", "<!-- search -->"
# The search of noise levels, on a model that was trained for less than its preset says: a third of the time, where steps matter more.
SEARCHED, SEARCH_STEPS = "runs/digits-60kimg", 3
SEARCH_TRAINING = f"digits --duration 60kimg --out {SEARCHED}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.generators", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the rows go; measured rows are kept")
    parser.add_argument("--only", choices=[*PAGES, "search"], help="the models of one data set, or the search of noise levels")
    parser.add_argument("--tables", type=Path, metavar="RESULTS", help="write this file's tables into their pages; measures nothing")
    parser.add_argument("--docs", type=Path, metavar="RESULTS", help="write the search of this file into docs/evaluation.md")
    args = parser.parse_args(argv)
    if args.docs is not None:
        results = json.loads(args.docs.read_text(encoding="utf-8"))
        put_table(ROOT / "docs" / "evaluation.md", search_table(results), mark=SEARCH_MARK)
        return 0
    if args.tables is not None:
        results = json.loads(args.tables.read_text(encoding="utf-8"))
        for data in {row["model"] for row in results["rows"] if row["bench"] == "quality"}:
            put_table(PAGES[data], table(results, data))
        return 0
    file = ResultsFile(args.json, identity=IDENTITY)
    for (data, name), (model, arguments) in TRAININGS.items():
        if args.only in (None, data):
            file.add(*measure(data, name, model, arguments))
    if args.only in (None, "search"):
        file.add(*measure_search())
    return 0


def measure(data: str, name: str, model: str, arguments: str | None) -> list[Row]:
    """Trains what is to be trained and returns a row per number of network calls, and one of the real images."""
    evaluate = f"fastcm evaluate {model} --data {data}"
    command = evaluate if arguments is None else f"fastcm train {arguments} && {evaluate}"
    if arguments is not None:
        call(f"fastcm train {arguments}")
    out = Path("runs") / f"evaluation-{Path(model).name}.json"
    out.parent.mkdir(exist_ok=True)
    call(f"{evaluate} --json {out}")
    report = json.loads(out.read_text(encoding="utf-8"))
    _, info = load_denoiser(model)
    shared = {"bench": "quality", "model": data, "command": command}
    own = {**shared, "training": name, "kimg": info["training"]["nimg"] / 1000}
    rows = [{**own, "sampling": row["name"], "nfe": row["nfe"], **figures(row)} for row in report["sets"]]
    real = report["sets"][0]
    return [
        *rows,
        {**shared, "training": "real images", "sampling": "halves", "accuracy": report["real"]["accuracy"], **real_figures(real)},
    ]


def measure_search() -> list[Row]:
    """One row per number of steps with the levels that the search found, measured on seeds that the search does not use."""
    train, out = f"fastcm train {SEARCH_TRAINING}", Path(SEARCHED) / "search.json"
    evaluate = f"fastcm evaluate {SEARCHED} --data digits --metrics fid,accuracy --search-steps {SEARCH_STEPS}"
    call(train)
    call(f"{evaluate} --json {out}")
    report = json.loads(out.read_text(encoding="utf-8"))
    shared = {"bench": "quality_search", "model": "digits", "training": "ict", "kimg": 60, "command": f"{train} && {evaluate}"}
    features = {"features": report["protocol"]["features_name"], "reference_sha256": report["protocol"]["reference_sha256"]}
    return [
        {
            **shared,
            **features,
            "sampling": row["name"],
            "nfe": row["nfe"],
            "sigmas": sigmas,
            "count": row["count"],
            "fid_mean": row["fid"]["mean"],
            "fid_std": row["fid"]["std"],
            "accuracy": row["accuracy"],
        }
        for row, sigmas in zip(report["sets"], report["protocol"]["sigmas"], strict=True)
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


def put_table(page: Path, made: str, *, mark: str = MARK) -> None:
    """Replaces what stands between the two marks of a page by a table."""
    text = page.read_text(encoding="utf-8")
    block = f"{mark}\n{made}\n{mark}"
    new, count = re.subn(f"{mark}.*?{mark}", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"quality.generators: {page} needs the mark {mark} twice.")
    page.write_text(new, encoding="utf-8")


def search_table(results: dict) -> str:
    """Markdown: one line per number of steps with the levels that were found, then the machine."""
    rows = sorted((row for row in results["rows"] if row["bench"] == "quality_search"), key=lambda row: row["nfe"])
    lines = [f"| network calls | noise levels | FID [{rows[0]['features']}] | recognised [judge] |", "|---|---|---|---|"]
    for row in rows:
        levels = ", ".join(f"{sigma:.3g}" for sigma in row["sigmas"])
        lines.append(f"| {row['nfe']} | {levels} | {row['fid_mean']:.2f} ± {row['fid_std']:.2f} | {row['accuracy']:.2%} |")
    return "\n".join([*lines, "", machine_line(results["machine"])])


def machine_line(machine: dict) -> str:
    return f"{machine['cores']} cores of {machine['processor']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}."


def table(results: dict, data: str) -> str:
    """Markdown of a data set's rows: one line per training and number of calls, then the machine."""
    lines = [
        "| trained by | calls | recognised | Fréchet distance | times real | balanced, times real | nearest training image | images seen |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in (row for row in results["rows"] if row["bench"] == "quality" and row["model"] == data):
        seen = f"{row['kimg']:g} kimg" if "kimg" in row else ""
        distance = f"{row['fd_mean']:.2f} ± {row['fd_std']:.2f}"
        lines.append(
            f"| {row['training']} | {row.get('nfe') or ''} | {row['accuracy']:.2%} | {distance} | {row['fd_ratio']:.2f} "
            f"| {row['fd_balanced_ratio']:.2f} | {row['nearest_median']:.1f} | {seen} |"
        )
    return "\n".join([*lines, "", machine_line(results["machine"])])


if __name__ == "__main__":
    sys.exit(main())
