"""`fastcm edit`: zero-shot editing of a picture with a consistency model."""

import argparse
import sys
from pathlib import Path

from fastcm.cli.sample import label_list, number_list, seed_list
from fastcm.errors import ARRAY_FILE_ERRORS, InputError

TASKS = {
    "inpaint": "generate the white part of a mask, or a box",
    "colorize": "colours for the luminance of a picture",
    "superres": "details for a picture of 1/P the size",
    "stroke": "a picture from a rough painting",
    "interpolate": "the way from one seed's picture to another's: a strip and a GIF",
    "denoise": "one call on a picture with noise of --sigma",
}
PICTURED = tuple(task for task in TASKS if task != "interpolate")
# The options that not every task takes.
TAKEN_BY = {
    "image": PICTURED,
    "mask": ("inpaint",),
    "box": ("inpaint",),
    "factor": ("superres",),
    "sigma": ("denoise", "stroke"),
    "sigmas": ("inpaint", "colorize", "superres", "stroke"),
    "frames": ("interpolate",),
    "seeds": tuple(task for task in TASKS if task != "denoise"),
}
NEEDED = {**dict.fromkeys(PICTURED, ("image",)), "denoise": ("image", "sigma"), "interpolate": ()}
FACTOR = 4


def add(subparsers) -> None:
    lines = "\n".join(f"  {name:12}{text}" for name, text in TASKS.items())
    parser = subparsers.add_parser("edit", help="edit a picture with a model", description=f"{__doc__}\n\n{lines}")
    parser.add_argument("task", metavar="TASK", choices=tuple(TASKS), help=", ".join(TASKS))
    parser.add_argument("model", metavar="MODEL", help="a run, model or diffusers folder, an OpenAI .pt, an EDM .pkl, an .onnx of the task")
    image = "the picture, scaled to the model's size and cut to the centre square; denoise: or float [H, W, C] in [-1, 1] as .npy"
    parser.add_argument("--image", metavar="FILE", type=Path, help=image)
    where = parser.add_mutually_exclusive_group()
    white = "inpaint: white (128 or more) is generated; no transparency; the picture's or model's size"
    where.add_argument("--mask", metavar="FILE", type=Path, help=white)
    where.add_argument("--box", metavar="X0,Y0,X1,Y1", type=box, help="inpaint: the rectangle to generate, in the model's pixels")
    parser.add_argument("--factor", metavar="P", type=int, help=f"superres: the enlargement (default: {FACTOR})")
    parser.add_argument("--sigma", metavar="S", type=float, help="denoise: the noise, in [-1, 1] units; stroke: the first level (5.38)")
    parser.add_argument("--sigmas", metavar="LIST", type=number_list("--sigmas"), help="the levels to visit (default: the paper's grid)")
    parser.add_argument("--frames", metavar="N", type=int, help="interpolate: pictures on the way (default: 16)")
    classes = "classes by number or name, quoted as in CSV; omitted: seed mod classes"
    parser.add_argument("--labels", metavar="LIST", type=label_list, help=classes)
    parser.add_argument("--seeds", metavar="LIST", type=seed_list, help="one picture each (default: 0; interpolate: 0,1)")
    parser.add_argument("--provider", default="auto", help="for .onnx: auto (default), cpu, cuda, tensorrt or tensorrt-rtx")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto (default: bf16 on CUDA, else fp32), fp32, bf16 or fp16")
    parser.add_argument("--trust", action="store_true", help="load files that hold programs")
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
    generator = api.load(args.model, device=args.device, precision=args.precision, provider=args.provider, trust=args.trust)
    if not hasattr(generator, args.task):
        other = f"Export it with --task {args.task}, or edit" if args.task in ("inpaint", "superres") else "Edit"
        raise InputError(f"no {args.task} in an exported graph in MODEL: {args.model}. {other} with the folder that it was exported from.")
    if args.task == "interpolate":
        return interpolate(args, generator, args.labels, out)
    shown, images = edited(args, generator, args.labels)
    return write(args, generator, args.labels, out, shown, images)


def check(args: argparse.Namespace) -> None:
    """What a task needs, and what it does not take."""
    for name in NEEDED[args.task]:
        if getattr(args, name) is None:
            raise InputError(f"missing option for {args.task}: --{name}. See fastcm edit --help.")
    if args.task == "inpaint" and args.mask is None and args.box is None:
        raise InputError("missing option for inpaint: --mask or --box. See fastcm edit --help.")
    for name, tasks in TAKEN_BY.items():
        if getattr(args, name) is not None and args.task not in tasks:
            raise InputError(f"an option that {args.task} does not take: --{name}. It is for {', '.join(tasks)}.")
    if args.sigma is not None and args.sigmas is not None:
        raise InputError("two options that exclude each other: --sigma and --sigmas. Give one of them.")


def edited(args: argparse.Namespace, generator, labels):
    """Returns ({caption: what the model was shown, uint8 [H, W, C]}, images uint8 [N, H, W, C])."""
    import numpy as np
    from tqdm import tqdm

    from fastcm.generation.editing import EDIT_GRID_STEPS, STROKE_SIGMAS
    from fastcm.generation.editing_tasks import EditingTasks

    picture = load_picture(args, generator)
    if args.task == "denoise":
        seen = picture if picture.dtype == np.uint8 else ((picture + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
        return {"noisy": seen}, generator.denoise(picture, args.sigma, labels)
    seeds, sigmas = args.seeds or [0], args.sigmas
    if args.task == "stroke" and sigmas is None:
        sigmas = STROKE_SIGMAS if args.sigma is None else [args.sigma, *(sigma for sigma in STROKE_SIGMAS[1:] if sigma < args.sigma)]
    options = {} if sigmas is None else {"sigmas": sigmas}
    calls = len(seeds) * (EDIT_GRID_STEPS - 1 if sigmas is None else len(sigmas))
    tells = isinstance(generator, EditingTasks)  # a graph makes all its calls in one
    with tqdm(total=calls, unit="call", disable=not (tells and sys.stderr.isatty()), leave=False) as bar:
        if tells:
            options["progress"] = bar.update
        if args.task == "inpaint":
            mask = load_mask(args, generator)
            known = np.where(mask[..., None] >= 128, np.uint8(128), picture)
            return {"picture": picture, "known": known}, generator.inpaint(picture, mask, seeds, labels, **options)
        if args.task == "colorize":
            colours = {} if read_header(args.image, "--image").is_grey else {"picture": load_picture(args, generator, channels=3)}
            return {**colours, "grey": picture}, generator.colorize(picture, seeds, labels, **options)
        if args.task == "superres":
            factor = factor_of(args, generator)
            images = generator.superres(picture, factor, seeds, labels, **options)
            means = shrunk(picture, factor, generator.resolution)
            return {"picture": picture, "means": means} if picture.shape == means.shape else {"picture": means}, images
        return {"painting": picture}, generator.stroke(picture, seeds, labels, **options)


def load_picture(args: argparse.Namespace, generator, *, channels: int | None = None):
    """The picture by the project's rule for files, uint8 [H, W, C] at the model's resolution (superres: or 1/P of it).

    channels: 3 for its colours where the task takes it without.
    """
    from fastcm import api

    if args.task == "denoise" and args.image.suffix.lower() == ".npy":
        return load_array(args.image)
    resolution, factor = generator.resolution, factor_of(args, generator)
    header = read_header(args.image, "--image")
    if header.is_grey and generator.channels > 1 and args.task != "colorize":
        raise InputError(f"greyscale for a colour model in --image: {args.image}. Colour it first: fastcm edit colorize.")
    if args.task == "superres" and factor > 0 and header.width == header.height == resolution // factor:
        resolution //= factor
    channels = channels or (1 if args.task == "colorize" else generator.channels)
    return api.picture(args.image, resolution=resolution, channels=channels, name="--image")


def factor_of(args: argparse.Namespace, generator) -> int:
    """The enlargement as given, else the graph's own, else the default."""
    own = getattr(getattr(generator, "contract", None), "factor", None)
    return next(factor for factor in (args.factor, own, FACTOR) if factor is not None)


def load_array(path: Path):
    """Pixels that no picture file can hold: noise that passes the ends of [-1, 1], float [H, W, C]."""
    import numpy as np

    if not path.is_file():
        raise InputError(f"no such file in --image: {path}. Give a picture, or float pixels as .npy.")
    try:
        pixels = np.load(path, allow_pickle=False)
    except ARRAY_FILE_ERRORS as error:
        raise InputError(f"unreadable array in --image: {path}: {' '.join(str(error).split())}. Save it with numpy.save.") from None
    if not (isinstance(pixels, np.ndarray) and pixels.ndim == 3 and np.issubdtype(pixels.dtype, np.floating)):
        raise InputError(f"wrong form of array in --image: {path}. Give float [H, W, C] in units of [-1, 1].")
    return pixels


def load_mask(args: argparse.Namespace, generator):
    """uint8 [H, W] at the model's resolution, 255 where pixels are generated."""
    import numpy as np

    from fastcm import api
    from fastcm.data.decoding import is_transparent

    resolution = generator.resolution
    if args.box is not None:
        left, top, right, bottom = args.box
        if right > resolution or bottom > resolution:
            raise InputError(f"a rectangle outside the picture in --box: {left},{top},{right},{bottom}. The model has {resolution} pixels.")
        mask = np.zeros((resolution, resolution), np.uint8)
        mask[top:bottom, left:right] = 255
        return mask
    (width, height), own = (read_header(path, name)[:2] for path, name in ((args.image, "--image"), (args.mask, "--mask")))
    if own not in ((width, height), (resolution, resolution)):
        want = f"{width}x{height} as --image, or {resolution}x{resolution}"
        raise InputError(f"another size in --mask: {args.mask} has {own[0]}x{own[1]}. Make it {want}.")
    if is_transparent(args.mask):
        what = f"a mask with transparency in --mask: {args.mask}"
        raise InputError(f"{what}. Save it without an alpha channel: white is generated, black kept.")
    return api.picture(args.mask, resolution=resolution, channels=1, name="--mask")[..., 0]


def read_header(path: Path, option: str):
    """Width, height and greyness of a picture file."""
    from fastcm.data import decoding

    if not path.is_file():
        raise InputError(f"no such file in {option}: {path}. Give a picture.")
    try:
        return decoding.read_header(path)
    except decoding.BadImageError as error:
        raise InputError(f"unreadable picture in {option}: {path}: {error}. Save it again.") from None


def shrunk(picture, factor: int, resolution: int):
    """The patch means that super-resolution starts from, shown at the model's resolution."""
    import numpy as np

    if picture.shape[0] == resolution:
        height, width, channels = picture.shape
        patches = picture.reshape(height // factor, factor, width // factor, factor, channels)
        picture = patches.mean(axis=(1, 3)).round().astype(np.uint8)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def facts(args: argparse.Namespace, seeds: list[int] | None, labels) -> dict[str, str]:
    """What the files record of how they were made."""
    text = {"fastcm:model": Path(args.model).name, "fastcm:task": args.task}
    levels = args.sigmas or ([] if args.sigma is None else [args.sigma])
    for name, values in (("sigmas", [f"{level:g}" for level in levels]), ("seeds", seeds), ("labels", labels)):
        if values is not None and len(values):
            text[f"fastcm:{name}"] = ",".join(map(str, values))
    return text


def write(args: argparse.Namespace, generator, labels, out: Path, shown: dict, images) -> int:
    """One PNG per seed at the model's resolution, and the comparison beside it."""
    import numpy as np

    from fastcm.generation import pictures
    from fastcm.generation.request import label_array, seed_array

    seeds = args.seeds or [0]
    classes = label_array(labels, seed_array(seeds), generator.classes)
    told = None if args.task == "denoise" else seeds  # denoise draws nothing
    for index, image in enumerate(images):
        name = out if len(images) == 1 else out.with_name(f"{out.stem}-{seeds[index]}{out.suffix}")
        text = facts(args, told and told[index : index + 1], None if classes is None else classes[index : index + 1])
        pictures.save_png(name, pictures.to_pil(image), text=text)
        print(name)
    tiles = [tile.repeat(images.shape[-1] // tile.shape[-1], axis=-1)[None] for tile in shown.values()]
    captions = [*shown, *(["result"] if told is None else [f"seed {seed}" for seed in seeds])]
    compare = out.with_name(f"{out.stem}-compare.png")
    sheet = pictures.grid(np.concatenate([*tiles, images]), columns=min(8, len(captions)), captions=captions)
    pictures.save_png(compare, sheet, text=facts(args, told, classes))
    print(compare)
    return 0


def interpolate(args: argparse.Namespace, generator, labels, out: Path) -> int:
    """A strip at the model's resolution, one that is easy to see, and a GIF that goes there and back."""
    import numpy as np

    from fastcm.generation import pictures
    from fastcm.generation.editing_tasks import FRAMES
    from fastcm.generation.request import label_array, seed_array

    seeds = args.seeds or [0, 1]
    count = FRAMES if args.frames is None else args.frames
    images = generator.interpolate(seeds, labels, frames=count)
    text = facts(args, seeds, label_array(labels, seed_array(seeds[:1]), generator.classes))
    pictures.save_png(out, pictures.to_pil(np.concatenate(list(images), axis=1)), text=text)
    # A frame that is a seed's own picture says so; the frames are evenly spaced.
    places = [index * (len(seeds) - 1) / (count - 1) for index in range(count)]
    captions = [f"seed {seeds[int(place)]}" if place.is_integer() else "" for place in places]
    compare = out.with_name(f"{out.stem}-compare.png")
    pictures.save_png(compare, pictures.grid(images, columns=min(8, count), captions=captions), text=text)
    frames = [pictures.enlarged(pictures.to_pil(image), readable=128) for image in images]
    pictures.save_gif(out.with_suffix(".gif"), [*frames, *frames[-2:0:-1]], text=text)
    print(out, compare, out.with_suffix(".gif"), sep="\n")
    return 0
