"""`fastcm sample`: pictures of given seeds from a model or an exported file."""

import argparse
import csv
import sys
import time
from pathlib import Path

from fastcm.errors import InputError

DEFAULT_SEEDS, REPORT_SEEDS = "0-63", "0-7"
MOST_IN_A_GRID = 4096
# A report has a column per class up to so many, and a caption under each picture beyond.
MOST_COLUMNS = 16
GRID = 40


def add(subparsers) -> None:
    parser = subparsers.add_parser("sample", help="draw pictures from a model", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run, model or diffusers folder, an .onnx, an OpenAI .pt or an EDM .pkl")
    seeds = f"as 0-63, or 1,5,9-12 (default: {DEFAULT_SEEDS}; in a report by class {REPORT_SEEDS})"
    parser.add_argument("--seeds", type=seed_list, metavar="LIST", help=seeds)
    classes = "classes by number or name, quoted as in CSV, cycled over the seeds; all crosses them; omitted: seed mod classes"
    parser.add_argument("--labels", metavar="LIST", type=label_list, help=classes)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--steps", type=int, metavar="K", help="network calls per picture (default: 1)")
    levels = "the noise levels to visit, from high to low, as 80,0.8"
    group.add_argument("--sigmas", type=number_list("--sigmas"), metavar="LIST", help=levels)
    group.add_argument("--timesteps", type=timestep_list, metavar="LIST", help="the levels as published timesteps of --grid, as 0,22,39")
    parser.add_argument("--grid", type=int, metavar="N", help=f"the number of levels that --timesteps count (default: {GRID})")
    parser.add_argument("--sampler", help="consistency; for diffusion teachers heun (their default), euler, dpm, ancestral, ddim")
    churn = "heun and dpm: S_churn, or S_churn,S_tmin,S_tmax,S_noise (default: 0)"
    parser.add_argument("--churn", type=number_list("--churn"), metavar="LIST", help=churn)
    add_guidance(parser)
    parser.add_argument("--provider", default="auto", help="for .onnx: auto (default), cpu, cuda, tensorrt or tensorrt-rtx")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto (default: bf16 on CUDA, else fp32), fp32, bf16 or fp16")
    parser.add_argument("--report", action="store_true", help="a labelled PNG: seeds by classes, or a caption under each picture")
    parser.add_argument("--out", metavar="FILE", help="x.png: a grid; x.npz: arr_0, arr_1; DIR/: a PNG per seed (NAME-samples.png)")
    parser.add_argument("--trust", action="store_true", help="load files that hold programs")


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """Guidance of what is drawn."""
    weight = "guidance weight of a diffusion teacher, 1 for none; of a student that was trained for several, the one to draw with"
    parser.add_argument("--guidance", type=float, metavar="W", help=weight)
    levels = "guide a teacher between these noise levels alone, as 0.2,5"
    parser.add_argument("--guidance-interval", type=number_list("--guidance-interval"), metavar="LOW,HIGH", help=levels)
    parser.add_argument("--guide", metavar="MODEL", help="guide away from this model, in the place of the teacher without its labels")


def guidance_options(args: argparse.Namespace) -> dict:
    """The generator's own options of guidance, those that were given, with the guide loaded."""
    from fastcm import api

    given = {name: getattr(args, name) for name in ("guidance", "guidance_interval", "guide") if getattr(args, name) is not None}
    if given and api.resolve_model(args.model)[0] in api.EXPORTED:
        option = next(iter(given)).replace("_", "-")
        raise InputError(f"guidance of an exported graph in --{option}: {args.model}. Its weight was chosen with fastcm export --guidance.")
    if args.guide is not None:
        given["guide"] = api.load(args.guide, device=args.device, precision=args.precision)
    return given


def seed_list(text: str) -> list[int]:
    """`0-63`, `5`, `1,5,9-12`; negative seeds as `-3` or `-3--1`."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part[:1] + part[1:].partition("-")[0], *part[1:].partition("-")[1:]
        try:
            start = int(first)
            end = int(last) if dash else start
        except ValueError:
            raise InputError(f"not a list of seeds in --seeds: {text}. Write it as 0-63 or 1,5,9-12.") from None
        if end < start:
            raise InputError(f"empty range in --seeds: {part}. Write the smaller seed first.")
        if end - start >= 10_000_000:
            raise InputError(f"too many seeds in --seeds: {part}. Draw at most 10 million at once.")
        seeds += range(start, end + 1)
    return seeds


def number_list(option: str):
    """A parser of `80,0.8` as numbers."""

    def parse(text: str) -> list[float]:
        try:
            return [float(part) for part in text.split(",")]
        except ValueError:
            raise InputError(f"not a list of numbers in {option}: {text}. Write it as 80,0.8.") from None

    return parse


sigma_list = number_list("--sigmas")


def timestep_list(text: str) -> list[int]:
    """`0,22,39` as whole numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"not a list of whole numbers in --timesteps: {text}. Write it as 0,22,39, with --grid 40.") from None


def label_list(text: str) -> list[str]:
    """Names or numbers of `cat,"big, dog",3`; quotes as in CSV."""
    try:
        rows = list(csv.reader([text], strict=True, skipinitialspace=True))
    except csv.Error as error:
        remedy = "Quote a name that has a comma or a quote, as in CSV."
        raise InputError(f"not a list of classes in --labels: {text} ({error}). {remedy}") from None
    if len(rows) != 1 or "" in rows[0]:
        raise InputError(f"an empty class in --labels: {text}. Write it as 3, 0,1,2 or cat,dog.")
    return rows[0]


def crossed(seeds: list[int], labels: list | None, classes: list[str] | None) -> tuple[list[int], list | None]:
    """Seeds and labels of the pictures: `all` gives every seed in every class, a list is left to the generator to cycle."""
    if labels == ["all"] and classes:
        return [seed for seed in seeds for _ in classes], list(range(len(classes))) * len(seeds)
    return seeds, labels


def output_path(out: str | None, model: Path, *, report: bool) -> tuple[str, Path]:
    """Returns (kind, path): kind is "png", "npz" or "folder"."""
    if out is None:
        return "png", Path(f"{model.resolve().stem}-{'report' if report else 'samples'}.png")
    path = Path(out)
    if report and path.suffix.lower() != ".png":
        raise InputError(f"unknown kind of file in --out: {out}. A report is a picture: give a name that ends in .png.")
    if out.endswith("/") or path.is_dir() or not path.suffix:
        return "folder", path
    if path.suffix.lower() in (".png", ".npz"):
        return path.suffix.lower()[1:], path
    raise InputError(f"unknown kind of file in --out: {out}. Use x.png, x.npz, or the name of a folder.")


def run(args: argparse.Namespace) -> int:
    from fastcm import api
    from fastcm.generation.lettering import class_caption

    kind, out = output_path(args.out, Path(args.model), report=args.report)
    if args.grid is not None and args.timesteps is None:
        raise InputError(f"missing option beside --grid: --timesteps. Give both, as --timesteps 0,22,39 --grid {args.grid}.")
    if args.churn is not None and api.resolve_model(args.model)[0] in api.EXPORTED:
        raise InputError(f"a solver's option for an exported graph in --churn: {args.model}. Use the folder that it was exported from.")
    generator = api.load(args.model, device=args.device, precision=args.precision, provider=args.provider, trust=args.trust)
    by_class = args.report and args.labels in (None, ["all"]) and 0 < len(generator.classes or ()) <= MOST_COLUMNS
    seeds = args.seeds or seed_list(REPORT_SEEDS if by_class else DEFAULT_SEEDS)
    drawn, labels = crossed(seeds, ["all"] if by_class else args.labels, generator.classes)
    if kind == "png" and len(drawn) > MOST_IN_A_GRID:
        raise InputError(f"too many pictures for one PNG in --out: {len(drawn)}. Write x.npz or a folder.")
    options = how(args, generator)
    facts = describe(args, generator, options)
    batches = generator.batches(drawn, labels, **options)
    start = time.perf_counter()
    if kind == "png":
        columns = len(generator.classes) if labels and len(drawn) > len(seeds) else None
        names = {}
        if args.report:
            names["title"] = f"{facts['fastcm:model']}: {facts['fastcm:sampler']}, {generator.provider}, {generator.precision}"
        if by_class:
            columns_of = [class_caption(name, number) for number, name in enumerate(generator.classes)]
            names |= {"column_names": columns_of, "row_names": [f"seed {seed}" for seed in seeds]}
        write_grid(out, batches, len(drawn), generator, columns=columns, names=names, captioned=args.report and not by_class, facts=facts)
    elif kind == "npz":
        write_npz(out, batches, drawn, labels, generator)
    else:
        write_folder(out, batches, len(drawn), facts)
    took = time.perf_counter() - start
    print(f"{len(drawn)} pictures in {out} ({generator.provider}, {generator.precision}, {len(drawn) / took:.1f} images/s)")
    return 0


def how(args: argparse.Namespace, generator) -> dict:
    """The generator's own options, as given."""
    from fastcm.generation.request import timestep_sigmas

    sigmas = args.sigmas
    if args.timesteps is not None:
        sigmas = timestep_sigmas(args.timesteps, GRID if args.grid is None else args.grid, generator.preconditioning)
    options = {"steps": args.steps, "sigmas": sigmas, "sampler": args.sampler, **guidance_options(args)}
    return options if args.churn is None else {**options, "churn": args.churn}


def describe(args: argparse.Namespace, generator, options: dict) -> dict[str, str]:
    """What the files record of how they were made, besides seeds and labels."""
    from fastcm.generation.request import chosen_sampler
    from fastcm.generation.sampler import TEACHER_STEPS

    sampler = chosen_sampler(args.sampler, generator.info, generator.preconditioning)
    if sampler == "consistency":
        text = "sigmas " + ",".join(f"{sigma:.6g}" for sigma in generator.sigmas(args.steps, options["sigmas"]))
    else:
        text = f"{sampler}, {args.steps or TEACHER_STEPS} steps"
        if args.churn is not None:
            text += ", churn " + ",".join(f"{number:g}" for number in args.churn)
    if args.guidance is not None:
        text += f", guidance {args.guidance:g}"
    return {"fastcm:model": Path(args.model).name, "fastcm:sampler": text, "fastcm:precision": generator.precision}


def shown(batches, total: int):
    """The batches, with a progress bar where somebody watches."""
    from tqdm import tqdm

    with tqdm(total=total, unit="img", disable=not sys.stderr.isatty(), leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch[0]))


def write_grid(out: Path, batches, total: int, generator, *, columns: int | None, names: dict, captioned: bool, facts: dict) -> None:
    """All pictures in one PNG; captioned: seed and class under each."""
    import numpy as np

    from fastcm.generation import pictures
    from fastcm.generation.lettering import class_caption

    parts = list(shown(batches, total))
    seeds, images = (np.concatenate([part[i] for part in parts]) for i in (0, 2))
    labels = None if parts[0][1] is None else np.concatenate([part[1] for part in parts])
    if captioned:
        classes = [""] * total if labels is None else [f": {class_caption(generator.classes[label], label)}" for label in labels]
        names = {**names, "captions": [f"{seed}{name}" for seed, name in zip(seeds, classes, strict=True)]}
    text = {**facts, "fastcm:seeds": _joined(seeds), **({} if labels is None else {"fastcm:labels": _joined(labels)})}
    pictures.save_png(out, pictures.grid(images, columns=columns, **names), text=text)


def write_npz(out: Path, batches, seeds: list[int], labels, generator) -> None:
    """One .npz, written by another thread while the next batch is drawn."""
    from fastcm.generation import pictures
    from fastcm.generation.background import Background
    from fastcm.generation.request import label_array, seed_array

    seeds = seed_array(seeds)
    shape = (len(seeds), generator.resolution, generator.resolution, generator.channels)
    classes = label_array(labels, seeds, generator.classes)
    with pictures.npz_file(out, shape, labels=classes, seeds=seeds) as write, Background() as background:
        for _, _, images in shown(batches, len(seeds)):
            background.run(write, images)


def write_folder(out: Path, batches, total: int, facts: dict[str, str]) -> None:
    """A PNG per seed, written by other threads while the next batch is drawn."""
    from fastcm.generation.background import Background

    with Background(2) as background:
        for batch in shown(batches, total):
            background.run(_write_pngs, out, batch, facts)


def _write_pngs(folder: Path, batch, facts: dict[str, str]) -> None:
    from fastcm.generation import pictures

    seeds, labels, images = batch
    names = [None] * len(seeds) if labels is None else labels.tolist()
    for seed, label, image in zip(seeds.tolist(), names, images, strict=True):
        name = f"seed-{seed}.png" if label is None else f"seed-{seed}-class-{label}.png"
        text = {**facts, "fastcm:seeds": str(seed), **({} if label is None else {"fastcm:labels": str(label)})}
        pictures.save_png(folder / name, pictures.to_pil(image), text=text)


def _joined(numbers) -> str:
    return ",".join(str(number) for number in numbers.tolist())
