"""`fastcm evaluate`: how good a model's samples are, or samples on disk, measured against a data set, with the protocol of every figure."""

import argparse
from pathlib import Path

from fastcm.cli import evaluate_search
from fastcm.cli.evaluate_sets import FIRST_SEED, Measured, draw_samples, is_samples, open_model, read_samples, step_list
from fastcm.cli.sample import add_guidance, seed_list, sigma_list
from fastcm.cli.train import add_data
from fastcm.errors import InputError

# Up to this size, and for pictures below 32 pixels, data are judged by a classifier of their own; beyond, by Inception.
SMALL_COUNT, SMALL_SIDE = 20_000, 32
SEARCH_METRICS = ("fid", "fd", "kid", *evaluate_search.LARGER_IS_BETTER)


def add(subparsers) -> None:
    parser = subparsers.add_parser("evaluate", help="measure samples against real images", description=__doc__)
    parser.add_argument("model", metavar="MODEL|x.npz|FOLDER", help="a model of any kind, or samples: an .npz or a folder of pictures")
    add_data(parser)
    parser.add_argument(
        "--seeds", metavar="A-B", type=seed_list, help=f"seeds of the samples; from {FIRST_SEED} on, as many as images, at most 2,000"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--steps", metavar="K,K", type=step_list, help="numbers of steps to measure (1,2; a diffusion teacher: 18)")
    how.add_argument("--sigmas", metavar="S,S", type=sigma_list, help="the noise levels of one multistep sampler, downwards, as 80,0.8")
    parser.add_argument("--sampler", help="consistency, heun, euler, dpm, ancestral or ddim; by default what the model was trained for")
    add_guidance(parser)
    names = "accuracy,fd,fid,kid,is,precision,recall,neighbours,lpips,consistency"
    parser.add_argument("--metrics", type=lambda text: text.split(","), help=f"some of {names} (all that can be had)")
    networks = "judge (a classifier of the data), inception, a file.onnx or package.module:name (by the size of the data)"
    parser.add_argument("--features", metavar="F", help=networks)
    parser.add_argument("--inception-weights", metavar="FILE", type=Path, help="torch-fidelity's weights; where torch.hub keeps them")
    parser.add_argument("--reference", metavar="x.npz", type=Path, help="statistics mu and sigma in place of the data's, for fid")
    parser.add_argument("--save-reference", metavar="OUT", type=Path, help="write the statistics of the data, mu and sigma, to this .npz")
    parser.add_argument("--lpips-weights", metavar="FILE", help="torchvision's VGG16, for the metric lpips")
    parser.add_argument("--teacher", metavar="MODEL", help="a diffusion model whose trajectories self-consistency follows")
    parser.add_argument("--judge-seed", type=int, default=0, help="seed of the classifier whose features are used (0)")
    parser.add_argument("--search-steps", metavar="K", type=int, help="first search the noise levels of 2 to K steps")
    grid = "levels of the Karras grid that are candidates (a run's own at its end, else 40)"
    parser.add_argument("--search-grid", metavar="N", type=int, help=grid)
    parser.add_argument("--search-metric", default="fid", choices=SEARCH_METRICS, help="what the search improves (fid)")
    parser.add_argument("--save", action="store_true", help="write the levels that were found into the model, for --steps K to use")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda, for sampling")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16, for sampling")
    parser.add_argument("--provider", default="auto", help="auto, cpu, cuda, tensorrt or tensorrt-rtx: what runs an .onnx file")
    parser.add_argument("--trust", action="store_true", help="load files that hold programs")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write every figure and the protocol to this file")
    parser.add_argument("--report", metavar="DIR", type=Path, help="write a page with pictures, curves and figures: DIR/index.html")


def run(args: argparse.Namespace) -> int:
    import torch

    from fastcm import __version__
    from fastcm.evaluation import protocol, report

    check_options(args)
    samples = is_samples(args.model)
    opened = read_samples(args) if samples else open_model(args)
    metrics = chosen_metrics(args, opened)
    measured = opened if samples or args.search_steps is not None else draw_samples(args, opened)
    if args.search_steps is not None:
        evaluate_search.check(args, opened.generator, metrics)
    teacher = open_teacher(args, opened, metrics)
    world = prepare(args, opened, metrics)
    if args.save_reference is not None:
        save_reference(args.save_reference, world)
    if args.search_steps is not None:
        evaluate_search.search(args, opened, world)
        measured = draw_samples(args, opened)
    galleries = {} if args.report is not None else None
    result = protocol.figures(measured.sets, world, galleries=galleries)
    if "consistency" in metrics:
        figures = consistency(measured, teacher)
        for row in result["sets"]:
            row["consistency"] = figures
    versions = {"fastcm": __version__, "torch": torch.__version__}
    result["protocol"] |= {**data_facts(args, measured), **measured.facts, "versions": versions}
    print(report.text(result))
    write_results(args, measured, result, world, galleries)
    return 0


def check_options(args: argparse.Namespace) -> None:
    """What is wrong whatever the model."""
    from fastcm.evaluation import METRICS, protocol
    from fastcm.generation.request import SEED_RANGE

    protocol.check_metrics(args.metrics or METRICS, labels=())
    if args.data is None and args.reference is None:
        raise InputError("missing argument in fastcm evaluate: --data. See fastcm evaluate --help.")
    for option in ("json", "save_reference", "report"):
        path = getattr(args, option)
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"no such folder for --{option.replace('_', '-')}: {path.absolute().parent}. Create it first.")
    if args.report is not None and args.report.exists() and not args.report.is_dir():
        raise InputError(f"not a folder in --report: {args.report}. Name a folder.")
    if args.judge_seed not in SEED_RANGE:
        raise InputError(f"illegal value in --judge-seed: {args.judge_seed}. Give a whole number of 64 bits.")
    if args.save and args.search_steps is None:
        raise InputError("nothing to save in --save: no levels were searched. Give --search-steps K as well.")
    if args.search_grid is not None and args.search_steps is None:
        raise InputError(f"no search for --search-grid: {args.search_grid}. Give --search-steps K as well.")
    if args.inception_weights is not None and args.features not in (None, "inception"):
        raise InputError(f"weights of another network than --features {args.features}: --inception-weights. Leave one of them out.")
    if args.lpips_weights is not None and "lpips" not in (args.metrics or ["lpips"]):
        raise InputError("no metric for --lpips-weights: lpips is not in --metrics. Add it, or leave the weights out.")
    if args.search_steps is not None and args.sigmas is not None:
        raise InputError("levels given beside a search: --sigmas with --search-steps. Leave one of them out.")
    if args.search_steps is not None and args.guidance is not None:
        raise InputError("guidance beside a search: --guidance with --search-steps. Leave one of them out.")


def chosen_metrics(args: argparse.Namespace, opened: Measured) -> list[str]:
    """The metrics to measure. Raises for those that the data or the model cannot serve."""
    from fastcm.evaluation import protocol

    kind = args.features or default_features(opened.dataset)
    metrics = args.metrics or default_metrics(args, opened, kind)
    labels = None if opened.dataset is None else opened.dataset.labels
    protocol.check_metrics(metrics, labels, features=None if kind == "judge" else kind, statistics=opened.dataset is None)
    if "consistency" in metrics and not has_denoiser(opened.generator):
        raise InputError(f"no torch model for --metrics consistency: {args.model}. Give the folder of the model, or leave it out.")
    return metrics


def prepare(args: argparse.Namespace, opened: Measured, metrics: list[str]):
    """The world that samples are measured in: judge, feature network, reference. Nothing is drawn."""
    from fastcm import evaluation
    from fastcm.data.image_cache import optional_folder
    from fastcm.evaluation import extractors, protocol
    from fastcm.evaluation.reference import read_reference

    cache = optional_folder("evaluation")
    kind = args.features or default_features(opened.dataset)
    images, labels = (None, None) if opened.dataset is None else (opened.dataset.images, opened.dataset.labels)
    tools: dict = {"held_out": opened.held_out, "cache": cache}
    if args.reference is not None:
        tools["reference"] = read_reference(args.reference)
    if kind != "judge" and protocol.FEATURE_METRICS & set(metrics):
        device = "cpu" if opened.generator is None else str(opened.generator.device)
        tools["extractor"] = extractors.open_extractor(kind, inception_weights=args.inception_weights, device=device)
    if protocol.JUDGE_METRICS & set(metrics) or (kind == "judge" and protocol.FEATURE_METRICS & set(metrics)):
        tools["judge"] = evaluation.train_judge(images, labels, seed=args.judge_seed, cache=cache, held_out=opened.held_out)
    if "lpips" in metrics:
        from fastcm.weights.lpips_weights import load_lpips

        tools["lpips"] = load_lpips(args.lpips_weights, pooling="max", resize=False)
    return protocol.prepare(images, labels, metrics=[name for name in metrics if name != "consistency"], **tools)


def save_reference(path: Path, world) -> None:
    from fastcm.evaluation.statistics import save_statistics

    if world.reference is None:
        raise InputError(f"no statistics for --save-reference: {path}. Measure fid, kid, precision or recall as well.")
    save_statistics(path, world.reference.mean, world.reference.covariance)


def default_features(dataset) -> str:
    """The judge for small data, Inception for everything else."""
    if dataset is None:
        return "inception"
    return "judge" if len(dataset) <= SMALL_COUNT or dataset.resolution < SMALL_SIDE else "inception"


def default_metrics(args: argparse.Namespace, opened: Measured, kind: str) -> list[str]:
    """All that can be had: of the judge where it is the feature network, lpips with weights, consistency of a consistency model."""
    from fastcm.evaluation import METRICS, protocol
    from fastcm.generation.request import is_diffusion

    if opened.dataset is None or args.reference is not None:
        chosen = ["fid"]
    elif kind == "judge":
        chosen = list(METRICS)
    else:
        chosen = [name for name in METRICS if name not in protocol.JUDGE_METRICS and (name != "is" or kind == "inception")]
    if opened.dataset is None:
        return chosen
    generator = opened.generator
    is_consistency = has_denoiser(generator) and not is_diffusion(generator.info, generator.preconditioning)
    return [*chosen, *(["lpips"] if args.lpips_weights else []), *(["consistency"] if is_consistency else [])]


def has_denoiser(generator) -> bool:
    return getattr(generator, "denoiser", None) is not None


def open_teacher(args: argparse.Namespace, opened: Measured, metrics: list[str]):
    """The denoiser of --teacher on the model's device, or None."""
    if args.teacher is None:
        return None
    from fastcm import api
    from fastcm.evaluation.samples import check_shape
    from fastcm.generation.request import is_diffusion

    if "consistency" not in metrics:
        raise InputError(f"no metric for --teacher: {args.teacher}. Add consistency to --metrics, or leave the teacher out.")
    teacher, info = api.load_denoiser(args.teacher)
    if not is_diffusion(info, teacher.preconditioning):
        raise InputError(f"not a diffusion model in --teacher: {args.teacher}. Train one with --method edm.")
    shape = (info.get("channels"), info.get("resolution"), info.get("resolution"))
    check_shape(f"--teacher {args.teacher}", shape, opened.dataset.images.shape[1:])
    return teacher.to(opened.generator.device)


def consistency(measured: Measured, teacher) -> dict:
    """Self-consistency of the model on a fixed choice of 64 images of the data."""
    import numpy as np
    import torch

    from fastcm.evaluation.self_consistency import consistency_figures
    from fastcm.evaluation.statistics import ordered

    generator, dataset = measured.generator, measured.dataset
    rows = np.flatnonzero(ordered(len(dataset), number=0) < 64)
    images = torch.from_numpy(np.ascontiguousarray(dataset.images[rows])).to(generator.device)
    labels = torch.from_numpy(dataset.labels[rows]).to(generator.device) if generator.classes else None
    return consistency_figures(generator.denoiser, images, labels=labels, seed=FIRST_SEED, teacher=teacher)


def data_facts(args: argparse.Namespace, measured: Measured) -> dict:
    """The data's place in the protocol."""
    if measured.dataset is None:
        return {"data": str(args.reference)}
    rule = "cropped to a square, halved by box and reduced by bicubic filter"
    dataset = measured.dataset
    facts = {"data": args.data, "data_fingerprint": dataset.fingerprint, "data_resize": rule, "data_notes": list(dataset.notes)}
    return facts if measured.held_out is None else {**facts, "data_held_out": len(measured.held_out)}


def write_results(args: argparse.Namespace, measured: Measured, result: dict, world, galleries: dict | None) -> None:
    """The files that were asked for."""
    if args.json is not None:
        from fastcm.weights.model_folder import write_json

        write_json(args.json, result)
    if args.report is not None:
        from fastcm.cli.evaluate_page import write_page

        print(f"report in {write_page(args, measured, result, world, galleries)}")
