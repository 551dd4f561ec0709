"""An exported graph as a TensorRT engine: built and compared where TensorRT and a GPU are, else the commands that build it elsewhere."""

import importlib.util
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastcm.errors import InputError, RunError
from fastcm.export import publish
from fastcm.export.parity import BATCHES, Comparison, Run, check_images
from fastcm.export.to_onnx import Exported
from fastcm.generation.onnx_contract import Contract

DEFAULT_BATCHES = (1, 4, 16)


class Profile(NamedTuple):
    """The batches that an engine serves: the smallest, the one that it is tuned for, the largest."""

    smallest: int
    tuned: int
    largest: int


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
    """True where the Python package tensorrt and a CUDA device are."""
    return importlib.util.find_spec("tensorrt") is not None and torch.cuda.is_available()


def trtexec(onnx: Path, plan: Path, contract: Contract, batches: Profile) -> list[str]:
    """The command that builds the engine. Types come from the graph: TensorRT 11 knows no other way, 10 is told to."""
    command = ["trtexec", f"--onnx={onnx}", f"--saveEngine={plan}", "--stronglyTyped", f"--timingCacheFile={_cache(plan)}"]
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
    ranges = {"noise": "[-3,3]", "image": "[-1,1]", "mask": "[0,1]", "labels": f"[0,{(contract.classes or 1) - 1}]"}
    command += ["--val-range", *(f"{name}:{ranges[name]}" for name in contract.inputs)]
    cache = str(_cache(plan))
    return [*command, "--load-timing-cache", cache, "--save-timing-cache", cache, "--atol", f"{contract.tolerance:g}", "--rtol", "0"]


def _cache(plan: Path) -> Path:
    return plan.with_suffix(".timing.cache")


def write_commands(exported: Exported, plan: Path, batches: Profile) -> Path:
    """Writes both commands as a script beside the ONNX file, to be run in that folder on the machine with the GPU; returns its path."""
    script, onnx = exported.path.with_suffix(".tensorrt.sh"), Path(exported.path.name)
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


def build_engine(exported: Exported, plan: Path, batches: Profile) -> list[Comparison]:
    """Builds `plan` from the exported file on this machine's GPU, strongly typed, and publishes it if it makes torch's images."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # TensorRT 11 builds every network so and may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(exported.path)):
        raise RunError(f"TensorRT refuses {exported.path}: {parser.get_error(0)}. No engine was written.")
    config, cache = builder.create_builder_config(), _cache(plan)
    timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    config.set_timing_cache(timings, ignore_mismatch=True)
    if exported.contract.batch is None:
        shapes = builder.create_optimization_profile()
        for name in exported.contract.inputs:
            shapes.set_shape(name, *(exported.contract.shape(name, batch) for batch in batches))
        config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RunError(f"TensorRT builds no engine from {exported.path}: see its messages above. No engine was written.")
    with publish.staging(plan, option="--tensorrt") as folder:
        (folder / plan.name).write_bytes(bytes(engine))
        run = engine_run(trt, logger, bytes(engine), exported.contract)
        sizes = [batch for batch in BATCHES if batches.smallest <= batch <= batches.largest] or [batches.tuned]
        comparisons = check_images(run, exported.reference, exported.contract, name=plan.name, batches=sizes)
        (folder / cache.name).write_bytes(bytes(timings.serialize()))
        publish.publish(folder, plan)
    return comparisons


def engine_run(trt, logger, engine: bytes, contract: Contract) -> Run:
    """A serialised engine as a function of feeds, on torch's current CUDA device and stream."""
    context = trt.Runtime(logger).deserialize_cuda_engine(engine).create_execution_context()

    def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in feeds.items()}
        shape, dtype = contract.output
        count = len(next(iter(feeds.values())))
        images = torch.empty((count, *shape), dtype=torch.uint8 if dtype == np.uint8 else torch.float32, device="cuda")
        for name, tensor in tensors.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for name, tensor in {**tensors, "images": images}.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RunError("TensorRT failed to run the engine. No engine was written.")
        stream.synchronize()
        return images.cpu().numpy()

    return run
