"""mnist's network on single pixels against patches of 2x2: what each reaches in the same time, how fast it trains and draws.

`python -m fastcm.benchmarks.quality.patches --json OUT`: the quickest trains `--kimg`, the other as much less as it is slower, by speeds
that are measured in turns. What is in runs/patches is resumed, at the durations that OUT holds.
`python -m fastcm.benchmarks.pages.between_marks` writes the table of docs/training.md.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import fastcm
from fastcm import presets
from fastcm.benchmarks.interleaved import Limits, percentiles, rounded, rounds
from fastcm.benchmarks.quality.methods import call
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.training.speed import images_per_s

RUNS = Path("runs/patches")
# Both networks have 7x7 places at their lowest level, where both attend.
NETWORKS = {1: {"patch": 1, "channel_mult": (1, 2, 2)}, 2: {"patch": 2, "channel_mult": (1, 2)}}
LIMITS = Limits(seconds=20, fewest=20, most=400)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.patches", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the rows go; measured rows are kept")
    parser.add_argument("--kimg", type=float, default=24, help="images of the quickest network's runs, in thousands (24)")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1, 2], metavar="S,S")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = ResultsFile(args.json, identity=("bench", "patch"))
    speeds = training_speeds()
    for patch, speed in speeds.items():
        known = results.find({"bench": "patches", "patch": patch})
        kimg = known["kimg"] if known else round(args.kimg * speed / max(speeds.values()), 3)
        results.add({"bench": "patches", "patch": patch, "kimg": kimg, "images_per_s": rounded(speed)})
    rows = {row["patch"]: {**row, **train(row["patch"], row["kimg"], args.seeds)} for row in results.rows}
    for patch, times in drawing_times({patch: RUNS / f"{patch}-{args.seeds[0]}" for patch in speeds}).items():
        results.add({**rows[patch], **times})
    return 0


def training_speeds(turns: int = 5) -> dict[int, float]:
    """Images per second of each patch's training passes: the median of `turns` turns."""
    preset = presets.preset("mnist", method="ict")
    configs = {patch: replace(preset, network={**preset.network, **own}) for patch, own in NETWORKS.items()}
    speeds = [{patch: images_per_s(config) for patch, config in configs.items()} for _ in range(turns)]
    return {patch: float(np.median([turn[patch] for turn in speeds])) for patch in configs}


def train(patch: int, kimg: float, seeds: list[int]) -> Row:
    """Trains and evaluates a run per seed: the figures of all, in the order of the seeds."""
    settings = " ".join(
        f"--set network.{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in NETWORKS[patch].items()
    )
    reports = []
    for seed in seeds:
        out = RUNS / f"{patch}-{seed}"
        call(f"fastcm train mnist --method ict {settings} --duration {kimg}kimg --seed {seed} --out {out}")
        evaluation = out / "evaluation.json"
        call(f"fastcm evaluate {out} --data mnist --metrics accuracy,fd --json {evaluation}")
        reports.append(json.loads(evaluation.read_text(encoding="utf-8"))["sets"])
    figures = {
        f"{name}_{sets[0]['nfe']}": [read(row) for row in sets]
        for sets in zip(*reports, strict=True)
        for name, read in (("accuracy", lambda row: row["accuracy"]), ("fd_ratio", lambda row: row["fd"]["ratio"]))
    }
    command = f"fastcm train mnist --method ict {settings} --duration {kimg}kimg"
    return {"seeds": seeds, **figures, "command": command}


def drawing_times(models: dict[int, Path]) -> dict[int, Row]:
    """Milliseconds of one image, in torch and by the seeded ONNX graph, the patches in turns."""
    calls = {}
    for patch, model in models.items():
        graph = model / "seeded.onnx"
        call(f"fastcm export {model} --onnx {graph} --seeded")
        for backend, source in (("torch", model), ("onnx", graph)):
            generator = fastcm.load(str(source))
            generator(seeds=[0])
            calls[f"{patch} {backend}"] = lambda turn, generator=generator: generator(seeds=[turn])
    times = {name: percentiles(values) for name, values in rounds(calls, LIMITS, settle_s=0.02, warm=1).items()}
    return {
        patch: {f"{backend}_{name}": times[f"{patch} {backend}"][name] for backend in ("torch", "onnx") for name in ("p50_ms", "p95_ms")}
        for patch in models
    }


if __name__ == "__main__":
    sys.exit(main())
