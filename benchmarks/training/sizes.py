"""What `fastcm train --data PICTURES` chooses for pictures of eleven sizes, the memory of a step, and how long a run takes here.

`python -m fastcm.benchmarks.training.sizes --json OUT`: what `--dry-run` prints for colour pictures without classes, fewer than 50,000.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from fastcm import networks, presets
from fastcm.benchmarks.interleaved import rounded
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.data.dataset import Dataset
from fastcm.training.memory import estimate
from fastcm.training.speed import images_per_s

SIZES = (8, 16, 28, 32, 48, 50, 64, 96, 100, 128, 256)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.training.sizes", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="the file of results; rows that it holds are not measured again")
    args = parser.parse_args(argv)
    results = ResultsFile(args.json, identity=("bench", "resolution"))
    for resolution in SIZES:
        if results.find({"bench": "sizes", "resolution": resolution}) is None:
            row = measure(resolution)
            results.add(row)
            print(json.dumps(row), flush=True)
    return 0


def measure(resolution: int) -> Row:
    pictures = Dataset(np.zeros((1, 3, resolution, resolution), np.uint8), None, None, "pictures", "")
    config = presets.folder(dataset=pictures, data="pictures")
    network = networks.build("adm", {name: value for name, value in config.network.items() if name != "kind"}).config
    speed = images_per_s(config)
    return {
        "bench": "sizes",
        "resolution": resolution,
        "patch": network.patch,
        "levels": [network.pixels(level) for level in range(len(network.widths))],
        "channels": network.channels,
        "parameters": networks.parameter_count(config.network),
        "batch": config.batch,
        "memory_gb": rounded(estimate(config)["total"] / 1e9),
        "images_per_s": rounded(speed),
        "kimg": config.duration_kimg,
        "hours": rounded(config.duration_kimg * 1000 / speed / 3600),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    sys.exit(main())
