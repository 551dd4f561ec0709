"""A denoiser to an ONNX file that is published only after ONNX Runtime has made torch's images with it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError, RunError
from fastcm.export.onnx_metadata import metadata
from fastcm.export.parity import VARIATION as VARIATION
from fastcm.export.parity import Comparison, Expected, check_file, variation
from fastcm.export.program import Program, example_inputs, export_program, input_names
from fastcm.export.quiet import quiet
from fastcm.export.translations import translations
from fastcm.generation.generator import class_names
from fastcm.generation.request import chosen_sampler, noise_levels

# The smallest opset that torch exports to without down-conversion. 19 and 20 give the same graph for these networks; from 21 on
# GroupNorm is one node, which ONNX Runtime's fusions for CUDA do not recognise (they look for InstanceNormalization).
OPSET = 18
OPSETS = range(18, 24)
# A protobuf message ends at 2 GiB; beyond this the weights go to a file of their own.
SINGLE_FILE_BYTES = 2**31 - 2**24


class Exported(NamedTuple):
    """What `export_onnx` made: the file, its noise levels, the comparisons with torch, one per batch size, and their tolerance.

    variation: how much pixels change with the seed; below VARIATION the comparisons say little.
    """

    path: Path
    sigmas: tuple[float, ...]
    opset: int
    comparisons: list[Comparison]
    tolerance: float
    variation: float


def export_onnx(
    denoiser: Denoiser,
    info: dict,
    *,
    out: Path,
    steps: int | None = None,
    sigmas: Iterable[float] | None = None,
    uint8: bool = False,
    opset: int = OPSET,
) -> Exported:
    """Writes the whole generator as `out`: inputs noise fp32 [batch, C, H, W] ([batch, K, C, H, W] for K steps) and, for models with
    classes, labels int64 [batch]; output images fp32 [batch, C, H, W] in [-1, 1], or uint8 [batch, H, W, C].

    Every file is checked (see parity.py) before it gets its name; one that fails is an error and leaves nothing.
    """
    out = Path(out)
    if opset not in OPSETS:
        raise InputError(f"opset out of range in --opset: {opset}. Use {OPSETS[0]} to {OPSETS[-1]}.")
    if out.is_dir():
        raise InputError(f"a folder in --onnx: {out}. Give the name of a file.")
    if chosen_sampler(None, info) != "consistency":
        remedy = "One call gives its mean image; distil it first: fastcm train --method cd --teacher MODEL."
        raise InputError(f"a diffusion teacher in MODEL: it needs a solver. {remedy}")
    levels = noise_levels(steps, sigmas, denoiser.preconditioning, info.get("sampling"))
    expected = _expected(denoiser, info, steps=len(levels), uint8=uint8)
    program = Program(_plain(denoiser), levels, classes=expected.classes, uint8=uint8)
    model = convert(program, expected, opset=opset, properties=metadata(denoiser, info, sigmas=levels, precision="fp32"))
    with _staging(out) as folder:
        _write(model, folder / out.name)
        comparisons = check_file(folder / out.name, program, expected)
        _publish(folder, out)
    return Exported(out, levels, opset, comparisons, expected.tolerance, variation(program, expected))


def convert(program: Program, expected: Expected, *, opset: int, properties: dict[str, str]):
    """The program as an onnx.ModelProto with a symbolic batch, without traces of the machine that exported it."""
    import onnx  # noqa: F401  (a missing package is named here, before torch wraps the error)
    import onnxscript  # noqa: F401

    inputs = example_inputs(program, channels=expected.channels, resolution=expected.resolution, classes=expected.classes)
    try:
        with quiet(), torch.no_grad():
            exported = torch.onnx.export(
                export_program(program, inputs),
                dynamo=True,
                input_names=input_names(expected.classes),
                output_names=["images"],
                dynamic_shapes=tuple({0: "batch"} for _ in inputs),
                opset_version=opset,
                custom_translation_table=translations(opset),
                optimize=True,
                external_data=False,
                verbose=False,
            )
            model = exported.model_proto
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = type(program.levels[0].network).__name__
        raise RunError(f"torch cannot export the network {name}: {reason}. Nothing was written.") from error
    _clean(model, properties)
    return model


def _expected(denoiser: Denoiser, info: dict, *, steps: int, uint8: bool) -> Expected:
    config = getattr(denoiser.network, "config", None)
    classes = class_names(denoiser, info)
    return Expected(
        steps=steps,
        channels=info.get("channels") or config.in_channels,
        resolution=info.get("resolution") or config.resolution,
        classes=len(classes) if classes else None,
        uint8=uint8,
        precision="fp32",
    )


def _plain(denoiser: Denoiser) -> Denoiser:
    """The denoiser on the CPU in fp32 and eval mode, without torch.compile's wrapper."""
    network = getattr(denoiser.network, "_orig_mod", denoiser.network)
    return Denoiser(network, denoiser.preconditioning).to("cpu", torch.float32).eval()


def _clean(model, properties: dict[str, str]) -> None:
    """Sets the metadata properties and drops per-node ones, which hold stack traces with local paths."""
    model.doc_string = model.graph.doc_string = ""
    model.producer_name, model.producer_version = "fastcm", properties["fastcm.version"].strip('"')
    graph = model.graph
    for holder in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del holder.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    for key, value in sorted(properties.items()):
        model.metadata_props.add(key=key, value=value)


def _write(model, path: Path) -> None:
    import onnx

    if model.ByteSize() < SINGLE_FILE_BYTES:
        path.write_bytes(model.SerializeToString(deterministic=True))
    else:
        onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data")


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder on the file system of `out` that is gone afterwards, whatever happens."""
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    try:
        folder = Path(tempfile.mkdtemp(prefix=".tmp-export-", dir=place))
    except OSError as error:
        raise InputError(f"cannot write in {place}: {error.strerror}. Choose another place for --onnx.") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    """Renames the checked files into place, the one that names the others last."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == out.name):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(file, out.with_name(file.name))
