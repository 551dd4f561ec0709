"""ONNX Runtime's own fusions applied once, at export, where they help and change nothing: SiLU and scaled products as single nodes."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcm.errors import InputError, RunError, reason_of
from fastcm.export.parity import SEEDS, check_inputs, cpu_run
from fastcm.generation.onnx_contract import Contract

# Largest difference of a pixel that still counts as no change: sums of another order, in fp32.
EXACT = 1e-6


class Fusion(NamedTuple):
    """What came of it; kept says whether the fused graph took the place of the other."""

    level: str
    nodes_before: int
    nodes_after: int
    largest_difference: float
    kept: bool


def fuse(path: Path, contract: Contract) -> Fusion:
    """Replaces the file by what ONNX Runtime's extended level makes of it, if that has fewer nodes and draws the same images.

    The level is the highest whose graphs do not depend on the processor. Its operators are of the domain com.microsoft.
    """
    import onnx
    import onnxruntime

    if path.with_name(f"{path.name}.data").exists():
        raise InputError(f"weights in a file of their own for --optimize: {path.name}. Leave --optimize out.")
    fused = path.with_name("fused.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(fused)
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        before, after = (len(onnx.load(file, load_external_data=False).graph.node) for file in (path, fused))
        difference = largest_difference(path, fused, contract)
        kept = after < before and difference <= (1 if contract.uint8 else EXACT)
        if kept:
            _sign(fused, path)
        return Fusion("extended", before, after, difference, kept)
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        raise RunError(f"ONNX Runtime cannot fuse {path.name}: {reason_of(error)}. Nothing was written.") from error
    finally:
        fused.unlink(missing_ok=True)


def largest_difference(one: Path, other: Path, contract: Contract) -> float:
    """Of a pixel of any of the check's seeds, in units of the output."""
    feeds = {name: x.numpy() for name, x in check_inputs(contract).items()}
    size = contract.batch or len(SEEDS)
    worst = 0.0
    for start in range(0, len(SEEDS), size):
        rows = np.arange(start, start + size) % len(SEEDS)
        images = [cpu_run(path)({name: x[rows] for name, x in feeds.items()}).astype(np.float64) for path in (one, other)]
        worst = max(worst, float(np.abs(images[0] - images[1]).max()))
    return worst


def _sign(fused: Path, path: Path) -> None:
    """The fused graph under the first one's name, with its producer and without the domains that it does not use."""
    import onnx

    model, original = onnx.load(fused), onnx.load(path, load_external_data=False)
    used = {node.domain for node in model.graph.node}
    for entry in [entry for entry in model.opset_import if entry.domain not in used]:
        model.opset_import.remove(entry)
    model.ir_version = original.ir_version
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    path.write_bytes(model.SerializeToString(deterministic=True))
