"""A generator as a folder of static files: a page, its scripts, the graphs, and a copy of ONNX Runtime Web."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError
from fastcm.export import publish
from fastcm.export.to_onnx import Exported, export_onnx
from fastcm.generation.onnx_contract import GENERATE, INPAINT

FORMAT, MANIFEST = "fastcm-web", "manifest.json"
PACKAGE, TESTED = "onnxruntime-web", "1.30.0"
# One library for browsers with WebGPU and one without, and the program that each loads. Both need SIMD; threads where the page may.
RUNTIME = tuple(
    f"{stem}{suffix}"
    for stem, suffixes in (
        ("ort.webgpu.min", (".mjs",)),
        ("ort-wasm-simd-threaded.asyncify", (".mjs", ".wasm")),
        ("ort.wasm.min", (".mjs",)),
        ("ort-wasm-simd-threaded", (".mjs", ".wasm")),
    )
    for suffix in suffixes
)
PAGE = Path(__file__).parent / "web"
GRAPHS = {GENERATE: "model.onnx", INPAINT: "inpaint.onnx"}


class Web(NamedTuple):
    """What `export_web` made: the folder, the graphs by task, and the runtime's version."""

    path: Path
    graphs: dict[str, Exported]
    runtime: str


def export_web(
    denoiser: Denoiser,
    info: dict,
    *,
    out: Path,
    runtime: Path | None = None,
    title: str = "fastcm",
    steps: int | None = None,
    sigmas: Iterable[float] | None = None,
    guidance: float | None = None,
    precision: str = "fp32",
) -> Web:
    """Writes `out`, to be served by any static server; it asks no other host for anything.

    steps, sigmas: the noise levels of a new image; the graph that fills a mask has its own four. guidance, precision: of both.
    runtime: the npm package onnxruntime-web, by default node_modules/onnxruntime-web here or above. Raises InputError where the package or
    a place for the folder is missing; an `out` that an earlier export wrote is replaced, as a whole, once the new one is complete.
    """
    out = Path(out)
    refuse_foreign(out)
    package = find_runtime(runtime)
    version = _package(package)["version"]
    with publish.staging(out, option="--web") as staging:
        folder = staging / "web"
        shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "runtime").mkdir()
        for name in RUNTIME:
            shutil.copyfile(package / "dist" / name, folder / "runtime" / name)
        levels = {GENERATE: {"steps": steps, "sigmas": sigmas}, INPAINT: {}}
        how = {"target": "web", "precision": precision, "guidance": guidance}
        graphs = {task: export_onnx(denoiser, info, out=folder / GRAPHS[task], task=task, **how, **levels[task]) for task in GRAPHS}
        manifest = web_manifest(graphs, info, title=title, runtime=version)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        replace_folder(folder, out, staging / "old")
    graphs = {task: graph._replace(path=out / GRAPHS[task]) for task, graph in graphs.items()}
    return Web(out, graphs, version)


def find_runtime(given: Path | None) -> Path:
    """The folder of the npm package onnxruntime-web: given, or below node_modules here or above."""
    if given is not None:
        places = [Path(given), Path(given) / PACKAGE, Path(given) / "node_modules" / PACKAGE]
    else:
        here = Path.cwd()
        places = [folder / "node_modules" / PACKAGE for folder in (here, *here.parents)]
    for place in places:
        if _package(place).get("name") == PACKAGE:
            missing = next((name for name in RUNTIME if not (place / "dist" / name).is_file()), None)
            if missing:
                raise InputError(f"another form of {PACKAGE} in --runtime: {place} lacks dist/{missing}. Install {PACKAGE}@{TESTED}.")
            return place
    where = f"in --runtime: {given}" if given is not None else "for --web: no node_modules here or above"
    raise InputError(f"no {PACKAGE} {where}. Run npm install {PACKAGE}, or name its folder in --runtime.")


def _package(folder: Path) -> dict:
    """The content of package.json, where there is one."""
    try:
        return dict(json.loads((folder / "package.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def refuse_foreign(out: Path) -> None:
    """Refuses to replace what no export wrote."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        known = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise InputError(f"something else stands in --web: {out}. Give the name of a new folder.")


def replace_folder(new: Path, out: Path, aside: Path) -> None:
    """Renames `new` to `out`; what stood there goes to `aside` first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        os.replace(out, aside)
    os.replace(new, out)


def web_manifest(graphs: dict[str, Exported], info: dict, *, title: str, runtime: str) -> dict:
    """What the page reads: the model's form and classes, and the inputs and noise levels of each graph."""
    contract = graphs[GENERATE].contract
    classes = info.get("classes") or ([str(number) for number in range(contract.classes)] if contract.classes else None)
    return {
        "format": FORMAT,
        "title": title,
        "channels": contract.channels,
        "resolution": contract.resolution,
        "classes": classes and [str(name) for name in classes],
        "runtime": f"{PACKAGE} {runtime}",
        "graphs": {
            task: {
                "file": GRAPHS[task],
                "sigmas": list(graph.sigmas),
                "inputs": {name: list(shape) for name, (shape, _) in graph.contract.inputs.items()},
            }
            for task, graph in graphs.items()
        },
    }
