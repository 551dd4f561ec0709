"""Which runtime takes which export: target by runtime, the largest difference from torch and, where it runs here, the time of an image.

`python -m fastcm.benchmarks.latency.runtimes --graphs DIR --json OUT` exports each target into DIR, opens it in every runtime that is
installed, and compares two seeds' pictures with torch's, in units of [-1, 1]; `--times` leaves all that and times what OUT says draws the
same pictures. Times are of one image, in turns of one run with ONNX Runtime on the graph of target ort: the median of the quotients says
how many times faster than that a runtime is, since all calls of a network and number of threads meet the same moments of the machine. On
one thread it is the processor's time that counts, which other work beside it hardly changes; two need a machine to themselves. ONNX Runtime
Web is timed in its browser, by itself.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fastcm.benchmarks.interleaved import Limits, percentiles, rounded, rounds, speedup
from fastcm.benchmarks.latency import other_runtimes, web_runtime
from fastcm.benchmarks.latency.other_runtimes import PACKAGES, Feeds
from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.options import names, sizes
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.errors import InputError, RunError

IDENTITY = ("bench", "model", "target", "backend")
TARGETS = ("ort", "tensorrt", "web", "mobile")
WEB, ANCHOR = "ONNX Runtime Web", ("ort", "ONNX Runtime")
UNTIMED = ("onnx reference", WEB)  # a definition, not a runtime; and one that keeps its own time
SEEDS, SAME, WORTH = 2, "same pictures", 1.2
SETTLE_S = 0.01  # ONNX Runtime's threads spin for a while


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per target and runtime, then one per timed pair."""
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.latency.runtimes", description=__doc__)
    parser.add_argument("--model", metavar="NAMES", help=f"separated by commas: {', '.join(MODELS)} (default: mnist,colour32)")
    parser.add_argument("--target", metavar="NAMES", help=f"separated by commas: {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--threads", metavar="NUMBERS", help="of each runtime, separated by commas (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one network's turns at one number of threads (20); 0: no times")
    parser.add_argument("--times", action="store_true", help="times alone, of the rows in --json and the graphs in --graphs")
    parser.add_argument("--graphs", type=Path, required=True, metavar="DIR", help="where the exports lie, or go")
    parser.add_argument("--json", type=Path, metavar="OUT", help="the file of results")
    args = parser.parse_args(argv)
    results = ResultsFile(args.json, identity=IDENTITY)
    targets = names(args.target, TARGETS, "--target", TARGETS)
    for name in names(args.model, MODELS, "--model", ("mnist", "colour32")):
        if not args.times:
            for target in targets:
                for row in outcomes(name, target, args.graphs):
                    results.add(row)
                    say(row)
        for threads in sizes(args.threads, "--threads", (1, 2)) if args.seconds else ():
            rows = [row for row in results.rows if row["model"] == name and row["target"] in targets]
            for row in timed(rows, args.graphs, threads=threads, seconds=args.seconds):
                results.add(row)
                say(row)
    return 0


def say(row: Row) -> None:
    print("  ".join(f"{field} {value}" for field, value in row.items() if field != "bench"), flush=True)


def graph(folder: Path, model: str, target: str) -> Path:
    return folder / model / f"{target}.onnx"


def outcomes(name: str, target: str, folder: Path) -> Iterator[Row]:
    """The rows of a target: exported, converted and run once in every runtime."""
    from fastcm.export.to_onnx import export_onnx

    model = MODELS[name]
    done = export_onnx(model.denoiser(), model.info, out=graph(folder, name, target), target=target)
    feeds, expected = inputs(done)
    for runtime in (*PACKAGES, WEB):
        row = {"bench": "runtimes", "model": name, "target": target, "backend": runtime}
        installed = web_runtime.version() if runtime == WEB else other_runtimes.version(runtime)
        if installed is None:
            yield row | {"version": None, "outcome": "not installed"}
        elif runtime == "TensorRT for RTX":
            yield row | {"version": installed, "outcome": compiled(done)}
        else:
            yield row | {"version": installed, **outcome(runtime, done, feeds, expected)}


def inputs(done) -> tuple[Feeds, np.ndarray]:
    """Feeds of SEEDS images, a row each, and torch's images of them."""
    tensors = check_feeds(done.contract)
    with torch.inference_mode():
        expected = torch.cat([done.reference(*(x[i : i + 1] for x in tensors.values())) for i in range(SEEDS)]).numpy()
    return {name: tensor.numpy() for name, tensor in tensors.items()}, expected


def check_feeds(contract) -> dict[str, torch.Tensor]:
    from fastcm.export.parity import check_inputs

    return {name: tensor[:SEEDS] for name, tensor in check_inputs(contract).items()}


def outcome(runtime: str, done, feeds: Feeds, expected: np.ndarray) -> Row:
    """The largest difference, or what happened in its place."""
    try:
        if runtime == WEB:
            images = web_runtime.draw(done.path, feeds, expected.shape[1:], seconds=0).images
        else:
            run = other_runtimes.opened(runtime, done.path)
            images = np.concatenate([run({name: array[i : i + 1] for name, array in feeds.items()}) for i in range(SEEDS)])
    except RunError as error:
        return {"outcome": f"refused: {error}"}
    except Exception as error:  # a runtime's own
        return {"outcome": f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"}
    difference = float(np.abs(images.astype(np.float64) - expected).max())
    return {"outcome": SAME if difference <= done.contract.tolerance else "other pictures", "max_error": rounded(difference)}


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


def timed(rows: Sequence[Row], folder: Path, *, threads: int, seconds: float) -> Iterator[Row]:
    """The rows of a network in their order; those that draw here with the median of one image and how many times faster than ANCHOR they
    are, from one run."""
    same = [row for row in rows if row["outcome"] == SAME]
    drawing = [row for row in same if row["backend"] not in UNTIMED]
    if not any((row["target"], row["backend"]) == ANCHOR for row in drawing):
        raise InputError("nothing to compare with in --json: no row of ONNX Runtime on target ort. Run without --times first.")
    calls = {}
    for row in drawing:
        path = graph(folder, row["model"], row["target"])
        if not path.is_file():
            raise InputError(f"no graph in --graphs: {path}. Run without --times first.")
        run, feeds = other_runtimes.opened(row["backend"], path, threads=threads), one_image(path)
        calls[row["target"], row["backend"]] = lambda _, run=run, feeds=feeds: run(feeds)
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    taken = rounds(calls, Limits(seconds, fewest=5, most=400), settle_s=SETTLE_S, warm=1, clock=clock)
    for row in rows:
        own = taken.get((row["target"], row["backend"]))
        if own is None:
            web = row["backend"] == WEB and row in same and threads == 1
            yield row | (web_times(graph(folder, row["model"], row["target"]), seconds=seconds / 10) if web else {})
            continue
        figures = {"p50_ms": percentiles(own)["p50_ms"], "over_onnxruntime": speedup(own, taken[ANCHOR]), "rounds": len(own)}
        yield {**row, **{f"threads{threads}_{field}": value for field, value in figures.items()}}


def web_times(path: Path, *, seconds: float) -> Row:
    """The median of one image in the browser."""
    drawn = web_runtime.draw(path, one_image(path), contract_of(path).output[0], seconds=seconds)
    return {"threads1_p50_ms": percentiles(drawn.milliseconds)["p50_ms"], "threads1_rounds": len(drawn.milliseconds)}


def one_image(path: Path) -> Feeds:
    """The first image's inputs of a graph that fastcm wrote."""
    return {name: tensor[:1].numpy() for name, tensor in check_feeds(contract_of(path)).items()}


def contract_of(path: Path):
    from fastcm.generation.onnx_generator import OnnxGenerator

    return OnnxGenerator(path, "cpu").contract


if __name__ == "__main__":
    sys.exit(main())
