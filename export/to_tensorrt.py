"""An exported graph as an engine: by TensorRT for RTX on any machine, by TensorRT beside its GPU, else the commands for it."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastcm.errors import InputError
from fastcm.export import publish
from fastcm.export.compiler import Profile, compile_graph
from fastcm.export.gpus import current_capability
from fastcm.export.parity import BATCHES, Comparison, check_images
from fastcm.export.to_onnx import Exported
from fastcm.generation.onnx_contract import Contract
from fastcm.generation.plan_engine import Batches, PlanEngine
from fastcm.generation.plan_generator import FORMAT, VERSION
from fastcm.generation.tensorrt_bindings import DATACENTER, RTX, bindings, installed, logger

DEFAULT_BATCHES = (1, 4, 16)
LICENCES = {
    RTX: "the runtime is NVIDIA's: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/reference/sla.html",
    DATACENTER: "the runtime is NVIDIA's: https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/sla.html",
}


class Engine(NamedTuple):
    """What `build_engine` made. comparisons: with torch, or None where this machine cannot run it."""

    path: Path
    capabilities: tuple[tuple[int, int], ...]
    layers: int
    comparisons: list[Comparison] | None


def profile(batches: tuple[int, ...] | None, batch: int | None) -> Profile:
    """Checked; a graph of a fixed batch has that one alone."""
    if batch is not None:
        if batches is not None:
            raise InputError(f"two options that exclude each other: --batch {batch} and --profile. Give one of them.")
        return Profile(batch, batch, batch)
    batches = DEFAULT_BATCHES if batches is None else tuple(batches)
    if len(batches) != 3 or not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise InputError(f"not a profile in --profile: {','.join(map(str, batches))}. Write it as MIN,OPT,MAX, as 1,4,16.")
    return Profile(*batches)


def can_build() -> bool:
    """True where TensorRT and a CUDA device are."""
    return installed(DATACENTER) and torch.cuda.is_available()


def trtexec(onnx: Path, plan: Path, contract: Contract, batches: Profile) -> list[str]:
    """The command that builds the engine. Types come from the graph: TensorRT 11 knows no other way, 10 is told to."""
    command = ["trtexec", f"--onnx={onnx}", f"--saveEngine={plan}", "--stronglyTyped", "--noTF32", f"--timingCacheFile={_cache(plan)}"]
    if contract.batch is None:
        for option, batch in zip(("--minShapes", "--optShapes", "--maxShapes"), batches, strict=True):
            shapes = [f"{name}:{'x'.join(map(str, contract.shape(name, batch)))}" for name in contract.inputs]
            command.append(f"{option}={','.join(shapes)}")
    return [*command, "--skipInference"]


def polygraphy(onnx: Path, plan: Path, contract: Contract, batches: Profile) -> list[str]:
    """The command that compares TensorRT with ONNX Runtime on random inputs."""

    def shapes(batch: int) -> list[str]:
        return [f"{name}:{list(contract.shape(name, batch))}".replace(" ", "") for name in contract.inputs]

    command = ["polygraphy", "run", str(onnx), "--onnxrt", "--trt", "--strongly-typed"]
    if contract.batch is None:
        for option, batch in zip(("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes"), batches, strict=True):
            command += [option, *shapes(batch)]
    command += ["--input-shapes", *shapes(batches.tuned)]
    ranges = {
        "noise": "[-3,3]",
        "x": "[-3,3]",
        "sigma": "[0.01,1]",
        "image": "[-1,1]",
        "mask": "[0,1]",
        "labels": f"[0,{(contract.classes or 1) - 1}]",
    }
    command += ["--val-range", *(f"{name}:{ranges[name]}" for name in contract.inputs)]
    cache = str(_cache(plan))
    return [*command, "--load-timing-cache", cache, "--save-timing-cache", cache, "--atol", f"{contract.tolerance:g}", "--rtol", "0"]


def _cache(plan: Path) -> Path:
    return publish.beside(plan, ".timing.cache")


def write_commands(exported: Exported, plan: Path, batches: Profile) -> Path:
    """Writes both commands as a script beside the ONNX file, to be run in that folder on the machine with the GPU; returns its path."""
    script, onnx = publish.beside(exported.path, ".tensorrt.sh"), Path(exported.path.name)
    build, compare = (tool(onnx, Path(plan.name), exported.contract, batches) for tool in (trtexec, polygraphy))
    lines = [
        "#!/bin/sh",
        f"# Batches {', '.join(map(str, batches))}: the smallest, the one to tune for, the largest.",
        "set -e",
        'cd "$(dirname "$0")"',
        shlex.join(build),
        shlex.join(compare),
    ]
    with publish.staging(script, option="--tensorrt") as folder:
        (folder / script.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        publish.publish(folder, script)
    return script


def build_engine(
    exported: Exported,
    plan: Path,
    batches: Profile,
    *,
    kind: str = DATACENTER,
    capabilities: tuple[tuple[int, int], ...] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Engine:
    """Builds `plan` from the exported file, strongly typed, and publishes it with its manifest; RunError where the compiler refuses.

    kind: RTX, for cards of these capabilities wherever it is built, or DATACENTER, for this machine's (None). Where this machine's card is
    among them, the engine must make torch's images first.
    """
    plan, cache = Path(plan), _cache(plan)
    here = current_capability() if capabilities is None else None
    timings = None if kind == RTX else cache.read_bytes() if cache.is_file() else b""
    made = compile_graph(kind, exported.path, exported.contract, batches, capabilities=capabilities, timings=timings, progress=progress)
    built_for = capabilities or (here,)
    comparisons = None
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in built_for:
        comparisons = _compared(kind, made.engine, exported, batches, name=plan.name)
    with publish.staging(plan, option="--tensorrt") as folder:
        (folder / plan.name).write_bytes(made.engine)
        publish.write_manifest(folder, plan, _manifest(kind, exported, batches, built_for, comparisons), form=(FORMAT, VERSION))
        if made.timings is not None:
            (folder / cache.name).write_bytes(made.timings)
        publish.publish(folder, plan)
    return Engine(plan, built_for, made.layers, comparisons)


def _compared(kind: str, engine: bytes, exported: Exported, batches: Profile, *, name: str) -> list[Comparison]:
    limits = Batches(batches.smallest, batches.largest)
    run = PlanEngine(bindings(kind), logger(kind), engine, exported.contract, limits, name=name).run
    sizes = [batch for batch in BATCHES if batches.smallest <= batch <= batches.largest] or [batches.tuned]
    return check_images(run, exported.reference, exported.contract, name=name, batches=sizes)


def _manifest(kind: str, exported: Exported, batches: Profile, capabilities, comparisons: list[Comparison] | None) -> dict:
    return {
        "engine": {
            "runtime": kind,
            "version": bindings(kind).__version__,
            "capabilities": [list(capability) for capability in capabilities],
            "profile": list(batches),
        },
        "onnx": {"name": exported.path.name, "sha256": publish.sha256(exported.path)},
        "graph": exported.contract._asdict(),
        "sigmas": list(exported.sigmas),
        "config": exported.config,
        "licence": LICENCES[kind],
        "compared with torch": "not here: no such card"
        if comparisons is None
        else {"tolerance": exported.contract.tolerance, "batches": [row._asdict() for row in comparisons]},
    }
