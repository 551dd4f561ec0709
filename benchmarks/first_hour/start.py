"""The first minute on a GPU: does it draw, train the same with and without CUDA graphs, export and compare?

`python -m fastcm.benchmarks.first_hour.start --json OUT`: a row for each question, and one for what torch chooses there.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastcm import presets
from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.options import one_line
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.data.dataset import open_dataset
from fastcm.errors import RunError
from fastcm.generation.generator import Generator
from fastcm.training.run import build_network, target_of
from fastcm.training.trainer_parts import build_trainer

IDENTITY = ("bench", "op", "precision")
STEPS = 200
# Relative difference of recorded and plain losses in fp32 and bf16, whose sums a device adds up in the order of the moment: of the first
# steps, and on average over the last quarter, where small differences have grown.
FIRST, MEAN = {"fp32": 1e-4, "bf16": 2e-2}, {"fp32": 2e-2, "bf16": 1e-1}
# Widths of an attention head in fastcm's networks.
HEAD_WIDTHS = (24, 32, 64, 256)
BACKENDS = {0: "definition", 1: "flash", 2: "memory-efficient", 3: "cudnn"}


def main(argv: Sequence[str] | None = None) -> int:
    """Asks what has no row yet; returns 1 where an answer is not what it should be."""
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.first_hour.start", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="the file of rows")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
    args = parser.parse_args(argv)
    results = ResultsFile(args.json, identity=IDENTITY)
    questions: list[tuple[str, str, Callable[[], Row]]] = [("choices", "any", choices)]
    questions += [("draw", precision, lambda precision=precision: drawn(precision)) for precision in ("fp32", "bf16")]
    questions += [("train", precision, lambda precision=precision: trained(precision, args.steps)) for precision in ("bf16", "fp32")]
    questions += [("export", "fp32", exported)]
    failed = False
    for op, precision, ask in questions:
        row = {"bench": "start", "op": op, "precision": precision}
        if results.find(row) is None:
            began = time.perf_counter()
            try:
                row |= ask()
            except Exception as error:  # the other questions have their answers all the same
                row["error"] = one_line(error)
                failed = True
            results.add(row | {"seconds": round(time.perf_counter() - began, 2)})
            print(results.rows[-1], flush=True)
    return int(failed)


def choices() -> Row:
    """Which attention torch takes by head width and precision, and what its products and convolutions of fp32 are."""
    attention = {}
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for width in HEAD_WIDTHS:
            q = torch.zeros(1, 2, 64, width, device="cuda", dtype=dtype, requires_grad=True)
            attention[f"{precision} {width}"] = BACKENDS.get(torch._fused_sdp_choice(q, q, q), "another")
    return {
        "attention": attention,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32_by_default": torch.backends.cudnn.allow_tf32,
        "devices": torch.cuda.device_count(),
        "memory_gb": round(torch.cuda.get_device_properties("cuda").total_memory / 1e9, 1),
    }


def drawn(precision: str) -> Row:
    """The largest difference of the digits network's images from the CPU's, in levels of 255."""
    model = MODELS["digits"]
    ours = Generator(model.denoiser(), model.info, device="cuda", precision=precision)
    expected = Generator(model.denoiser(), model.info, device="cpu")(range(8)).astype(int)
    apart, allowed = int(np.abs(ours(range(8)) - expected).max()), {"fp32": 1, "bf16": 4}[precision]
    if apart > allowed:
        raise RunError(f"other images than the CPU's: {apart} levels apart, {allowed} allowed in {precision}.")
    if not any(ours._graphs.values()):
        raise RunError("images were drawn without a CUDA graph; the line above says why.")
    return {"levels_apart": apart}


def trained(precision: str, steps: int) -> Row:
    """Losses of the digits preset with and without CUDA graphs, compiled as users have it."""
    losses, rates, first_step_s = {}, {}, {}
    for recorded in (True, False):
        config = presets.digits()
        network = build_network(config).cuda().train()
        trainer = build_trainer(
            config,
            network,
            target_of(network, config),
            open_dataset("digits"),
            device=torch.device("cuda"),
            precision=precision,
            compiled=True,
        )
        if not recorded:
            trainer.work.stop()
        began = time.perf_counter()
        found = []
        for step in range(steps):
            trainer.train_step()
            found.append(trainer.loss.clone())
            if step == 0:
                torch.cuda.synchronize()
                first_step_s[recorded] = round(time.perf_counter() - began, 2)
            if step == steps // 2:
                torch.cuda.synchronize()
                middle = time.perf_counter()
        torch.cuda.synchronize()
        rates[recorded] = round((steps - steps // 2 - 1) * config.batch / (time.perf_counter() - middle), 1)
        losses[recorded] = torch.stack(found).double().cpu().numpy()
        if recorded and not trainer.work.is_replayed:
            raise RunError("steps were not recorded; the line above says why.")
        trainer.close()
    first = float(np.abs(losses[True][:10] / losses[False][:10] - 1).max())
    mean = float(abs(losses[True][-steps // 4 :].mean() / losses[False][-steps // 4 :].mean() - 1))
    if not (first <= FIRST[precision] and mean <= MEAN[precision] and np.isfinite(losses[True]).all()):
        raise RunError(f"losses with and without CUDA graphs differ: {first:.2g} in ten steps, {mean:.2g} on average at the end.")
    return {
        "first_ten": first,
        "mean_at_end": mean,
        "last_loss": float(losses[True][-1]),
        "images_per_s": rates[True],
        "plain_images_per_s": rates[False],
        "first_step_s": first_step_s[True],
        "memory_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3),
    }


def exported() -> Row:
    """The exported file, which is compared with torch before it gets its name, against the generator on the GPU."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return {"skipped": f"{package} is not installed"}
    from fastcm import api
    from fastcm.benchmarks.latency.backends import exported as exported_file

    model = MODELS["digits"]
    graph = api.load(exported_file(model, seeded=True), provider="cpu")
    ours = Generator(model.denoiser(), model.info, device="cuda", precision="fp32")
    apart = int(np.abs(graph(range(8)).astype(int) - ours(range(8))).max())
    if apart > 1:
        raise RunError(f"other images than the exported file's: {apart} levels apart, 1 allowed.")
    return {"levels_apart": apart}


if __name__ == "__main__":
    sys.exit(main())
