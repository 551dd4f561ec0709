"""The check that every exported file passes before it is published: a well-formed graph that makes torch's images."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastcm.errors import RunError
from fastcm.export.program import Program, input_names
from fastcm.export.quiet import quiet
from fastcm.generation.sampler import SeedNoise

BATCHES = (1, 2, 5)
SEEDS = (0, 1, 2, 3, -1, 12345, 2**31, 2**63 - 1)
# Largest difference of a pixel in [-1, 1]. fp32 graphs differ from torch by about 1e-6; a constant that is wrong by 0.1 % shows as 5e-4.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
UINT8_TOLERANCE = 1  # a value next to a half may round to either side
# Images that vary less than this between seeds agree whatever the graph does with the network's output.
VARIATION = 0.02


class Expected(NamedTuple):
    """What the graph must look like."""

    steps: int
    channels: int
    resolution: int
    classes: int | None
    uint8: bool
    precision: str

    @property
    def noise_shape(self) -> tuple[int, ...]:
        image = (self.channels, self.resolution, self.resolution)
        return image if self.steps == 1 else (self.steps, *image)

    @property
    def image_shape(self) -> tuple[int, ...]:
        if self.uint8:
            return (self.resolution, self.resolution, self.channels)
        return (self.channels, self.resolution, self.resolution)

    @property
    def tolerance(self) -> float:
        return UINT8_TOLERANCE if self.uint8 else TOLERANCE[self.precision]


class Comparison(NamedTuple):
    """The graph against torch for all SEEDS in batches of one size; errors in units of the output (levels where it is uint8)."""

    batch: int
    max_error: float
    mean_error: float
    worst_seed: int


def check_file(path: Path, program: Program, expected: Expected) -> list[Comparison]:
    """Checks structure and images of the file; returns a comparison per batch size or raises RunError saying what is wrong."""
    check_structure(path, expected)
    comparisons = compare(path, program, expected)
    for row in comparisons:
        if not row.max_error <= expected.tolerance:  # NaN fails too
            raise RunError(
                f"exported graph disagrees with torch in {path.name}: {row.max_error:.3g} at batch {row.batch}, seed {row.worst_seed}, "
                f"over {expected.tolerance:g} for {expected.precision}. Nothing was written."
            )
    return comparisons


def check_structure(path: Path, expected: Expected) -> None:
    """Raises RunError unless the file passes onnx.checker and strict shape inference, has the contract's inputs and outputs with a
    symbolic batch, and uses the standard operator domain alone."""
    import onnx

    try:
        with quiet():
            onnx.checker.check_model(str(path), full_check=True)
            inferred = path.with_name("inferred.onnx")
            onnx.shape_inference.infer_shapes_path(str(path), str(inferred), strict_mode=True)
            inferred.unlink()
            model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise RunError(f"malformed graph in {path.name}: {str(error).strip().splitlines()[0]}. Nothing was written.") from error
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            operator = f"{node.domain}::{node.op_type} ({node.name})"
            raise RunError(f"operator of a private domain in {path.name}: {operator}. Nothing was written.")
    kinds = onnx.TensorProto
    image = (expected.image_shape, kinds.UINT8 if expected.uint8 else kinds.FLOAT)
    wanted = {"noise": (expected.noise_shape, kinds.FLOAT), "labels": ((), kinds.INT64), "images": image}
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    if names != [*input_names(expected.classes), "images"]:
        raise RunError(f"unexpected inputs and outputs in {path.name}: {', '.join(names)}. Nothing was written.")
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        dims = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
        if not isinstance(dims[0], str):
            raise RunError(f"fixed batch in {path.name}: {value.name} has the shape {dims}. Nothing was written.")
        if (tuple(dims[1:]), kind.elem_type) != wanted[value.name]:
            found = f"{value.name} is {kinds.DataType.Name(kind.elem_type)} {dims}"
            raise RunError(f"unexpected shape or type in {path.name}: {found}. Nothing was written.")


def compare(path: Path, program: Program, expected: Expected) -> list[Comparison]:
    """Every seed of SEEDS through ONNX Runtime in batches of each size of BATCHES, against torch."""
    noise, labels = check_inputs(expected)
    with torch.inference_mode():
        inputs = (noise, labels) if expected.classes else (noise,)
        reference = torch.cat([program(*(x[i : i + 1] for x in inputs)) for i in range(len(SEEDS))]).double().numpy()
    feeds = dict(zip(input_names(expected.classes), (x.numpy() for x in inputs), strict=True))
    session = _session(path)
    rows = []
    for batch in BATCHES:
        parts = [session.run(["images"], {k: v[i : i + batch] for k, v in feeds.items()})[0] for i in range(0, len(SEEDS), batch)]
        error = np.abs(np.concatenate(parts).astype(np.float64) - reference).reshape(len(SEEDS), -1)
        # A NaN is the worst error of all.
        per_seed = np.where(np.isnan(error).any(axis=1), np.inf, error.max(axis=1))
        worst = int(per_seed.argmax())
        rows.append(Comparison(batch, float(per_seed[worst]), float(error.mean()), SEEDS[worst]))
    return rows


def check_inputs(expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise of SEEDS as a sampler draws it, and labels from the first class to the last."""
    source = SeedNoise(torch.tensor(SEEDS), (expected.channels, expected.resolution, expected.resolution))
    fields = [source.normal(step) for step in range(expected.steps)]
    labels = torch.linspace(0, (expected.classes or 1) - 1, len(SEEDS)).long()
    return (fields[0] if expected.steps == 1 else torch.stack(fields, dim=1)), labels


def variation(program: Program, expected: Expected) -> float:
    """How much an image's pixels change with the seed, in [-1, 1]: 0 for a network that ignores its noise."""
    noise, labels = check_inputs(expected)
    with torch.inference_mode():
        images = program(noise, labels[:1].expand(len(SEEDS))) if expected.classes else program(noise)
    return images.double().std(dim=0).mean().item() / (127.5 if expected.uint8 else 1.0)


def table(comparisons: Sequence[Comparison], expected_tolerance: float) -> list[str]:
    """The comparisons as lines of text."""
    lines = ["batch  seeds  max error  mean error  worst seed"]
    for row in comparisons:
        lines.append(f"{row.batch:5d}  {len(SEEDS):5d}  {row.max_error:9.1e}  {row.mean_error:10.1e}  {row.worst_seed:10d}")
    return [*lines, f"tolerance {expected_tolerance:g}"]


def _session(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RunError(f"ONNX Runtime refuses {path.name}: {str(error).strip().splitlines()[0]}. Nothing was written.") from error
