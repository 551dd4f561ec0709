"""A generator as an entry of a model repository for NVIDIA's Triton Inference Server: config.pbtxt and a folder per version."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError
from fastcm.export import publish
from fastcm.export.to_onnx import Exported, export_onnx
from fastcm.generation.onnx_contract import Contract

CONFIG, GRAPH = "config.pbtxt", "model.onnx"
# Images of one batch, and how long the server holds a request back for others.
MAX_BATCH, QUEUE_DELAY_US = 64, 2000
PREFERRED_BATCHES = (8, 16, 32)
TYPES = {np.float32: "TYPE_FP32", np.int64: "TYPE_INT64", np.uint8: "TYPE_UINT8"}


class Served(NamedTuple):
    """What `export_serving` made: the model's folder in the repository, its new version, and the graph."""

    path: Path
    version: int
    exported: Exported


def export_serving(denoiser: Denoiser, info: dict, *, repository: Path, name: str, options: dict) -> Served:
    """Adds a version of the model `name` to a repository, which is made where it does not exist.

    options: of `export_onnx`, besides out, target and batch: the server's ONNX Runtime runs the graph on a GPU where it has one, a graph
    that takes seeds on the CPU. The newest version is the one that the server serves; a server that polls sees it whole or not at all.
    """
    repository = Path(repository)
    if repository.exists() and not repository.is_dir():
        raise InputError(f"a file in --serving: {repository}. Give the name of a folder.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise InputError(f"not a name for a served model in MODEL: {name}. Rename its folder to letters, digits, dots and dashes.")
    folder = repository / name
    versions = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
    version = max(versions, default=0) + 1
    with publish.staging(repository, option="--serving") as staging:
        new = staging / name
        (new / str(version)).mkdir(parents=True)
        exported = export_onnx(denoiser, info, out=new / str(version) / GRAPH, target="ort", **options)
        (new / CONFIG).write_text(config(name, exported.contract), encoding="utf-8")
        repository.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            os.replace(new / str(version), folder / str(version))
            os.replace(new / CONFIG, folder / CONFIG)
        else:
            os.replace(new, folder)
    return Served(folder, version, exported._replace(path=folder / str(version) / GRAPH))


def config(name: str, contract: Contract) -> str:
    """config.pbtxt: inputs and outputs, batches made of several requests, a warm-up of the smallest and the largest batch."""
    kind = "KIND_CPU" if contract.seeded else "KIND_AUTO"
    preferred = ", ".join(str(batch) for batch in PREFERRED_BATCHES)
    inputs = ",\n".join(_value(key, shape, dtype) for key, (shape, dtype) in contract.inputs.items())
    parts = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f'default_model_filename: "{GRAPH}"',
        f"max_batch_size: {MAX_BATCH}",
        f"input [\n{inputs}\n]",
        f"output [\n{_value('images', *contract.output)}\n]",
        f"dynamic_batching {{\n  preferred_batch_size: [ {preferred} ]\n  max_queue_delay_microseconds: {QUEUE_DELAY_US}\n}}",
        f"instance_group [\n  {{ count: 1 kind: {kind} }}\n]",
        "version_policy { latest { num_versions: 1 } }",
        f"model_warmup [\n{_warmup('one image', 1, contract)},\n{_warmup('a full batch', MAX_BATCH, contract)}\n]",
    ]
    return "\n".join(parts) + "\n"


def _value(name: str, shape: tuple[int, ...], dtype: type) -> str:
    """An input or output. The server has no values without dimensions: one number per image travels as [1]."""
    dims = ", ".join(str(size) for size in shape or (1,))
    reshape = "" if shape else " reshape { shape: [ ] }"
    return f'  {{ name: "{name}" data_type: {TYPES[dtype]} dims: [ {dims} ]{reshape} }}'


def _warmup(name: str, batch: int, contract: Contract) -> str:
    lines = [f'  {{\n    name: "{name}"\n    batch_size: {batch}']
    for key, (shape, dtype) in contract.inputs.items():
        data = "random_data" if dtype is np.float32 else "zero_data"
        dims = ", ".join(str(size) for size in shape or (1,))
        value = f"data_type: {TYPES[dtype]} dims: [ {dims} ] {data}: true"
        lines.append(f'    inputs {{ key: "{key}" value {{ {value} }} }}')
    return "\n".join([*lines, "  }"])
