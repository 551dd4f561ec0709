"""`fastcm export`: a model as one ONNX file, checked against torch before it is written."""

import argparse
from pathlib import Path

from fastcm.cli.sample import sigma_list
from fastcm.errors import InputError


def add(subparsers) -> None:
    parser = subparsers.add_parser("export", help="write a checked ONNX file", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run or model folder, a diffusers folder, an OpenAI .pt or an EDM .pkl")
    parser.add_argument("--onnx", nargs="?", const="", metavar="OUT.onnx", help="the file to write; MODEL/model.onnx without a value")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--steps", type=int, metavar="K", help="network calls in the graph (default: 1)")
    group.add_argument("--sigmas", type=sigma_list, metavar="LIST", help="the graph's noise levels, from high to low, as 80,0.8")
    parser.add_argument("--uint8", action="store_true", help="images as uint8 [batch, H, W, C], not float32 [batch, C, H, W] in [-1, 1]")
    parser.add_argument("--opset", type=int, metavar="N", help="the operator set, 18 to 23 (default: 18)")


def output_path(onnx: str | None, model: Path) -> Path:
    """Where the file goes: --onnx's value, else model.onnx in the model's folder or beside its file."""
    if onnx is None:
        raise InputError("nothing to write in fastcm export: no target. Give --onnx [OUT.onnx].")
    if onnx:
        path = Path(onnx)
        if path.suffix != ".onnx":
            raise InputError(f"unknown kind of file in --onnx: {onnx}. Give a name that ends in .onnx.")
        return path
    return model / "model.onnx" if model.is_dir() else model.with_suffix(".onnx")


def run(args: argparse.Namespace) -> int:
    from fastcm import api

    out = output_path(args.onnx, Path(args.model))
    denoiser, info = api.load_denoiser(args.model)

    from fastcm.export import to_onnx
    from fastcm.export.parity import table

    exported = to_onnx.export_onnx(
        denoiser, info, out=out, steps=args.steps, sigmas=args.sigmas, uint8=args.uint8, opset=args.opset or to_onnx.OPSET
    )
    print("ONNX Runtime against torch, largest and mean difference of a pixel" + (" in levels of 255" if args.uint8 else " in [-1, 1]"))
    print(*table(exported.comparisons, exported.tolerance), sep="\n")
    if exported.variation < to_onnx.VARIATION:
        print(f"note: pixels vary by {exported.variation:.2g} between seeds, so this comparison says little. Is the model trained?")
    sigmas = ",".join(f"{sigma:g}" for sigma in exported.sigmas)
    print(f"{exported.path} ({exported.path.stat().st_size / 1e6:.1f} MB, opset {exported.opset}, sigmas {sigmas})")
    return 0
