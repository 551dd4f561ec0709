"""Which runtime takes which export: target by runtime, the largest difference from torch and, where it runs here, the time of an image.

`python -m fastcm.benchmarks.latency.runtimes [--model digits] [--target LIST] [--threads 1] [--json OUT]`. Differences are in units of
[-1, 1] over two seeds. Times are of one image, in turns with ONNX Runtime on the graph of target ort: the median of the quotients says how
many times faster than that a runtime is, since all calls of a target meet the same moments of the machine.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastcm.benchmarks.interleaved import Limits, percentiles, rounded, rounds, speedup
from fastcm.benchmarks.latency import other_runtimes
from fastcm.benchmarks.latency.other_runtimes import PACKAGES, Feeds, Run
from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.options import names
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.errors import RunError

IDENTITY = ("bench", "model", "target", "backend", "threads")
TARGETS = ("ort", "tensorrt", "web", "mobile")
SEEDS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per target and runtime."""
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.latency.runtimes", description=__doc__)
    parser.add_argument("--model", metavar="NAMES", help=f"separated by commas: {', '.join(MODELS)} (default: digits)")
    parser.add_argument("--target", metavar="NAMES", help=f"separated by commas: {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="of each runtime (1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one target's turns (10); 0: no times")
    parser.add_argument("--json", type=Path, metavar="OUT", help="the file of results")
    args = parser.parse_args(argv)
    results = ResultsFile(args.json, identity=IDENTITY)
    chosen = names(args.target, TARGETS, "--target", TARGETS)
    for name in names(args.model, MODELS, "--model", ("digits",)):
        with tempfile.TemporaryDirectory() as folder:
            for row in measured(name, chosen, Path(folder), threads=args.threads, seconds=args.seconds):
                results.add(row)
                print("  ".join(f"{field} {value}" for field, value in row.items() if field != "bench"), flush=True)
    return 0


def measured(name: str, targets: Sequence[str], folder: Path, *, threads: int, seconds: float):
    """Yields the rows of a network: each target exported once, converted and run in every runtime."""
    from fastcm.export.to_onnx import export_onnx

    model = MODELS[name]
    denoiser, anchor = model.denoiser(), None
    for target in targets:
        done = export_onnx(denoiser, model.info, out=folder / target / f"{target}.onnx", target=target)
        feeds, expected = inputs(done)
        runs: dict[str, Run] = {}
        rows: dict[str, Row] = {}
        for runtime in PACKAGES:
            rows[runtime] = {"bench": "runtimes", "model": name, "target": target, "backend": runtime, "threads": threads}
            rows[runtime] |= {"version": other_runtimes.version(runtime)}
            rows[runtime] |= outcome(runtime, done, feeds, expected, runs, threads=threads)
        if target == "ort" or anchor is None:
            anchor = runs["ONNX Runtime"], {key: array[:1] for key, array in feeds.items()}
        timed = {runtime: run for runtime, run in runs.items() if runtime != "onnx reference"}  # a definition, not a runtime
        for runtime, figures in times(anchor, timed, feeds, seconds=seconds).items() if seconds else ():
            rows[runtime] |= figures
        rows["ONNX Runtime Web"] = {**rows["ONNX Runtime"], "backend": "ONNX Runtime Web", "version": None}
        rows["ONNX Runtime Web"] = {key: rows["ONNX Runtime Web"][key] for key in (*IDENTITY, "version")} | {"outcome": web(target)}
        yield from rows.values()


def inputs(done) -> tuple[Feeds, np.ndarray]:
    """Feeds of SEEDS images, a row each, and torch's images of them."""
    from fastcm.export.parity import check_inputs

    tensors = {name: tensor[:SEEDS] for name, tensor in check_inputs(done.contract).items()}
    with torch.inference_mode():
        expected = torch.cat([done.reference(*(x[i : i + 1] for x in tensors.values())) for i in range(SEEDS)]).numpy()
    return {name: tensor.numpy() for name, tensor in tensors.items()}, expected


def outcome(runtime: str, done, feeds: Feeds, expected: np.ndarray, runs: dict[str, Run], *, threads: int) -> Row:
    """The largest difference, or what happened in its place; a runtime that draws here is put into `runs`."""
    if other_runtimes.version(runtime) is None:
        return {"outcome": "not installed"}
    if runtime == "TensorRT for RTX":
        return {"outcome": compiled(done)}
    try:
        run = other_runtimes.opened(runtime, done.path, threads=threads)
        images = np.concatenate([run({name: array[i : i + 1] for name, array in feeds.items()}) for i in range(SEEDS)])
    except RunError as error:
        return {"outcome": f"refused: {error}"}
    except Exception as error:  # a runtime's own
        return {"outcome": f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"}
    runs[runtime] = run
    difference = float(np.abs(images.astype(np.float64) - expected).max())
    return {"outcome": "same pictures" if difference <= done.contract.tolerance else "other pictures", "max_error": rounded(difference)}


def compiled(done) -> str:
    """What NVIDIA's compiler says; no card is here to run the engine."""
    from fastcm.export.compiler import compile_graph
    from fastcm.export.to_tensorrt import profile
    from fastcm.generation.tensorrt_bindings import RTX

    try:
        made = compile_graph(RTX, done.path, done.contract, profile(None, done.contract.batch), capabilities=((12, 0),))
    except RunError as error:
        return f"refused: {error}"
    return f"builds, {made.layers} layers"


def web(target: str) -> str:
    """ONNX Runtime Web runs in a browser: the tests of the page draw with it, of target web."""
    return "same pictures, in the page's tests" if target == "web" else "not tried"


def times(anchor: tuple[Run, Feeds], runs: dict[str, Run], feeds: Feeds, *, seconds: float) -> dict[str, Row]:
    """Runtime -> median milliseconds of one image and how many times faster than the anchor it is, from one run in turns."""
    one = {name: array[:1] for name, array in feeds.items()}
    calls = {"anchor": lambda _: anchor[0](anchor[1])}
    calls |= {name: lambda _, run=run: run(one) for name, run in runs.items()}
    taken = rounds(calls, Limits(seconds, fewest=5, most=400), warm=1)
    return {
        name: {"p50_ms": percentiles(taken[name])["p50_ms"], "times_onnxruntime": speedup(taken[name], taken["anchor"])} for name in runs
    }


if __name__ == "__main__":
    sys.exit(main())
