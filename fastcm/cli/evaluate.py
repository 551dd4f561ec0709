"""`fastcm evaluate`: how good a model's samples are, or samples on disk, measured against a data set, with the protocol of every figure."""

import argparse
import re
from pathlib import Path

from fastcm.cli.sample import seed_list, sigma_list
from fastcm.errors import InputError, nearest

# Seeds that no default of training or sampling uses, and by which no setting was chosen.
FIRST_SEED, DEFAULT_COUNT = 500_000, 2000
CALLS = {
    "consistency": lambda n: n,
    "euler": lambda n: n,
    "ancestral": lambda n: n,
    "heun": lambda n: 2 * n - 1,
    "dpm": lambda n: 2 * n,
}


def add(subparsers) -> None:
    parser = subparsers.add_parser("evaluate", help="measure samples against real images", description=__doc__)
    parser.add_argument("model", metavar="MODEL|x.npz|FOLDER", help="a model of any kind, or samples: an .npz or a folder of pictures")
    parser.add_argument("--data", metavar="SRC", required=True, help="the real images: a folder (class = subfolder), an .npz, or digits")
    parser.add_argument(
        "--seeds", metavar="A-B", type=seed_list, help=f"seeds of the samples; from {FIRST_SEED} on, as many as images, at most 2,000"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--steps", metavar="K,K", type=step_list, help="numbers of steps to measure (1,2; a diffusion teacher: 18)")
    how.add_argument("--sigmas", metavar="S,S", type=sigma_list, help="the noise levels of one multistep sampler, downwards, as 80,0.8")
    parser.add_argument("--sampler", help="consistency, heun, euler, dpm or ancestral; by default what the model was trained for")
    parser.add_argument("--metrics", type=lambda text: text.split(","), help="some of accuracy,fd,kid,precision,recall,neighbours (all)")
    parser.add_argument("--judge-seed", type=int, default=0, help="seed of the classifier whose features are used (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda, for sampling")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16, for sampling")
    parser.add_argument("--provider", default="auto", help="auto, cpu, cuda or tensorrt: what runs an .onnx file")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write every figure and the protocol to this file")


def step_list(text: str) -> list[int]:
    """Numbers of steps of `1,2`."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise InputError(f"invalid number of steps in --steps: {text}. Write one or more as 1,2.")
    return [int(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    import torch

    from fastcm import __version__, evaluation
    from fastcm.evaluation import protocol, report

    metrics = args.metrics or list(evaluation.METRICS)
    protocol.check_metrics(metrics, labels=())
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise InputError(f"no such folder for --json: {args.json.absolute().parent}. Create it first.")
    read = read_samples if is_samples(args.model) else draw_samples
    dataset, sets, facts, held_out = read(args, metrics)
    judge = None
    if set(metrics) != {"neighbours"} and dataset.labels is not None:
        judge = evaluation.train_judge(dataset.images, dataset.labels, seed=args.judge_seed)
    result = evaluation.evaluate(sets, dataset.images, dataset.labels, judge=judge, metrics=metrics, held_out=held_out)
    versions = {"fastcm": __version__, "torch": torch.__version__}
    result["protocol"] |= {"data": args.data, "data_fingerprint": dataset.fingerprint, **facts, "versions": versions}
    print(report.text(result))
    if args.json is not None:
        from fastcm.weights.model_folder import write_json

        write_json(args.json, result)
    return 0


def is_samples(model: str) -> bool:
    """Whether the argument is a set of images rather than a model: an .npz, or a folder without any config.json."""
    path = Path(model)
    configs = ("config.json", "model_index.json", "unet/config.json", "model/config.json")
    return path.suffix.lower() == ".npz" or (path.is_dir() and not any((path / name).is_file() for name in configs))


def read_samples(args: argparse.Namespace, metrics: list[str]):
    """(dataset, [Samples], facts for the protocol, None) of an .npz or a folder of pictures."""
    from fastcm.evaluation import Samples, protocol
    from fastcm.training.data import open_dataset

    for option in ("seeds", "steps", "sigmas", "sampler"):
        if getattr(args, option) is not None:
            raise InputError(f"an option of models beside samples: --{option} with {args.model}. Leave it out, or give a model.")
    path = Path(args.model)
    found = open_dataset(path)
    dataset = open_dataset(args.data, resolution=found.resolution)
    if found.labels is not None and dataset.class_names:
        # Files made by `fastcm sample` hold the numbers of the classes, folders hold their names.
        names = len(dataset.class_names) if path.suffix.lower() == ".npz" else dataset.class_names
        found = open_dataset(path, classes=names)
    samples = Samples(path.name, found.images, found.labels)
    protocol.check_metrics(metrics, dataset.labels)
    protocol.check_shape(path.name, found.images.shape[1:], dataset.images)
    return dataset, [samples], {"samples": f"{len(found):,} images of {path}", "samples_fingerprint": found.fingerprint}, None


def draw_samples(args: argparse.Namespace, metrics: list[str]):
    """(dataset, [Samples per number of steps], facts for the protocol, rows held out from training) of a model."""
    import numpy as np

    from fastcm import api
    from fastcm.evaluation import Samples, protocol
    from fastcm.generation.request import label_array
    from fastcm.training.data import open_dataset

    generator = api.load(args.model, device=args.device, precision=args.precision, provider=args.provider)
    dataset = open_dataset(args.data, resolution=generator.resolution, classes=generator.classes)
    count = min(len(dataset), DEFAULT_COUNT)
    seeds = np.array(args.seeds if args.seeds is not None else range(FIRST_SEED, FIRST_SEED + count), dtype=np.int64)
    labels = label_array(None, seeds, generator.classes)
    protocol.check_metrics(metrics, dataset.labels)
    protocol.check_shape(args.model, (generator.channels, generator.resolution, generator.resolution), dataset.images)
    sampler = args.sampler or default_sampler(generator.info)
    # Every request is checked before the first one is drawn.
    asked = requests(args, generator, sampler)
    batches = [generator.batches(seeds, labels, **options) for _, _, options in asked]
    sets = [Samples(name, drawn(parts, len(seeds), name), labels, nfe) for (name, nfe, _), parts in zip(asked, batches, strict=True)]
    facts, held_out = describe(generator, dataset, seeds, sampler, [options for _, _, options in asked])
    return dataset, sets, {"model": args.model, **facts}, held_out


def default_sampler(info: dict) -> str:
    """heun for diffusion models, which one call does not take to an image, consistency for the others."""
    method = info.get("training", {}).get("method") if isinstance(info.get("training"), dict) else None
    form = info.get("preconditioning", {}).get("form")
    return "heun" if method == "edm" or (method is None and form == "edm") else "consistency"


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
    else:
        steps = args.steps or ([1, 2] if sampler == "consistency" else [TEACHER_STEPS])
    prefix = "" if sampler == "consistency" else f"{sampler}, "
    return [(f"{prefix}{n} step{'s' if n > 1 else ''}", CALLS[sampler](n), {"steps": n, "sampler": sampler}) for n in steps]


def drawn(batches, total: int, name: str):
    """The images of a generator's batches, uint8 [N, C, H, W], with a progress bar on a terminal."""
    import numpy as np
    from tqdm import tqdm

    parts = []
    with tqdm(total=total, desc=name, unit="img", disable=None, leave=False) as bar:
        for _, _, images in batches:
            parts.append(images)
            bar.update(len(images))
    return np.ascontiguousarray(np.concatenate(parts).transpose(0, 3, 1, 2))


def describe(generator, dataset, seeds, sampler: str, asked: list[dict]):
    """(facts for the protocol, rows of the data set that were held out from training, or None)."""
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
    facts["trained_on_this_data"] = None if known is None else known == dataset.fingerprint
    relation = {None: "", True: "; trained on these images", False: "; trained on other images"}[facts["trained_on_this_data"]]
    facts["samples"] = f"seeds {shown}, {labels}; {how}; {generator.provider}, {generator.precision}{relation}"
    held_out = training.get("held_out")
    return facts, np.array(held_out, dtype=np.int64) if held_out else None
