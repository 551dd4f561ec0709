"""`fastcm bench`: the benchmarks of benchmarks/, from a checkout or a wheel."""

import argparse
import importlib

BENCHMARKS = {
    "kernels": "each kernel against its reference and torch.compile, in ms and GB/s",
    "data": "decoding beside Pillow alone, opening a large cache, waiting for batches",
    "train": "images per second of a training step",
    "latency": "milliseconds of a one-step image, by batch and backend; latency FILE|URL: of a file or a server",
}

MODULES = {"kernels": "kernels.bench", "data": "training.data", "train": "training.bench", "latency": "latency.bench"}


def add(subparsers) -> None:
    lines = "\n".join(f"  {name:10}{text}" for name, text in BENCHMARKS.items())
    parser = subparsers.add_parser("bench", help="measure kernels, training or latency", description=f"Measures one of:\n{lines}")
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS), metavar="kernels|data|train|latency")
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the benchmark; its --help lists them")
    rest.required = False


def run(args: argparse.Namespace) -> int | None:
    words = [word for word in args.arguments if word != "--debug"]
    # `bench latency FILE|URL` measures what is named, `bench latency` the networks of benchmarks/models.py.
    named = args.benchmark == "latency" and words and not words[0].startswith("-")
    benchmark = importlib.import_module(f"fastcm.benchmarks.{'latency.target' if named else MODULES[args.benchmark]}")
    return benchmark.main(words)
