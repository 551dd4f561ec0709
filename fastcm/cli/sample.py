"""`fastcm sample`: pictures of given seeds from a model or an exported file."""

import argparse
import sys
import time
from pathlib import Path

from fastcm.errors import InputError

DEFAULT_SEEDS = "0-63"
MOST_IN_A_GRID = 4096


def add(subparsers) -> None:
    parser = subparsers.add_parser("sample", help="draw pictures from a model", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run, model or diffusers folder, an .onnx, an OpenAI .pt or an EDM .pkl")
    parser.add_argument("--seeds", type=seed_list, default=DEFAULT_SEEDS, metavar="LIST", help="as 0-63, or 1,5,9-12 (default: 0-63)")
    parser.add_argument("--labels", metavar="LIST", help="classes, cycled over the seeds; all crosses them; omitted: seed mod classes")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--steps", type=int, metavar="K", help="network calls per picture (default: 1)")
    group.add_argument("--sigmas", type=sigma_list, metavar="LIST", help="the noise levels to visit, from high to low, as 80,0.8")
    parser.add_argument("--sampler", help="consistency; for diffusion teachers heun (their default), euler, dpm, ancestral")
    parser.add_argument("--provider", default="auto", help="for .onnx: auto (default), cpu, cuda or tensorrt")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto (default: bf16 on CUDA, else fp32), fp32, bf16 or fp16")
    parser.add_argument("--out", metavar="FILE", help="x.png: a grid; x.npz: arr_0, arr_1; DIR/: a PNG per seed (NAME-samples.png)")
    parser.add_argument("--trust", action="store_true", help="load files that hold programs")


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


def sigma_list(text: str) -> list[float]:
    """`80,0.8` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"not a list of numbers in --sigmas: {text}. Write it as 80,0.8.") from None


def crossed(seeds: list[int], labels: str | None, classes: list[str] | None) -> tuple[list[int], list[str] | None]:
    """Seeds and labels of the pictures: `all` gives every seed in every class, a list is left to the generator to cycle."""
    if labels is None:
        return seeds, None
    if labels == "all" and classes:
        return [seed for seed in seeds for _ in classes], [str(number) for number in range(len(classes))] * len(seeds)
    return seeds, labels.split(",")


def output_path(out: str | None, model: Path) -> tuple[str, Path]:
    """Returns (kind, path): kind is "png", "npz" or "folder"."""
    if out is None:
        return "png", Path(f"{model.resolve().stem}-samples.png")
    path = Path(out)
    if out.endswith("/") or path.is_dir() or not path.suffix:
        return "folder", path
    if path.suffix.lower() in (".png", ".npz"):
        return path.suffix.lower()[1:], path
    raise InputError(f"unknown kind of file in --out: {out}. Use x.png, x.npz, or the name of a folder.")


def run(args: argparse.Namespace) -> int:
    from fastcm import api

    kind, out = output_path(args.out, Path(args.model))
    generator = api.load(args.model, device=args.device, precision=args.precision, provider=args.provider, trust=args.trust)
    seeds, labels = crossed(args.seeds, args.labels, generator.classes)
    if kind == "png" and len(seeds) > MOST_IN_A_GRID:
        raise InputError(f"too many pictures for one PNG in --out: {len(seeds)}. Write x.npz or a folder.")
    batches = generator.batches(seeds, labels, steps=args.steps, sigmas=args.sigmas, sampler=args.sampler)
    start = time.perf_counter()
    columns = len(generator.classes) if args.labels == "all" and generator.classes else None
    count = _write(kind, out, batches, len(seeds), columns=columns, facts=_facts(args, generator))
    took = time.perf_counter() - start
    print(f"{count} pictures in {out} ({generator.provider}, {generator.precision}, {count / took:.1f} images/s)")
    return 0


def _facts(args: argparse.Namespace, generator) -> dict[str, str]:
    """What the files record of how they were made, besides seeds and labels."""
    from fastcm.generation.request import chosen_sampler
    from fastcm.generation.sampler import TEACHER_STEPS

    sampler = chosen_sampler(args.sampler, generator.info)
    if sampler == "consistency":
        how = "sigmas " + ",".join(f"{sigma:g}" for sigma in generator.sigmas(args.steps, args.sigmas))
    else:
        how = f"{sampler}, {args.steps or TEACHER_STEPS} steps"
    return {"fastcm:model": Path(args.model).name, "fastcm:sampler": how, "fastcm:precision": generator.precision}


def _write(kind: str, out: Path, batches, total: int, *, columns: int | None, facts: dict[str, str]) -> int:
    """Draws the batches and writes them; a folder's PNGs are written by other threads while the next batch is drawn."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from tqdm import tqdm

    from fastcm.generation import pictures

    drawn, written = [], []
    with tqdm(total=total, unit="img", disable=not sys.stderr.isatty(), leave=False) as bar, ThreadPoolExecutor(2) as writers:
        for seeds, labels, images in batches:
            if kind == "folder":
                names = [None] * len(seeds) if labels is None else labels.tolist()
                for seed, label, image in zip(seeds.tolist(), names, images, strict=True):
                    written.append(writers.submit(_write_one, out, image, seed, label, facts))
            else:
                drawn.append((seeds, labels, images))
            bar.update(len(seeds))
        for future in written:
            future.result()
    if kind == "folder":
        return len(written)
    seeds, images = (np.concatenate([part[i] for part in drawn]) for i in (0, 2))
    labels = None if drawn[0][1] is None else np.concatenate([part[1] for part in drawn])
    if kind == "npz":
        pictures.save_npz(out, images, labels=labels, seeds=seeds)
    else:
        text = {**facts, "fastcm:seeds": _joined(seeds), **({} if labels is None else {"fastcm:labels": _joined(labels)})}
        pictures.save_png(out, pictures.grid(images, columns=columns), text=text)
    return len(images)


def _joined(numbers) -> str:
    return ",".join(str(number) for number in numbers.tolist())


def _write_one(folder: Path, image, seed: int, label: int | None, facts: dict[str, str]) -> None:
    from fastcm.generation import pictures

    name = f"seed-{seed}.png" if label is None else f"seed-{seed}-class-{label}.png"
    text = {**facts, "fastcm:seeds": str(seed), **({} if label is None else {"fastcm:labels": str(label)})}
    pictures.save_png(folder / name, pictures.to_pil(image), text=text)
