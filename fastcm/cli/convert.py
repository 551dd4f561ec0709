"""`fastcm convert`: a model of anybody's format in, another format out. No code inside the source is executed."""

import argparse
from pathlib import Path

from fastcm.errors import InputError

FORMATS = ("fastcm", "diffusers", "openai")


def add(subparsers) -> None:
    parser = subparsers.add_parser("convert", help="read and write other people's model formats", description=__doc__)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a run or model folder, a diffusers folder, an OpenAI .pt (.pth, .ckpt, .bin, .safetensors) or an EDM .pkl",
    )
    parser.add_argument(
        "destination", metavar="DST", help="the folder, or .pt file, to write, which must not exist; or hf:owner/name, to upload"
    )
    parser.add_argument("--to", choices=FORMATS, help="openai where DST ends in .pt, otherwise fastcm by default")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels of an OpenAI .pt whose channel multipliers do not tell")
    parser.add_argument("--head-channels", type=int, metavar="N", help="width of an attention head in an OpenAI .pt (64)")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads of every layer, in place of --head-channels")
    parser.add_argument("--prediction", metavar="P", help="of a diffusion model without a scheduler: epsilon, v_prediction or sample")
    betas = "its chain: linear, scaled_linear or cosine of 1,000 steps, or as cosine:4000"
    parser.add_argument("--betas", metavar="B", help=betas)
    order = "of guided-diffusion's option of that name, which no key of a .pt shows"
    parser.add_argument("--new-attention-order", action="store_true", default=None, help=order)
    parser.add_argument(
        "--form", choices=("edm", "boundary"), help="preconditioning of an OpenAI .pt; edm for edm_*, else boundary by default"
    )

    parser.add_argument("--yes", action="store_true", help="upload to hf:owner/name, into a repository that only you see")
    parser.add_argument("--public", action="store_true", help="make the new repository of an upload public")


def run(args: argparse.Namespace) -> None:
    from fastcm.api import load_denoiser
    from fastcm.weights import hub, model_folder, openai

    if args.destination.startswith(hub.PREFIX):
        return upload(args)
    if args.yes or args.public:
        raise InputError(
            f"an option of uploads in --{'yes' if args.yes else 'public'}: {args.destination}. Leave it out, or give hf:owner/name."
        )
    destination = Path(args.destination)
    target = args.to or ("openai" if destination.suffix == ".pt" else "fastcm")
    if (destination.suffix == ".pt") != (target == "openai"):
        raise InputError(f"{target} as the format of DST: {destination}. An OpenAI checkpoint ends in .pt, other formats are folders.")
    if destination.exists():
        raise InputError(f"DST exists already: {destination}. Name a new one, or remove it first.")
    denoiser, info = load_denoiser(args.source, **openai_options(args))
    if target == "openai":
        openai.write_openai(destination, denoiser, info)
    elif target == "diffusers":
        from fastcm.weights.diffusers import write_diffusers

        write_diffusers(destination, denoiser, info)
    else:
        model_folder.save_model(destination, denoiser, info)
    print(_summary(denoiser, info, destination, target))


def openai_options(args: argparse.Namespace) -> dict:
    """What was said of a model that does not say it."""
    names = ("image_size", "head_channels", "heads", "form", "prediction", "betas", "new_attention_order")
    options = {name: getattr(args, name) for name in names}
    return {name: value for name, value in options.items() if value is not None}


def upload(args: argparse.Namespace) -> None:
    """To the hub, after --yes."""
    from fastcm.api import load_denoiser
    from fastcm.weights import hub

    destination, target = hub.hub_id(args.destination), args.to or "fastcm"
    if target == "openai":
        raise InputError(f"openai as the format of DST: {destination}. Upload as fastcm or diffusers.")
    denoiser, info = load_denoiser(args.source, **openai_options(args))
    if not args.yes:
        size = sum(parameter.numel() for parameter in denoiser.network.parameters()) * 4 / 1e6
        seen = "that everybody sees" if args.public else "that only you see"
        what = (
            f"{destination} would receive card, configuration and weights ({size:,.1f} MB, {target}), in a repository {seen} if it is new"
        )
        raise InputError(f"not confirmed in fastcm convert: {what}. Add --yes.")
    address = hub.push(denoiser, info, destination, form=target, public=args.public)
    print(f"{_summary(denoiser, info, destination, target)}\n{address}")


def _summary(denoiser, info: dict, destination: object, target: str) -> str:
    """One line on what was written; a second where the format cannot hold the noise range."""
    from fastcm.consistency.denoiser import Preconditioning

    parameters = sum(p.numel() for p in denoiser.network.parameters())
    classes = f", {len(info['classes'])} classes" if info.get("classes") else ""
    size = f"{info.get('resolution')}x{info.get('resolution')}x{info.get('channels')}"
    kind = getattr(denoiser.network, "kind", type(denoiser.network).__name__)
    line = f"{destination} ({target}): {kind}, {parameters:,} parameters, {size}{classes}, {denoiser.preconditioning.form} form"
    given, usual = denoiser.preconditioning, Preconditioning(form=denoiser.preconditioning.form)
    lost = [
        f"{name} {getattr(given, name)}"
        for name in ("sigma_min", "sigma_max", "sigma_data", "rho", "transition")
        if getattr(given, name) != getattr(usual, name)
    ]
    return f"{line}\nnote: a .pt file does not hold {', '.join(lost)}; keep them beside it" if target == "openai" and lost else line
