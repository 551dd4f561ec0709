"""`fastcm info`: what a model or run is: architecture, noise levels, classes, training, hashes, and which ops run as kernels."""

import argparse
import hashlib
from pathlib import Path


def add(subparsers) -> None:
    parser = subparsers.add_parser("info", help="describe a model or run", description=__doc__)
    models = "a run, model or diffusers folder, an .onnx or .plan, an OpenAI .pt, an EDM .pkl or hf:owner/name"
    parser.add_argument("model", metavar="MODEL", help=models)
    parser.add_argument("--watch", action="store_true", help="of a run: loss, images/s, time left and the newest samples, drawn again")


def run(args: argparse.Namespace) -> int:
    if args.watch:
        from fastcm.cli.info_watch import watch

        return watch(Path(args.model))

    from fastcm import api

    kind, path = api.resolve_model(args.model)
    lines = {"model": f"{path} ({kind})"}
    if kind == "onnx":
        lines |= _onnx(path)
    elif kind == "plan":
        lines |= _plan(path)
    else:
        lines |= _denoiser(*api.load_denoiser(args.model))
    if api.is_run_folder(Path(args.model)):
        lines |= _run_folder(Path(args.model))
    lines |= _hashes(path)
    lines |= _kernels()
    width = max(len(name) for name in lines)
    for name, text in lines.items():
        print(f"{name:{width}}  {text}")
    return 0


def _denoiser(denoiser, info: dict) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in denoiser.network.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in denoiser.network.parameters())
    lines = _config({**info, "network": info.get("network") or {"kind": type(denoiser.network).__name__}})
    return {**lines, "parameters": f"{parameters:,} ({size / 1e6:.1f} MB in fp32)", **_preconditioning(vars(denoiser.preconditioning))}


def _onnx(path: Path) -> dict[str, str]:
    from fastcm.generation.onnx_generator import OnnxGenerator

    generator = OnnxGenerator(path, provider="cpu")
    sigmas = ",".join(f"{sigma:g}" for sigma in generator.graph_sigmas) or "an input"
    graph = f"sigmas {sigmas}, {generator.precision}"
    return {**_config(generator.info), "graph": graph, **_preconditioning(generator.info["preconditioning"])}


def _plan(path: Path) -> dict[str, str]:
    """What the manifest says; the engine is not loaded."""
    from fastcm.generation.plan_generator import read_manifest
    from fastcm.generation.tensorrt_bindings import RUNTIMES

    content = read_manifest(path)
    engine, graph = content["engine"], content["graph"]
    cards = ", ".join(f"sm_{major}{minor}" for major, minor in engine["capabilities"])
    batches = " to ".join(str(batch) for batch in sorted({engine["profile"][0], engine["profile"][2]}))
    lines = {"engine": f"{RUNTIMES[engine['runtime']].name} {engine['version']} for {cards}, batches of {batches}"}
    lines["graph"] = f"sigmas {','.join(f'{sigma:g}' for sigma in content['sigmas'])}, {graph['precision']}, of {content['onnx']['name']}"
    return {**_config(content["config"]), **lines, **_preconditioning(content["config"]["preconditioning"])}


def _config(info: dict) -> dict[str, str]:
    """The lines that config.json gives, of the fields that it has."""
    network = dict(info.get("network") or {})
    lines = {"network": network.pop("kind", "unknown")}
    if network:
        lines["options"] = ", ".join(f"{name} {_short(value)}" for name, value in network.items() if value is not None)
    if info.get("resolution"):
        lines["images"] = f"{info['resolution']}x{info['resolution']}, {info.get('channels', '?')} channels"
    classes = info.get("classes")
    if classes:
        more = f", … ({len(classes)})" if len(classes) > 12 else ""
        lines["classes"] = ", ".join(str(name) for name in classes[:12]) + more
    for name in ("source", "sampling", "training", "licence"):
        if info.get(name):
            lines[name] = _short(info[name])
    return lines


def _preconditioning(values: dict) -> dict[str, str]:
    low = values.get("transition") or values["sigma_min"]
    levels = f"{low:g} to {values['sigma_max']:g}, sigma_data {values['sigma_data']:g}, rho {values['rho']:g}"
    return {"noise": f"{levels}, {values['form']} form, c_noise {values['c_noise']}"}


def _run_folder(path: Path) -> dict[str, str]:
    """The last line of the run's log."""
    import json

    log = path / "log.jsonl"
    if not log.is_file():
        return {}
    lines = log.read_text(encoding="utf-8").splitlines()
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short
        return {"last log line": ", ".join(f"{key} {_short(value)}" for key, value in entry.items())}
    return {}


def _hashes(path: Path) -> dict[str, str]:
    """sha256 of the weights: of the file, or of the folder's safetensors."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    lines = {}
    for file in files:
        with open(file, "rb") as handle:
            lines[f"sha256 {file.name}"] = hashlib.file_digest(handle, "sha256").hexdigest()
    return lines


def _kernels() -> dict[str, str]:
    """Which ops run as Triton kernels on this machine."""
    from fastcm import kernels

    rows = kernels.report()
    triton = [name for name, implementation, _ in rows if implementation == "triton"]
    if len(triton) == len(rows):
        return {"kernels": "triton for every op"}
    reasons = sorted({why for _, implementation, why in rows if implementation == "reference"})
    return {"kernels": f"triton: {', '.join(triton) or 'none'}; reference for the others ({'; '.join(reasons)})"}


def _short(value) -> str:
    """A value of a config on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
