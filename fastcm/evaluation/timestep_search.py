"""The search for noise levels of a multistep sampler: a ternary search per step, greedily one step more at a time (Song et al. 2023,
section 6.1), with every measurement kept on disk so that an interrupted search goes on where it stopped."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from fastcm.consistency.denoiser import Preconditioning
from fastcm.consistency.noise_schedule import karras_grid
from fastcm.errors import InputError
from fastcm.weights.model_folder import read_json, write_json

GRID = 40  # levels of the Karras grid that are candidates, as many as the published search has for distillation

Levels = tuple[float, ...]
Objective = Callable[[Levels], float]


def ternary_search(value: Callable[[int], float], low: int, high: int) -> int:
    """The integer of [low, high] where `value`, which falls and then rises, is smallest.

    Each round compares the points at one and two thirds and drops the outer third that cannot hold the minimum. Once three integers or
    fewer are left each of them is measured. The published script compares the middle of what is left with one end, and at a width of 1
    takes the upper bound's neighbour unmeasured; so its answer may be next to the minimum.
    """
    if low > high:
        raise InputError(f"empty range in the search: {low} to {high}. Use fewer steps or a finer grid.")
    while high - low > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        if value(left) < value(right):
            high = right - 1
        else:
            low = left + 1 if value(left) > value(right) else left
    return min(range(low, high + 1), key=value)


def most_measurements(low: int, high: int) -> int:
    """An upper bound of what `ternary_search` measures."""
    width = high - low + 1
    return min(width, 2 * max(0, math.ceil(math.log(max(width / 3, 1), 1.5))) + 3)


@dataclass
class Journal:
    """What was measured: noise levels -> value. path: a JSON file that is read first and written after every measurement, or None."""

    objective: Objective
    path: Path | None = None
    values: dict[str, float] = field(default_factory=dict)
    measured: int = 0

    def __post_init__(self):
        if self.path is not None and self.path.is_file():
            try:
                self.values = {str(key): float(value) for key, value in read_json(self.path)["values"].items()}
            except (InputError, KeyError, AttributeError, TypeError, ValueError):
                self.values = {}  # damaged: measure again
        self.known = len(self.values)

    def __call__(self, levels: Levels) -> float:
        key = ",".join(f"{sigma:.9g}" for sigma in levels)
        if key not in self.values:
            value = float(self.objective(levels))
            if not math.isfinite(value):
                raise InputError(f"a figure that is not finite in the search: {value} at {key}. Choose another --search-metric.")
            self.values[key] = value
            self.measured += 1
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, {"values": self.values})
        return self.values[key]


@dataclass(frozen=True)
class Found:
    """The levels for each number of steps with their value (smaller is better); measurements made now, and known from an earlier search."""

    levels: dict[int, Levels]
    values: dict[int, float]
    measured: int
    known: int


def candidates(preconditioning: Preconditioning, grid: int = GRID) -> Levels:
    """The Karras grid from the highest to the lowest level that the network answers, whose levels are tried."""
    low, high = preconditioning.sigma_range
    return tuple(karras_grid(grid, sigma_min=low, sigma_max=high, rho=preconditioning.rho).tolist())


def greedy_search(
    objective: Objective, grid: Sequence[float], *, steps: int, journal: Path | None = None, also: Sequence[Levels] = ()
) -> Found:
    """Searches the levels of 2 to `steps` calls. Every call before the last keeps the level that was found for it.

    objective: the figure of a sampler's levels, from high to low, smaller is better, the same at every call. grid: candidates, downwards;
    the first is where sampling starts. also: levels to measure as well. The answer for a number of steps is the best of all that was
    measured for it: where the figure is noisy a ternary search alone may end beside something better that it has seen.
    """
    if not 2 <= steps < len(grid):
        raise InputError(f"illegal number of steps in --search-steps: {steps}. Use 2 to {len(grid) - 1}.")
    measure = Journal(objective, journal)
    chosen, levels, values = [0], {1: (grid[0],)}, {1: measure((grid[0],))}
    bound = sum(most_measurements(1, len(grid) - 1) for _ in range(steps - 1))
    with tqdm(total=bound, desc="search", unit="set", disable=None, leave=False) as bar:
        for count in range(2, steps + 1):
            seen: dict[Levels, float] = {}

            def value(index: int, count: int = count, seen: dict = seen) -> float:
                tried = (*(grid[i] for i in chosen), grid[index])
                if tried not in seen:
                    seen[tried] = measure(tried)
                    best = min(seen, key=seen.__getitem__)
                    bar.set_postfix_str(f"{count} steps: {','.join(f'{s:.3g}' for s in best)} at {seen[best]:.4g}", refresh=False)
                    bar.update()
                return seen[tried]

            ternary_search(value, chosen[-1] + 1, len(grid) - 1 - (steps - count))
            best = min(seen, key=seen.__getitem__)
            chosen.append(list(grid).index(best[-1]))
            for other in also:
                if len(other) == count:
                    seen[tuple(other)] = measure(tuple(other))
            levels[count] = min(seen, key=seen.__getitem__)
            values[count] = seen[levels[count]]
    return Found(levels, values, measure.measured, measure.known)


def journal_path(folder: Path, identity: dict) -> Path:
    """Where a search of this identity (model, data, metric, seeds, grid) keeps its measurements; another identity, another file."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return Path(folder) / f"search-{digest[:20]}.json"


def save_levels(config: Path, levels: dict[int, Levels]) -> None:
    """Writes the levels of two steps and more into `sampling` of a model's config.json, where `--steps K` reads them."""
    content = read_json(config)
    found = {str(steps): list(sigmas) for steps, sigmas in levels.items() if steps > 1}
    write_json(config, {**content, "sampling": {**(content.get("sampling") or {}), **found}})
