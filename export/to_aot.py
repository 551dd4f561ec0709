"""A generator as an AOTInductor package: machine code for this kind of CPU, for C++ programs and for Python that trusts the file."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError, RunError, reason_of
from fastcm.export import publish
from fastcm.export.onnx_metadata import metadata
from fastcm.export.parity import Comparison, check_images
from fastcm.export.program import build, example_inputs, export_program
from fastcm.export.quiet import quiet
from fastcm.export.to_onnx import graph_of
from fastcm.generation.onnx_contract import Contract

SUFFIX = ".pt2"
# What the C++ wrapper reads; the other properties are those of an ONNX file.
INPUTS, OUTPUT, BATCH = "fastcm.inputs", "fastcm.output", "fastcm.batch"


class Compiled(NamedTuple):
    """What `export_aot` made: the package, its form and noise levels, and the comparisons with torch, one per batch size."""

    path: Path
    contract: Contract
    sigmas: tuple[float, ...]
    comparisons: list[Comparison]


def export_aot(
    denoiser: Denoiser,
    info: dict,
    *,
    out: Path,
    steps: int | None = None,
    sigmas: Iterable[float] | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    uint8: bool = False,
    seeded: bool = False,
    task: str = "generate",
    factor: int | None = None,
) -> Compiled:
    """Compiles the generator, or an editing task, to `out`; arguments as in `export_onnx`. fp32, for CPUs with this one's instructions.

    The package runs only beside the version of torch that made it. It gets its name after its images were compared with torch's.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise InputError(f"unknown kind of file in --aot: {out}. Give a name that ends in {SUFFIX}.")
    form = {"precision": "fp32", "batch": batch, "uint8": uint8, "seeded": seeded, "task": task, "factor": factor}
    whole, levels, contract = graph_of(denoiser, info, steps=steps, sigmas=sigmas, guidance=guidance, **form)
    program = build(whole, levels, contract)
    with publish.staging(out, option="--aot") as folder:
        properties = {**metadata(whole, info, sigmas=levels, contract=contract), **stated(contract)}
        compile_package(program, contract, folder / out.name, properties)
        run = package_run(folder / out.name)
        comparisons = check_images(run, program, contract, name=out.name)
        rows = [row._asdict() for row in comparisons]
        graph = {**contract._asdict(), "sigmas": list(levels)}
        publish.write_manifest(folder, out, {"graph": graph, "compared with torch": {"tolerance": contract.tolerance, "batches": rows}})
        publish.publish(folder, out)
    return Compiled(out, contract, levels, comparisons)


def stated(contract: Contract) -> dict[str, str]:
    """Names, types and shapes without the batch, in words that C++ reads: "noise float32 1 8 8;labels int64"."""
    values = [(name, shape, dtype) for name, (shape, dtype) in contract.inputs.items()]
    shape, dtype = contract.output
    line = lambda name, shape, dtype: " ".join([name, dtype.__name__, *map(str, shape)])  # noqa: E731
    return {INPUTS: ";".join(line(*value) for value in values), OUTPUT: line("images", shape, dtype), BATCH: str(contract.batch or 0)}


def compile_package(program, contract: Contract, path: Path, properties: dict[str, str]) -> None:
    from torch._inductor import aoti_compile_and_package

    try:
        with quiet(), torch.no_grad():
            exported = export_program(program, example_inputs(contract))
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs={"aot_inductor.metadata": properties})
    except Exception as error:
        reason = reason_of(error)
        raise RunError(
            f"torch cannot compile {path.name}: {reason}. It takes a C++ compiler, g++ or that of CXX. Nothing was written."
        ) from error


def package_run(path: Path):
    """The package in this process: feeds of a batch -> its images."""
    from fastcm.generation.aot_generator import AotGenerator

    return AotGenerator(path).run
