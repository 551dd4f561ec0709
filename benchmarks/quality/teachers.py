"""What becomes of a teacher as people have them: a DDPM of diffusers' own making, distilled and tuned by the public commands, and measured.

`python -m fastcm.benchmarks.quality.teachers --json OUT` trains into runs/ (what is there is resumed or reused) and measures each model on
digits that none of them saw; `python -m fastcm.benchmarks.pages.between_marks` writes the table of docs/training.md from it.
"""

import argparse
import json
import sys
from pathlib import Path

from fastcm.benchmarks.quality import ddpm
from fastcm.benchmarks.quality.generators import call
from fastcm.benchmarks.results_file import ResultsFile, Row

DATA, TEACHER = "mnist", "runs/mnist-ddpm"
IDENTITY = ("bench", "model", "sampling")
METRICS = "fd,precision,recall"
KIMG = 40
SEEDS = "500000-500999"
SHARED = f"--data {DATA} --duration {KIMG}kimg --batch 32 --lr 5e-4 --set optimizer.lr_decay=linear --set optimizer.ema_halflife_kimg=[10]"
# In one step all of the image is made at the highest levels: the draws are mnist's, and so is the top, half of the chain's 157.
LEVELS = "--set objective.P_mean=0.6 --set objective.P_std=2 --set noise.sigma_max=80"
# Folder of the run, arguments of `fastcm train`, arguments of `fastcm evaluate`; the teacher's run is diffusers'.
MODELS = {
    "DDPM by diffusers": (TEACHER, None, "--sampler ddim --steps 50"),
    "cd of it": (
        "runs/mnist-ddpm-cd",
        f"--method cd --teacher {TEACHER} {SHARED} {LEVELS} --set objective.pairs=log-normal "
        "--set objective.distance=pseudo_huber --set objective.loss_weight=1/gap --set objective.solver=euler",
        "--steps 1,2",
    ),
    "ect of it": ("runs/mnist-ddpm-ect", f"--method ect --init {TEACHER} {SHARED} {LEVELS} --set network.num_classes=none", "--steps 1,2"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.teachers", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the rows go; measured rows are kept")
    args = parser.parse_args(argv)
    file = ResultsFile(args.json, identity=IDENTITY)
    if not (Path(TEACHER) / "model_index.json").is_file():
        ddpm.main([TEACHER, "--data", DATA])
    for name in MODELS:
        file.add(*measure(name))
    return 0


def measure(name: str) -> list[Row]:
    """Trains the model where it is fastcm's, and returns a row per number of network calls."""
    folder, training, sampling = MODELS[name]
    evaluate = f"fastcm evaluate {folder} --data {DATA} --metrics {METRICS} --seeds {SEEDS} {sampling}"
    commands = [f"python -m fastcm.benchmarks.quality.ddpm {folder}"] if training is None else [f"fastcm train {training} --out {folder}"]
    if training is not None:
        call(commands[0])
    out = Path(folder) / "evaluation.json"
    call(f"{evaluate} --json {out}")
    report = json.loads(out.read_text(encoding="utf-8"))
    shared = {"bench": "teachers", "model": name, "command": " && ".join([*commands, evaluate])}
    return [{**shared, "sampling": row["name"], "nfe": row["nfe"], "count": row["count"], **figures(row)} for row in report["sets"]]


def figures(row: Row) -> Row:
    """The figures of a set of samples, flat."""
    flat = {"fd_mean": row["fd"]["mean"], "fd_std": row["fd"]["std"], "fd_ratio": row["fd"]["ratio"]}
    return {**flat, **{name: row[name]["mean"] for name in ("precision", "recall")}}


if __name__ == "__main__":
    sys.exit(main())
