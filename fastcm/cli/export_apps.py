"""The targets of `fastcm export` that are whole folders or programs: a web page, a model repository for a server, a C++ package."""

import argparse
from pathlib import Path

from fastcm.errors import InputError

TARGETS = ("web", "serving", "aot")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--web", metavar="DIR", help="a folder for any static web server: a page that draws in the browser")
    repository = "a model repository for Triton Inference Server; a model that is there already gets a new version"
    parser.add_argument("--serving", metavar="DIR", help=repository)
    package = "machine code for this kind of CPU: an AOTInductor package for C++, loaded in Python with --trust"
    parser.add_argument("--aot", metavar="OUT.pt2", help=package)
    parser.add_argument("--runtime", metavar="DIR", help="--web: the npm package onnxruntime-web (default: from node_modules)")


def wanted(args: argparse.Namespace) -> bool:
    """True where one of these targets was asked for; InputError where it cannot be had together with other options."""
    chosen = [f"--{name}" for name in TARGETS if getattr(args, name) is not None]
    if args.runtime is not None and args.web is None:
        raise InputError("an option of --web alone: --runtime. Give --web DIR, or leave it out.")
    if not chosen:
        return False
    others = [option for option, given in (("--onnx", args.onnx is not None), ("--tensorrt", args.tensorrt is not None)) if given]
    if len(chosen) + len(others) > 1:
        raise InputError(f"several targets at once in fastcm export: {', '.join([*chosen, *others])}. Give one of them.")
    fixed = [("--target", args.target), ("--profile", args.profile), ("--gpu", args.gpu)]
    if args.aot is None:
        fixed += [("--batch", args.batch)]
    else:
        precision = None if args.precision == "fp32" else args.precision
        fixed += [("--opset", args.opset), ("--optimize", args.optimize or None), ("--precision", precision)]
    if args.web is not None:
        fixed += [("--opset", args.opset), ("--factor", args.factor), ("--task", None if args.task == "generate" else args.task)]
        fixed += [("--uint8", args.uint8 or None), ("--seeded", args.seeded or None), ("--optimize", args.optimize or None)]
    for option, value in fixed:
        if value is not None:
            raise InputError(f"an option that {chosen[0]} decides itself: {option}. Leave it out.")
    return True


def run(args: argparse.Namespace) -> int:
    """Writes the target and says what was compared."""
    from fastcm import api

    denoiser, info = api.load_denoiser(args.model)
    targets = {"web": web, "serving": serving, "aot": aot}
    return next(write for name, write in targets.items() if getattr(args, name) is not None)(args, denoiser, info)


def web(args: argparse.Namespace, denoiser, info: dict) -> int:
    from fastcm.export.to_web import export_web

    runtime = None if args.runtime is None else Path(args.runtime)
    made = export_web(
        denoiser,
        info,
        out=Path(args.web),
        runtime=runtime,
        title=Path(args.model).resolve().stem,
        steps=args.steps,
        sigmas=args.sigmas,
        guidance=args.guidance,
        precision=args.precision,
    )
    for graph in made.graphs.values():
        compared(graph)
    print(f"{made.path} (onnxruntime-web {made.runtime}; look at it: python3 -m http.server 8000 --directory {made.path})")
    return 0


def serving(args: argparse.Namespace, denoiser, info: dict) -> int:
    from fastcm.export.triton_repository import export_serving

    names = ("steps", "sigmas", "guidance", "precision", "opset", "uint8", "task", "factor", "seeded", "optimize")
    options = {name: getattr(args, name) for name in names}
    name = Path(args.model).resolve()
    made = export_serving(denoiser, info, repository=Path(args.serving), name=name.name if name.is_dir() else name.stem, options=options)
    compared(made.exported)
    print(f"{made.path}, version {made.version} (serve it: tritonserver --model-repository {args.serving})")
    return 0


def aot(args: argparse.Namespace, denoiser, info: dict) -> int:
    from fastcm.export.to_aot import export_aot

    names = ("steps", "sigmas", "guidance", "batch", "uint8", "seeded", "task", "factor")
    made = export_aot(denoiser, info, out=Path(args.aot), **{name: getattr(args, name) for name in names})
    compared(made, "AOTInductor")
    print(f"{made.path} ({made.path.stat().st_size / 1e6:.1f} MB; runs beside this version of torch alone)")
    return 0


def compared(graph, runtime: str = "ONNX Runtime") -> None:
    """A graph's comparison with torch."""
    from fastcm.export.parity import table

    print(f"{graph.path.name} in {runtime} against torch, largest and mean difference of a pixel")
    print(*table(graph.comparisons, graph.contract.tolerance), sep="\n")
