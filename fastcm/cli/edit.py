"""`fastcm edit`: zero-shot editing of a picture with a consistency model."""

import argparse
from pathlib import Path

from fastcm.cli.sample import seed_list, sigma_list
from fastcm.errors import InputError

TASKS = {
    "inpaint": "generate the white part of a mask, or a box",
    "colorize": "colours for the luminance of a picture",
    "superres": "details for a picture of 1/P the size",
    "stroke": "a picture from a rough painting",
    "interpolate": "the way from one seed's picture to another's",
    "denoise": "one call on a picture with noise of --sigma",
}


def add(subparsers) -> None:
    lines = "\n".join(f"  {name:12}{text}" for name, text in TASKS.items())
    parser = subparsers.add_parser("edit", help="edit a picture with a model", description=f"{__doc__}\n\n{lines}")
    parser.add_argument("task", metavar="TASK", choices=tuple(TASKS), help=", ".join(TASKS))
    parser.add_argument("model", metavar="MODEL", help="a run, model or diffusers folder, an OpenAI .pt or an EDM .pkl")
    parser.add_argument("--image", metavar="FILE", type=Path, help="the picture, scaled to the model's size and cut to the centre square")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--mask", metavar="FILE", type=Path, help="inpaint: white (128 or more) is generated; the picture's or model's size")
    where.add_argument("--box", metavar="X0,Y0,X1,Y1", type=box, help="inpaint: the rectangle to generate, in the model's pixels")
    parser.add_argument("--factor", metavar="P", type=int, default=4, help="superres: the enlargement (default: 4)")
    parser.add_argument("--sigma", metavar="S", type=float, help="denoise: the noise, in [-1, 1] units; stroke: the first level (5.38)")
    parser.add_argument("--sigmas", metavar="LIST", type=sigma_list, help="the noise levels to visit (default: the paper's grid)")
    parser.add_argument("--frames", metavar="N", type=int, default=16, help="interpolate: pictures on the way (default: 16)")
    parser.add_argument("--labels", metavar="LIST", help="classes by number or name; omitted: seed mod classes")
    parser.add_argument("--seeds", metavar="LIST", type=seed_list, help="one picture each (default: 0; interpolate: 0,1)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto (default: bf16 on CUDA, else fp32), fp32, bf16 or fp16")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="the picture (default: TASK.png; for several seeds FILE-SEED.png)")


def box(text: str) -> tuple[int, int, int, int]:
    """`2,3,6,8` as numbers."""
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"not a rectangle in --box: {text}. Write it as X0,Y0,X1,Y1 in pixels.") from None
    if not (0 <= left < right and 0 <= top < bottom):
        raise InputError(f"empty rectangle in --box: {text}. X0 must be below X1 and Y0 below Y1.")
    return left, top, right, bottom


def run(args: argparse.Namespace) -> int:
    from fastcm import api

    out = args.out or Path(f"{args.task}.png")
    if out.suffix.lower() != ".png":
        raise InputError(f"unknown kind of file in --out: {out}. Give a name that ends in .png.")
    check(args)
    generator = api.load(args.model, device=args.device, precision=args.precision)
    if not hasattr(generator, "inpaint"):
        raise InputError(f"an exported graph in MODEL: {args.model}. Edit with the folder that it was exported from.")
    labels = None if args.labels is None else args.labels.split(",")
    if args.task == "interpolate":
        return interpolate(args, generator, labels, out)
    shown, images = edited(args, generator, labels)
    seeds = [None] if args.task == "denoise" else args.seeds or [0]
    return write(args, out, shown, images, seeds)


def check(args: argparse.Namespace) -> None:
    """What a task needs, and what it does not take."""
    needs = {"inpaint": ["image"], "interpolate": [], "denoise": ["image", "sigma"]}.get(args.task, ["image"])
    for name in needs:
        if getattr(args, name) is None:
            raise InputError(f"missing option for {args.task}: --{name}. See fastcm edit --help.")
    if args.task == "inpaint" and args.mask is None and args.box is None:
        raise InputError("missing option for inpaint: --mask or --box. See fastcm edit --help.")
    takes = {"mask": ["inpaint"], "box": ["inpaint"], "sigma": ["denoise", "stroke"]}
    takes["image"] = [task for task in TASKS if task != "interpolate"]
    takes["sigmas"] = [task for task in takes["image"] if task != "denoise"]
    for name, tasks in takes.items():
        if getattr(args, name) is not None and args.task not in tasks:
            raise InputError(f"an option that {args.task} does not take: --{name}. It is for {', '.join(tasks)}.")


def edited(args: argparse.Namespace, generator, labels):
    """Returns (what the model was shown uint8 [H, W, C], images uint8 [N, H, W, C])."""
    import numpy as np

    seeds = args.seeds or [0]
    options = {} if args.sigmas is None else {"sigmas": args.sigmas}
    picture = load_picture(args, generator)
    if args.task == "inpaint":
        mask = load_mask(args, generator)
        images = generator.inpaint(picture, mask, seeds, labels, **options)
        return np.where(mask[..., None] >= 128, np.uint8(128), picture), images
    if args.task == "colorize":
        return picture, generator.colorize(picture, seeds, labels, **options)
    if args.task == "superres":
        images = generator.superres(picture, args.factor, seeds, labels, **options)
        return shrunk(picture, args.factor, generator.resolution), images
    if args.task == "stroke":
        if args.sigma is not None:
            second = [sigma for sigma in (2.24,) if sigma < args.sigma]
            options = {"sigmas": [args.sigma, *second]}
        return picture, generator.stroke(picture, seeds, labels, **options)
    return picture, generator.denoise(picture, args.sigma, labels)


def load_picture(args: argparse.Namespace, generator):
    """The picture by the project's rule for files, uint8 [H, W, C] at the model's resolution (superres: or 1/P of it)."""
    from fastcm.training.image_decoding import BadImageError, decode, read_header

    if not args.image.is_file():
        raise InputError(f"no such file in --image: {args.image}. Give a picture.")
    resolution = generator.resolution
    try:
        header = read_header(args.image)
        if header.is_grey and generator.channels == 3 and args.task != "colorize":
            raise InputError(f"greyscale for a colour model in --image: {args.image}. Colour it first: fastcm edit colorize.")
        if args.task == "superres" and args.factor > 0 and header.width == header.height == resolution // args.factor:
            resolution //= args.factor
        return decode(args.image, resolution=resolution, grey=generator.channels == 1 or args.task == "colorize").transpose(1, 2, 0)
    except BadImageError as error:
        raise InputError(f"unreadable picture in --image: {args.image}: {error}. Save it again.") from None


def load_mask(args: argparse.Namespace, generator):
    """uint8 [H, W] at the model's resolution, 255 where pixels are generated."""
    import numpy as np

    from fastcm.training.image_decoding import BadImageError, decode, read_header

    resolution = generator.resolution
    if args.box is not None:
        left, top, right, bottom = args.box
        if right > resolution or bottom > resolution:
            raise InputError(f"a rectangle outside the picture in --box: {left},{top},{right},{bottom}. The model has {resolution} pixels.")
        mask = np.zeros((resolution, resolution), np.uint8)
        mask[top:bottom, left:right] = 255
        return mask
    if not args.mask.is_file():
        raise InputError(f"no such file in --mask: {args.mask}. Give a black and white picture.")
    try:
        sizes = [(header.width, header.height) for header in map(read_header, (args.mask, args.image))]
        if sizes[0] not in (sizes[1], (resolution, resolution)):
            want = f"{sizes[1][0]}x{sizes[1][1]} as --image, or {resolution}x{resolution}"
            raise InputError(f"another size in --mask: {args.mask} has {sizes[0][0]}x{sizes[0][1]}. Make it {want}.")
        return decode(args.mask, resolution=resolution, grey=True)[0]
    except BadImageError as error:
        raise InputError(f"unreadable picture in --mask: {args.mask}: {error}. Save it again.") from None


def shrunk(picture, factor: int, resolution: int):
    """The patch means that super-resolution starts from, shown at the model's resolution."""
    import numpy as np

    if picture.shape[0] == resolution:
        height, width, channels = picture.shape
        patches = picture.reshape(height // factor, factor, width // factor, factor, channels)
        picture = patches.mean(axis=(1, 3)).round().astype(np.uint8)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def write(args: argparse.Namespace, out: Path, shown, images, seeds: list) -> int:
    """One PNG per seed at the model's resolution, and the comparison beside it."""
    import numpy as np

    from fastcm.generation import pictures

    facts = {"fastcm:model": Path(args.model).name, "fastcm:task": args.task}
    for seed, image in zip(seeds, images, strict=True):
        name = out if len(images) == 1 else out.with_name(f"{out.stem}-{seed}{out.suffix}")
        text = facts if seed is None else {**facts, "fastcm:seeds": str(seed)}
        pictures.save_png(name, pictures.to_pil(image), text=text)
        print(name)
    if shown.shape[-1] != images.shape[-1]:
        shown = shown.repeat(images.shape[-1], axis=-1)
    captions = ["input", *("result" if seed is None else f"seed {seed}" for seed in seeds)]
    compare = out.with_name(f"{out.stem}-compare.png")
    sheet = pictures.grid(np.concatenate([shown[None], images]), columns=min(8, len(images) + 1), captions=captions)
    pictures.save_png(compare, sheet, text=facts)
    print(compare)
    return 0


def interpolate(args: argparse.Namespace, generator, labels, out: Path) -> int:
    """A strip at the model's resolution and a GIF that goes there and back, tiny pictures enlarged."""
    import numpy as np

    from fastcm.generation import pictures

    seeds = args.seeds or [0, 1]
    images = generator.interpolate(seeds, labels, frames=args.frames)
    text = {"fastcm:model": Path(args.model).name, "fastcm:task": "interpolate", "fastcm:seeds": ",".join(map(str, seeds))}
    pictures.save_png(out, pictures.to_pil(np.concatenate(list(images), axis=1)), text=text)
    frames = [pictures.enlarged(pictures.to_pil(image), readable=128) for image in images]
    pictures.save_gif(out.with_suffix(".gif"), [*frames, *frames[-2:0:-1]])
    print(out, out.with_suffix(".gif"), sep="\n")
    return 0
