"""`fastcm serve`: a model behind HTTP: JSON or PNG, requests of the same moment drawn in one batch."""

import argparse
import os
from pathlib import Path

from fastcm.errors import InputError

SEEDS, QUEUE, BATCH = 256, 1024, 64


def add(subparsers) -> None:
    parser = subparsers.add_parser("serve", help="serve a model over HTTP", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run, model or diffusers folder, an .onnx, an OpenAI .pt or an EDM .pkl")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one, printed (default: 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1, this one alone)")
    parser.add_argument("--window-ms", type=float, default=5.0, metavar="MS", help="how long an image waits for others (default: 5)")
    parser.add_argument("--max-batch", type=int, metavar="N", help=f"images drawn at once (default: what fits, {BATCH} at most)")
    parser.add_argument("--max-seeds", type=int, default=SEEDS, metavar="N", help=f"images of one request (default: {SEEDS})")
    parser.add_argument("--max-queue", type=int, default=QUEUE, metavar="N", help=f"images that may wait; beyond: 503 (default: {QUEUE})")
    parser.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="of one request; beyond: 413 (default: 1048576)")
    parser.add_argument("--provider", default="auto", help="for .onnx: auto (default), cpu, cuda, tensorrt or tensorrt-rtx")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto (default: bf16 on CUDA, else fp32), fp32, bf16 or fp16")
    parser.add_argument("--compile", default="auto", help="on: torch.compile, before the first request; auto (default) and off: not")
    parser.add_argument("--trust", action="store_true", help="load files that hold programs")


def check(args: argparse.Namespace) -> None:
    if not 0 <= args.port <= 65535:
        raise InputError(f"port out of range in --port: {args.port}. Give a number from 0 to 65535.")
    for option in ("max_batch", "max_seeds", "max_queue", "max_body"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"illegal value in --{option.replace('_', '-')}: {value}. Give a whole number of 1 or more.")
    if not 0 <= args.window_ms <= 10_000:
        raise InputError(f"illegal value in --window-ms: {args.window_ms}. Give milliseconds from 0 to 10000.")
    if args.max_queue < args.max_seeds:
        raise InputError(f"a queue shorter than one request in --max-queue: {args.max_queue}. Give {args.max_seeds} or more.")


def run(args: argparse.Namespace) -> int:
    check(args)
    # Before torch is loaded: its idle threads would spin on the cores that the event loop and the clients need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import aiohttp  # noqa: F401  (a missing package is named before the model is loaded)

    from fastcm import api
    from fastcm.serving.server import Limits, serve

    options = {name: getattr(args, name) for name in ("device", "precision", "provider", "compile", "trust")}
    generator = api.load(args.model, **options)
    most = args.max_batch or min(BATCH, generator.batch_size)
    limits = Limits(args.max_body, args.max_seeds, args.max_queue, most, args.window_ms / 1000)

    if args.compile == "on":
        print(f"compiled in {generator.warm(sorted({1, most})):.1f} s", flush=True)

    def ready(address: str) -> None:
        print(f"{args.model} at {address} ({generator.provider}, {generator.precision}; batches of {most} at most)", flush=True)

    return 128 + serve(generator, name=Path(args.model).resolve().name, host=args.host, port=args.port, limits=limits, ready=ready)
