"""Seconds to the first image of a compiled generator in a fresh process: with an empty compile cache on disk, then with the one it left.

`python -m fastcm.benchmarks.latency.first_image --model NAME --batch N` is that process: it prints the seconds from the weights in
memory to the first images, imports apart, as an app that starts anew would wait.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from fastcm.errors import RunError

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.latency.first_image", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args(argv)
    from fastcm.benchmarks.models import MODELS
    from fastcm.generation.compiled import CompiledLevel
    from fastcm.generation.generator import Generator

    model = MODELS[args.model]
    denoiser = model.denoiser()
    began = time.perf_counter()
    generator = Generator(denoiser, model.info, device=args.device, precision=args.precision, compile="on")
    generator.warm((args.batch,))
    seconds = time.perf_counter() - began
    level = generator.level(generator.sigmas()[0])
    if not isinstance(level, CompiledLevel) or not level.compiled:
        raise RunError(f"nothing was compiled for --model: {args.model}. See the line above.")
    print(json.dumps(seconds))
    return 0


def seconds_to_first_image(model: str, *, batch: int, device: str, precision: str, cache: Path) -> float:
    """Of a fresh process whose compile cache is the folder `cache`."""
    options = {"--model": model, "--batch": str(batch), "--device": device, "--precision": precision}
    command = [sys.executable, "-m", "fastcm.benchmarks.latency.first_image", *(word for pair in options.items() for word in pair)]
    done = subprocess.run(command, env={**os.environ, CACHE: str(cache)}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"no first image of {model}: {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
