"""`fastcm evaluate --search-steps K`: the noise levels of 2 to K steps by a chosen figure, into the model's config.json with --save."""

import argparse
import dataclasses
from pathlib import Path

from fastcm.cli.evaluate_sets import DEFAULT_COUNT, Measured, sampler_of, stream
from fastcm.errors import InputError

# Of their own: neither those of training's evaluations nor those by which figures are published.
FIRST_SEED = 300_000
LARGER_IS_BETTER = ("lpips", "is", "accuracy", "precision", "recall")


def search(args: argparse.Namespace, opened: Measured, world) -> None:
    """Searches, prints the levels, hands them to the generator, and saves them where asked. The world is that of the evaluation."""
    import numpy as np

    from fastcm.data.image_cache import optional_folder
    from fastcm.evaluation import Samples, timestep_search
    from fastcm.evaluation.protocol import measure
    from fastcm.generation.request import label_array

    generator, name = opened.generator, args.search_metric
    config = config_path(args) if args.save else None
    count = min(opened.seeds.size, DEFAULT_COUNT)
    seeds = np.arange(FIRST_SEED, FIRST_SEED + count)
    labels = label_array(None, seeds, generator.classes)
    narrow = dataclasses.replace(world, metrics=(name,))
    sign = -1 if name in LARGER_IS_BETTER else 1

    def objective(levels: tuple[float, ...]) -> float:
        options = {"sigmas": levels, "sampler": "consistency"}
        row = measure(Samples("search", stream(generator, seeds, labels, "search", options), labels), narrow)
        return sign * (row[name]["mean"] if isinstance(row[name], dict) else row[name])

    grid = timestep_search.candidates(generator.preconditioning, args.search_grid or trained_levels(Path(args.model)))
    also = [generator.sigmas(steps) for steps in range(2, args.search_steps + 1)]
    cache = optional_folder("evaluation")
    journal = None if cache is None else timestep_search.journal_path(cache, identity(args, opened, world, grid, count))
    found = timestep_search.greedy_search(objective, grid, steps=args.search_steps, journal=journal, also=also)
    for steps, levels in found.levels.items():
        shown = ",".join(f"{sigma:.4g}" for sigma in levels)
        print(f"{steps} step{'s' if steps > 1 else ' '}  {name} {sign * found.values[steps]:.4g}  levels {shown}")
    seen = f"{found.measured} sets of samples measured now, {found.known} in an earlier search"
    print(f"searched with seeds {FIRST_SEED}-{FIRST_SEED + count - 1} among {len(grid)} levels: {seen}\n")
    generator.info["sampling"] = {**(generator.info.get("sampling") or {}), **{str(n): list(s) for n, s in found.levels.items() if n > 1}}
    if config is not None:
        timestep_search.save_levels(config, found.levels)
        print(f"saved in {config}: --steps uses these levels\n")


def check(args: argparse.Namespace, generator, metrics: list[str]) -> None:
    """What a search cannot do without; before anything is computed."""
    if args.search_steps < 2:
        raise InputError(f"illegal number of steps in --search-steps: {args.search_steps}. Use 2 or more.")
    if getattr(generator, "graph_sigmas", None) is not None:
        raise InputError(f"fixed noise levels for --search-steps: {args.model}. Search on the folder that it was exported from.")
    if sampler_of(args, generator) != "consistency":
        raise InputError(f"a diffusion sampler with --search-steps: {args.model}. Levels are searched for consistency models.")
    if args.search_grid is not None and not 3 <= args.search_grid <= 10_000:
        raise InputError(f"illegal number of levels in --search-grid: {args.search_grid}. Use 3 to 10,000.")
    if args.search_metric not in metrics:
        raise InputError(f"a metric that is not measured in --search-metric: {args.search_metric}. Add it to --metrics.")
    if args.save:
        config_path(args)


def trained_levels(model: Path) -> int:
    """How many noise levels the run ended with, or the usual number: between its own levels a network may be far worse than at them."""
    from fastcm.api import is_run_folder
    from fastcm.consistency.curriculum import discretization_steps
    from fastcm.evaluation.timestep_search import GRID
    from fastcm.weights.model_folder import read_json

    objective = read_json(model / "config.json").get("objective", {}) if is_run_folder(model) else {}
    if objective.get("curriculum") not in ("fixed", "progressive", "doubling"):
        return GRID
    return discretization_steps(objective["curriculum"], 1.0, s0=objective["s0"], s1=objective["s1"])


def config_path(args: argparse.Namespace) -> Path:
    """The config.json of a fastcm model folder; InputError for any other kind of model."""
    from fastcm import api

    kind, path = api.resolve_model(args.model)
    if api.is_built_in(args.model):
        raise InputError(f"a shipped model for --save: {args.model}. Copy it first: fastcm convert {args.model} DIR.")
    if kind != "folder":
        raise InputError(f"a model of another format for --save: {args.model}. Convert it first: fastcm convert {args.model} DIR.")
    return path / "config.json"


def identity(args: argparse.Namespace, opened: Measured, world, grid, count: int) -> dict:
    """What decides the measurements of a search: the weights, the data, the features, the figure, the seeds, the candidates."""
    from fastcm.evaluation.extractors import module_sha256

    generator, facts = opened.generator, world.protocol
    return {
        "weights": module_sha256(generator.denoiser),
        "preconditioning": str(generator.preconditioning),
        "precision": generator.precision,
        "device": str(generator.device),
        "data": facts.get("data_sha256"),
        "reference": facts.get("reference_sha256"),
        "features": facts.get("features_sha256"),
        "judge": facts.get("judge_sha256"),
        "metric": args.search_metric,
        "count": count,
        "first_seed": FIRST_SEED,
        "grid": grid,
    }
