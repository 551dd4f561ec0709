"""What an export takes: seconds, memory and bytes, from a network in memory to a file that was checked and has its name.

`python -m fastcm.benchmarks.latency.exports [--model imagenet64] [--json OUT]`. Each export has a process of its own,
imports included in its seconds; its peak is the resident memory of that whole process, the network's random weights included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fastcm.benchmarks.interleaved import rounded
from fastcm.benchmarks.latency.networks import peak_bytes
from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.options import names
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.errors import RunError

IDENTITY = ("bench", "model", "precision")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per model, and returns 1 if an export failed."""
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.latency.exports", description=__doc__)
    parser.add_argument("--model", metavar="NAMES", help=f"separated by commas: {', '.join(MODELS)} (default: digits,colour32,imagenet64)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    parser.add_argument("--json", type=Path, metavar="OUT", help="the file of results")
    args = parser.parse_args(argv)
    results = ResultsFile(args.json, identity=IDENTITY)
    failed = False
    for name in names(args.model, MODELS, "--model", ("digits", "colour32", "imagenet64")):
        row = measure(name, args.precision)
        results.add(row)
        failed |= "error" in row
        print("  ".join(f"{field} {value}" for field, value in row.items()), flush=True)
    return int(failed)


def measure(name: str, precision: str) -> Row:
    row: Row = {"bench": "export", "model": name, "backend": "onnx", "precision": precision}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __spec__.name, "--export", name, precision, folder]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            return {**row, "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
        told = json.loads(done.stdout.splitlines()[-1])
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {
        **row,
        "seconds": rounded(seconds),
        "peak_gb": rounded(told["peak_bytes"] / 1e9),
        "file_gb": rounded(size / 1e9),
        "parameters": told["parameters"],
        "max_error": told["max_error"],
    }


def export_once(name: str, precision: str, folder: str) -> None:
    """Exports, and prints the peak of this process's memory, the network's size and the largest error that the check met."""
    from fastcm.export.to_onnx import export_onnx

    model = MODELS[name]
    denoiser = model.denoiser()
    exported = export_onnx(denoiser, model.info, out=Path(folder) / "model.onnx", precision=precision)
    if not (Path(folder) / "model.onnx").is_file():
        raise RunError(f"no file after the export in latency.exports: {name}. Run fastcm export by itself.")
    print(
        json.dumps(
            {
                "peak_bytes": peak_bytes(),
                "parameters": sum(p.numel() for p in denoiser.parameters()),
                "max_error": rounded(max(comparison.max_error for comparison in exported.comparisons)),
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--export"]:
        export_once(*sys.argv[2:5])
    else:
        sys.exit(main())
