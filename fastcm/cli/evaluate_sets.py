"""The sets of images that `fastcm evaluate` measures: files and folders of samples, or what a model draws from seeds."""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

from fastcm.cli.sample import guidance_options
from fastcm.errors import InputError, nearest

# Seeds that no default of training or sampling uses, and by which no setting was chosen.
FIRST_SEED, DEFAULT_COUNT = 500_000, 2000
CALLS = {**dict.fromkeys(("consistency", "euler", "ancestral", "ddim"), lambda n: n), "heun": lambda n: 2 * n - 1, "dpm": lambda n: 2 * n}


class Measured(NamedTuple):
    """What is measured against what. dataset: None where a file of statistics is the reference. generator: None for samples on disk."""

    dataset: Any
    sets: list
    facts: dict
    held_out: Any
    generator: Any = None
    seeds: Any = None
    labels: Any = None


def step_list(text: str) -> list[int]:
    """Numbers of steps of `1,2`."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise InputError(f"invalid number of steps in --steps: {text}. Write one or more as 1,2.")
    return [int(part) for part in text.split(",")]


def is_samples(model: str) -> bool:
    """Whether the argument is a set of images rather than a model: an .npz, or a folder without any config.json."""
    path = Path(model)
    configs = ("config.json", "model_index.json", "unet/config.json", "model/config.json")
    return path.suffix.lower() == ".npz" or (path.is_dir() and not any((path / name).is_file() for name in configs))


MODEL_OPTIONS = ("seeds", "steps", "sigmas", "sampler", "guidance", "guidance_interval", "guide", "search_steps", "save", "teacher")


def read_samples(args: argparse.Namespace) -> Measured:
    """An .npz or a folder of pictures."""
    from fastcm.data.dataset import open_dataset
    from fastcm.evaluation import Samples
    from fastcm.evaluation.samples import check_shape

    for option in MODEL_OPTIONS:
        if getattr(args, option):
            shown = option.replace("_", "-")
            raise InputError(f"an option of models beside samples: --{shown} with {args.model}. Leave it out, or give a model.")
    path = Path(args.model)
    found = open_dataset(path)
    dataset = None if args.data is None else open_dataset(args.data, resolution=found.resolution, **data_options(args, found.channels))
    if dataset is not None:
        if found.labels is not None and dataset.class_names:
            found = open_dataset(path, classes=dataset.class_names)
        check_shape(path.name, found.images.shape[1:], dataset.images.shape[1:])
    facts = {"samples": f"{len(found):,} images of {path}", "samples_fingerprint": found.fingerprint}
    return Measured(dataset, [Samples(path.name, found.images, found.labels)], facts, held_out_rows(None, dataset))


def data_options(args: argparse.Namespace, channels: int) -> dict[str, Any]:
    """How `--data` is read beside images of `channels`: RGBA ones are not compared with pictures laid over white."""
    options = {name: getattr(args, name) for name in ("channels", "labels_file", "image_column", "label_column")}
    return options if channels != 4 else {**options, "channels": args.channels or 4}


def open_model(args: argparse.Namespace) -> Measured:
    """A model with its data, its seeds and their labels; its sets are drawn by `draw_samples`."""
    import numpy as np

    from fastcm import api
    from fastcm.data.dataset import open_dataset
    from fastcm.evaluation.samples import check_shape
    from fastcm.generation.request import label_array

    generator = api.load(args.model, device=args.device, precision=args.precision, provider=args.provider, trust=args.trust)
    dataset = None
    if args.data is not None:
        dataset = open_dataset(
            args.data, resolution=generator.resolution, classes=generator.classes, **data_options(args, generator.channels)
        )
        check_shape(args.model, (generator.channels, generator.resolution, generator.resolution), dataset.images.shape[1:])
    count = DEFAULT_COUNT if dataset is None else min(len(dataset), DEFAULT_COUNT)
    seeds = np.array(args.seeds if args.seeds is not None else range(FIRST_SEED, FIRST_SEED + count), dtype=np.int64)
    labels = label_array(None, seeds, generator.classes)
    return Measured(dataset, [], {"model": args.model}, held_out_rows(generator, dataset), generator, seeds, labels)


def held_out_rows(generator, dataset):
    """Rows of the data that the set keeps from training, or that the model says it was not trained on, int64, or None."""
    import numpy as np

    if dataset is not None and 0 < dataset.held_out < len(dataset):
        return np.arange(len(dataset) - dataset.held_out, len(dataset))
    training = None if generator is None else generator.info.get("training")
    rows = training.get("held_out") if isinstance(training, dict) and dataset is not None else None
    return np.array(rows, dtype=np.int64) if rows else None


def draw_samples(args: argparse.Namespace, opened: Measured) -> Measured:
    """The model with one stream of samples per number of steps; every request is checked before the first one is drawn."""
    from fastcm.evaluation import Samples

    generator, seeds, labels = opened.generator, opened.seeds, opened.labels
    sampler = sampler_of(args, generator)
    asked = requests(args, generator, sampler)
    guidance = guidance_options(args)
    halves = (
        2 if sampler != "consistency" and args.guidance not in (None, 1) else 1
    )  # of every guided call; beyond an interval one is spared
    asked = [(name, halves * nfe, {**options, **guidance}) for name, nfe, options in asked]
    sets = [Samples(name, stream(generator, seeds, labels, name, options), labels, nfe) for name, nfe, options in asked]
    facts = describe(generator, opened.dataset, seeds, sampler, [options for _, _, options in asked])
    if args.guidance is not None:
        facts |= {name: getattr(args, name) for name in ("guidance", "guidance_interval", "guide")}
        facts["samples"] += f"; guidance {args.guidance:g}"
    return opened._replace(sets=sets, facts={**opened.facts, **facts})


def sampler_of(args: argparse.Namespace, generator) -> str:
    """The sampler that was asked for, or the model's own."""
    from fastcm.generation.request import chosen_sampler

    return chosen_sampler(args.sampler, generator.info, generator.preconditioning)


def requests(args: argparse.Namespace, generator, sampler: str) -> list[tuple[str, int, dict]]:
    """(name, network calls per image, options of the generator) of each set of samples."""
    from fastcm.generation.sampler import SAMPLERS, TEACHER_STEPS

    if sampler not in SAMPLERS:
        raise InputError(f"unknown value in --sampler: {sampler}. Use one of {', '.join(SAMPLERS)}.{nearest(sampler, SAMPLERS)}")
    if args.sigmas is not None:
        name = f"sigmas {','.join(f'{sigma:g}' for sigma in args.sigmas)}"
        return [(name, len(args.sigmas), {"sigmas": tuple(args.sigmas), "sampler": sampler})]
    fixed = getattr(generator, "graph_sigmas", None)
    if fixed is not None and args.steps is None:
        steps = [len(fixed)]
    elif args.search_steps is not None and args.steps is None:
        steps = range(1, args.search_steps + 1)
    else:
        steps = args.steps or ([1, 2] if sampler == "consistency" else [TEACHER_STEPS])
    prefix = "" if sampler == "consistency" else f"{sampler}, "
    return [(f"{prefix}{n} step{'s' if n > 1 else ''}", CALLS[sampler](n), {"steps": n, "sampler": sampler}) for n in steps]


def stream(generator, seeds, labels, name: str, options: dict):
    """The images of the seeds as a stream, uint8 blocks [B, C, H, W], with a progress bar on a terminal. Checks the request at once."""
    import numpy as np
    from tqdm import tqdm

    from fastcm.evaluation import Stream

    generator.batches(seeds, labels, **options)

    def draw():
        with tqdm(total=len(seeds), desc=name, unit="img", disable=None, leave=False) as bar:
            for _, _, images in generator.batches(seeds, labels, **options):
                yield np.ascontiguousarray(images.transpose(0, 3, 1, 2))
                bar.update(len(images))

    return Stream((len(seeds), generator.channels, generator.resolution, generator.resolution), draw)


def describe(generator, dataset, seeds, sampler: str, asked: list[dict]):
    """How the samples were made, for the protocol."""
    import numpy as np

    training = generator.info.get("training")
    training = training if isinstance(training, dict) else {}
    first, last = int(seeds.min()), int(seeds.max())
    shown = f"{first}-{last}" if np.array_equal(seeds, np.arange(first, last + 1)) else f"{len(seeds)} from {first} to {last}"
    labels = f"label = seed mod {len(generator.classes)}" if generator.classes else "no labels"
    how, facts = sampler, {"sampler": sampler, "seeds": shown, "precision": generator.precision, "provider": generator.provider}
    if sampler == "consistency":
        facts["sigmas"] = [generator.sigmas(o.get("steps"), o.get("sigmas")) for o in asked]
        how = "from noise level " + ", ".join(" -> ".join(f"{sigma:g}" for sigma in sigmas) for sigmas in facts["sigmas"])
    known = training.get("dataset")
    seen = None if known is None or dataset is None else {dataset.fingerprint}
    if seen and 0 < dataset.held_out < len(dataset):
        seen.add(dataset.for_training().fingerprint)
    facts["trained_on_this_data"] = None if seen is None else known in seen
    relation = {None: "", True: "; trained on these images", False: "; trained on other images"}[facts["trained_on_this_data"]]
    facts["samples"] = f"seeds {shown}, {labels}; {how}; {generator.provider}, {generator.precision}{relation}"
    return facts
