"""`fastcm export`: a model as one ONNX file, checked against torch before it is written, and as what is built around such a file."""

import argparse
import re
from pathlib import Path

from fastcm.cli import export_apps
from fastcm.cli.sample import sigma_list
from fastcm.errors import InputError


def add(subparsers) -> None:
    parser = subparsers.add_parser("export", help="write a checked ONNX file", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run or model folder, a diffusers folder, an OpenAI .pt or an EDM .pkl")
    parser.add_argument("--onnx", nargs="?", const=True, metavar="OUT.onnx", help="the file to write; MODEL/model.onnx without a value")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--steps", type=int, metavar="K", help="network calls in the graph (default: 1; with --task: 4)")
    group.add_argument("--sigmas", type=sigma_list, metavar="LIST", help="the graph's noise levels, from high to low, as 80,0.8")
    weight = "the guidance weight of a student that was trained for several (default: the middle of them)"
    parser.add_argument("--guidance", type=float, metavar="W", help=weight)
    parser.add_argument("--precision", default="fp32", help="fp32 (default), or fp16: half inside, inputs and outputs fp32")
    runtimes = "the runtime: ort (ONNX Runtime, the default), tensorrt (the default with --tensorrt), web (WebGPU) or mobile (MNN, ncnn)"
    parser.add_argument("--target", default=None, help=runtimes)
    parser.add_argument("--opset", type=int, metavar="N", help="the operator set: 18 (default) to 20, for tensorrt 18 to 23 (21)")
    parser.add_argument("--batch", type=int, metavar="N", help="a fixed number of images (default: any)")
    parser.add_argument("--uint8", action="store_true", help="images as uint8 [batch, H, W, C], not float32 [batch, C, H, W] in [-1, 1]")
    parser.add_argument("--seeded", action="store_true", help="seeds in the place of noise: the same images as fastcm, on CPUs alone")
    fusions = "apply ONNX Runtime's own fusions, where they change nothing; the graph then needs ONNX Runtime"
    parser.add_argument("--optimize", action="store_true", help=fusions)
    parser.add_argument("--task", default="generate", help="generate (default), an edit: inpaint, superres; or denoise: D(x, sigma)")
    engine = "build an engine: with --gpu on any machine, without on one with a GPU; elsewhere write the commands that build it"
    parser.add_argument("--tensorrt", metavar="OUT.plan", help=engine)
    cards = "--tensorrt: build for these cards by TensorRT for RTX: rtx50, rtx40, rtx30, rtx20, a100-class, sm_NN; or current"
    parser.add_argument("--gpu", metavar="LIST", help=cards)
    parser.add_argument("--profile", type=batch_list, metavar="MIN,OPT,MAX", help="the engine's batches (default: 1,4,16)")
    parser.add_argument("--factor", type=int, metavar="P", help="superres: the enlargement (default: 4)")
    export_apps.add_options(parser)


def batch_list(text: str) -> tuple[int, ...]:
    """`1,4,16` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"not a profile in --profile: {text}. Write it as MIN,OPT,MAX, as 1,4,16.") from None


def output_path(onnx: str | bool | None, model: Path, plan: str | None = None) -> Path:
    """Where the file goes: --onnx's value, else (True) model.onnx in the model's folder or beside its file, or beside the plan.

    A built-in model's file goes to the current folder.
    """
    if plan is not None and onnx in (None, True):
        return Path(plan).with_suffix(".onnx")
    if onnx is None:
        raise InputError("nothing to write in fastcm export: no target. Give --onnx [OUT.onnx].")
    if onnx is not True:
        path = Path(onnx)
        if path.suffix != ".onnx":
            raise InputError(f"unknown kind of file in --onnx: {onnx}. Give a name that ends in .onnx.")
        return path
    if not model.exists():  # a name of elsewhere
        return Path(f"{re.split('[@:]', model.name)[0]}.onnx")
    return model / "model.onnx" if model.is_dir() else model.with_suffix(".onnx")


def run(args: argparse.Namespace) -> int:
    if export_apps.wanted(args):
        return export_apps.run(args)

    from fastcm import api

    out = output_path(args.onnx, Path(args.model), args.tensorrt)
    plan = None if args.tensorrt is None else Path(args.tensorrt)
    if plan is not None and plan.suffix not in (".plan", ".engine"):
        raise InputError(f"unknown kind of file in --tensorrt: {plan}. Give a name that ends in .plan.")
    if plan is None and args.profile is not None:
        raise InputError("an option of --tensorrt alone: --profile. Give --tensorrt OUT.plan, or leave it out.")
    if plan is None and args.gpu is not None:
        raise InputError("an option of --tensorrt alone: --gpu. Give --tensorrt OUT.plan, or leave it out.")
    target = args.target or ("ort" if plan is None else "tensorrt")

    from fastcm.export import gpus, to_onnx, to_tensorrt
    from fastcm.export.parity import VARIATION, table
    from fastcm.generation import tensorrt_bindings

    cards = None
    if args.gpu is not None:
        cards = gpus.capabilities(args.gpu.split(",")) or (gpus.current_capability(),)
        tensorrt_bindings.bindings(tensorrt_bindings.RTX)  # what is missing is said before the export, which takes longer
    denoiser, info = api.load_denoiser(args.model)
    batches = to_tensorrt.profile(args.profile, args.batch)
    exported = to_onnx.export_onnx(
        denoiser,
        info,
        out=out,
        steps=args.steps,
        sigmas=args.sigmas,
        guidance=args.guidance,
        precision=args.precision,
        target=target,
        opset=args.opset,
        batch=args.batch,
        uint8=args.uint8,
        task=args.task,
        factor=args.factor,
        seeded=args.seeded,
        optimize=args.optimize,
    )
    print("ONNX Runtime against torch, largest and mean difference of a pixel" + (" in levels of 255" if args.uint8 else " in [-1, 1]"))
    print(*table(exported.comparisons, exported.contract.tolerance), sep="\n")
    if exported.variation < VARIATION:
        print(f"note: pixels vary by {exported.variation:.2g} between seeds, so this comparison says little. Is the model trained?")
    sigmas = ",".join(f"{sigma:g}" for sigma in exported.sigmas) or "an input"
    size = exported.path.stat().st_size / 1e6
    print(f"{exported.path} ({size:.1f} MB, opset {exported.opset} for {exported.target}, {args.precision}, sigmas {sigmas})")
    if exported.fusion is not None:
        change = "kept" if exported.fusion.kept else "not kept"
        print(f"ONNX Runtime's fusions: {exported.fusion.nodes_before} nodes to {exported.fusion.nodes_after}, {change}")
    if plan is not None:
        engine(exported, plan, batches, cards)
    return 0


def engine(exported, plan: Path, batches, cards) -> None:
    """The engine itself, or the script that builds it. cards: compute capabilities for TensorRT for RTX, None for TensorRT on this one."""
    from tqdm import tqdm

    from fastcm.export import gpus, to_tensorrt
    from fastcm.export.parity import table
    from fastcm.generation.tensorrt_bindings import DATACENTER, RTX, RUNTIMES

    if cards is None and not to_tensorrt.can_build():
        script = to_tensorrt.write_commands(exported, plan, batches)
        remedy = "run it beside the .onnx on a machine that has both, or build here for an RTX card: --gpu rtx50"
        print(f"{script} (no TensorRT or no GPU here: {remedy})")
        return
    kind = DATACENTER if cards is None else RTX
    with tqdm(bar_format="{desc} {elapsed}", disable=None) as bar:  # a terminal's alone
        progress = lambda phase: bar.set_description_str(f"{RUNTIMES[kind].name}: {phase}")  # noqa: E731
        built = to_tensorrt.build_engine(exported, plan, batches, kind=kind, capabilities=cards, progress=progress)
    if built.comparisons is not None:
        print(f"{RUNTIMES[kind].name} against torch", *table(built.comparisons, exported.contract.tolerance), sep="\n")
    size, names = built.path.stat().st_size / 1e6, ", ".join(gpus.sm(capability) for capability in built.capabilities)
    unseen = "" if built.comparisons is not None else "; its images are compared where it first runs"
    print(f"{built.path} ({size:.1f} MB, {built.layers} layers, for {names}, batches {', '.join(map(str, batches))}{unseen})")
