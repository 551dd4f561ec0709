"""The comparison that every exported file passes before it is published: the images that torch makes, in ONNX Runtime."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcm.errors import RunError, reason_of
from fastcm.export.program import Program
from fastcm.generation.onnx_contract import Contract, rounding
from fastcm.generation.sampler import SeedNoise

BATCHES = (1, 2, 5)
SEEDS = (0, 1, 2, 3, -1, 12345, 2**31, 2**63 - 1)
LEVELS = (0.01, 80.0)  # of sigma, where it is an input
# Images that vary less than this between seeds agree whatever the graph does with the network's output.
VARIATION = 0.02
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


class Comparison(NamedTuple):
    """The graph against torch for all SEEDS in batches of one size; errors in units of the output (levels where it is uint8)."""

    batch: int
    max_error: float
    mean_error: float
    worst_seed: int


def check_images(run: Run, reference: Program, contract: Contract, *, name: str, batches: Sequence[int] = BATCHES) -> list[Comparison]:
    """A comparison per batch size, or RunError naming the worst seed. run: feeds of a batch -> its images.

    reference: the program in fp32, whatever the graph's precision.
    """
    comparisons = compare(run, reference, contract, batches if contract.batch is None else (contract.batch,))
    for row in comparisons:
        if not row.max_error <= contract.tolerance:  # NaN fails too
            raise RunError(
                f"exported graph disagrees with torch in {name}: {row.max_error:.3g} at batch {row.batch}, seed {row.worst_seed}, "
                f"over {contract.tolerance:g} for {contract.precision}. Nothing was written."
            )
    return comparisons


def compare(run: Run, reference: Program, contract: Contract, batches: Sequence[int]) -> list[Comparison]:
    """Every seed of SEEDS through `run` in batches of each size, the last one filled up by the first seeds, against torch one by one."""
    inputs = check_inputs(contract)
    with torch.inference_mode():
        images = torch.cat([reference(*(x[i : i + 1] for x in inputs.values())) for i in range(len(SEEDS))]).double().numpy()
    feeds = {name: x.numpy() for name, x in inputs.items()}
    rows = []
    for batch in batches:
        order = np.resize(np.arange(len(SEEDS)), -(-len(SEEDS) // batch) * batch)
        parts = [run({name: x[order[i : i + batch]] for name, x in feeds.items()}) for i in range(0, len(order), batch)]
        error = np.abs(np.concatenate(parts).astype(np.float64) - images[order]).reshape(len(order), -1)
        if "sigma" in feeds:  # |c_out| is sigma at most
            error /= rounding(feeds["sigma"][order, None])
        # A NaN is the worst error of all.
        per_image = np.where(np.isnan(error).any(axis=1), np.inf, error.max(axis=1))
        worst = int(per_image.argmax())
        rows.append(Comparison(batch, float(per_image[worst]), float(error.mean()), SEEDS[order[worst]]))
    return rows


def check_inputs(contract: Contract) -> dict[str, Tensor]:
    """Inputs for SEEDS: the noise that a sampler draws, smooth pictures, masks of half the pixels, labels from the first to the last;
    of a denoiser noise alone, at levels from LEVELS' first to its last."""
    seeds, (channels, size) = torch.tensor(SEEDS), (contract.channels, contract.resolution)
    source = SeedNoise(seeds, (channels, size, size))
    sigma = torch.from_numpy(np.geomspace(*LEVELS, len(SEEDS), dtype=np.float32))
    inputs = {}
    for name, (shape, _) in contract.inputs.items():
        if name == "noise":
            fields = [source.normal(step) for step in range(contract.steps)]
            inputs[name] = fields[0] if contract.steps == 1 else torch.stack(fields, dim=1)
        elif name == "x":
            inputs[name] = sigma[:, None, None, None] * source.normal(0)
        elif name == "sigma":
            inputs[name] = sigma
        elif name == "seeds":
            inputs[name] = seeds
        elif name == "labels":
            numbers = torch.linspace(0, contract.classes - 1, len(SEEDS)).long()
            inputs[name] = torch.from_numpy(contract.labels(numbers.numpy()))
        else:
            waves = torch.sin(torch.arange(len(SEEDS) * int(np.prod(shape))) * 0.37).view(len(SEEDS), *shape)
            inputs[name] = (waves > 0).float() if name == "mask" else waves
    return inputs


def variation(reference: Program, contract: Contract) -> float:
    """How much an image's pixels change with the seed, in [-1, 1]: 0 for a network that ignores its noise."""
    inputs = check_inputs(contract)
    for name in inputs.keys() & {"labels", "image", "mask"}:
        inputs[name] = inputs[name][:1].expand_as(inputs[name])
    with torch.inference_mode():
        images = reference(*inputs.values())
    return images.double().std(dim=0).mean().item() / (127.5 if contract.uint8 else 1.0)


def table(comparisons: Sequence[Comparison], tolerance: float) -> list[str]:
    """The comparisons as lines of text."""
    lines = ["batch  seeds  max error  mean error  worst seed"]
    for row in comparisons:
        lines.append(f"{row.batch:5d}  {len(SEEDS):5d}  {row.max_error:9.1e}  {row.mean_error:10.1e}  {row.worst_seed:10d}")
    return [*lines, f"tolerance {tolerance:g}"]


def cpu_run(path: Path) -> Run:
    """The file in ONNX Runtime on the CPU; RunError where it is refused."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RunError(f"ONNX Runtime refuses {path.name}: {reason_of(error)}. Nothing was written.") from error
    return lambda feeds: session.run(["images"], feeds)[0]
