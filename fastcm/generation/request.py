"""What a caller asks of a generator, checked: seeds, labels, noise levels and the form of the images."""

import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np

from fastcm.consistency.denoiser import Preconditioning
from fastcm.consistency.noise_schedule import karras_grid, sampling_sigmas
from fastcm.errors import InputError, nearest
from fastcm.generation.sampler import CALM, CHURNED, ChainSteps, Churn
from fastcm.weights.class_names import by_name, class_number

OUTPUTS = ("uint8", "float", "pil")
SEED_RANGE = range(-(2**63), 2**64)
TEACHER_DEFAULT = "heun"


def seed_array(seeds: int | Iterable[int]) -> np.ndarray:
    """Returns the seeds as int64 [N]; an int stands for itself alone. A seed from 2^63 on is the negative one of the same 64 bits."""
    values = []
    for seed in [seeds] if _stands_alone(seeds) else seeds:
        try:
            seed = operator.index(seed)
        except TypeError:
            raise InputError(f"not an integer in seeds: {seed!r}. Give integers of 64 bits.") from None
        if seed not in SEED_RANGE:
            raise InputError(f"seed out of range in seeds: {seed}. Give integers of 64 bits: from -2^63 to 2^64 - 1.")
        values.append(signed(seed))
    return np.array(values, dtype=np.int64)


def signed(seed: int) -> int:
    """A seed of 64 bits, from -2^63 to 2^64 - 1, as the int64 of the same bits: 2^64 - 1 is -1."""
    return (seed + 2**63) % 2**64 - 2**63


def _stands_alone(value: object) -> bool:
    """Whether it is one seed or label, not several."""
    return isinstance(value, (str, int)) or getattr(value, "ndim", None) == 0


def label_array(labels, seeds: np.ndarray, classes: Sequence[str] | None) -> np.ndarray | None:
    """Returns a class per seed, int64 [N], None for models without classes. A list is cycled over the seeds; None is seed mod classes."""
    if not classes:
        if labels is not None:
            raise InputError(f"labels for a model without classes in labels: {labels}. Leave labels out.")
        return None
    if labels is None:
        return seeds % len(classes)
    values = [labels] if _stands_alone(labels) else list(labels)
    if not values:
        raise InputError("no class in labels: the list is empty. Give a class, or leave labels out.")
    numbers = by_name(classes)
    return np.resize(np.array([class_number(label, classes, numbers) for label in values], dtype=np.int64), len(seeds))


def noise_levels(steps: int | None, sigmas: Iterable[float] | None, preconditioning: Preconditioning, sampling: dict) -> tuple[float, ...]:
    """Returns the levels of a consistency sampler, downwards: `sigmas` as given, else the model's own for `steps`, else a Karras grid.

    sampling: {"2": [80.0, 0.8], ...}, the levels that the model's folder recommends per number of steps.
    """
    p = preconditioning
    if sigmas is None:
        steps = 1 if steps is None else steps
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"illegal value in steps: {steps}. Give an integer of 1 or more.")
        recommended = (sampling or {}).get(str(steps))
        grid = {"sigma_min": p.sigma_min, "sigma_max": p.sigma_max, "rho": p.rho, "transition": p.transition}
        sigmas = recommended or sampling_sigmas(steps, **grid)
    elif steps is not None:
        raise InputError(f"both steps and sigmas given: {steps} and {sigmas}. Give one of them.")
    levels = tuple(float(sigma) for sigma in ([sigmas] if isinstance(sigmas, (int, float)) else sigmas))
    if not levels:
        raise InputError("no noise level in sigmas: the list is empty. Give at least one.")
    # Grids computed in float64 and files written in decimal may pass the ends by a rounding.
    low, high = p.sigma_range
    for sigma in levels:
        if not (math.isfinite(sigma) and low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6)):
            remedy = f"The model was trained from {low:g} to {high:g}."
            raise InputError(f"noise level out of range in sigmas: {sigma:g}. {remedy}")
    if any(later >= earlier for earlier, later in zip(levels, levels[1:], strict=False)):
        raise InputError(f"noise levels out of order in sigmas: {', '.join(f'{s:g}' for s in levels)}. Give them from high to low.")
    return levels


def timestep_sigmas(timesteps: Sequence[int], grid: int, preconditioning: Preconditioning) -> tuple[float, ...]:
    """The noise levels that published integer timesteps stand for: indices of a Karras grid of `grid` levels, from 0, the noisiest.

    Papers write them as 0,22,39/40. The grid's last index, sigma_min, is where sampling ends: it makes no call and may be left out.
    """
    p = preconditioning
    if not isinstance(grid, int) or grid < 2:
        raise InputError(f"illegal value in grid: {grid}. Give the number of levels, 2 or more, as 40.")
    for index in timesteps:
        if not isinstance(index, int) or not 0 <= index < grid:
            raise InputError(f"timestep out of range in timesteps: {index}. A grid of {grid} levels has the timesteps 0 to {grid - 1}.")
    if any(later <= earlier for earlier, later in zip(timesteps, timesteps[1:], strict=False)):
        text = ",".join(str(index) for index in timesteps)
        raise InputError(f"timesteps out of order in timesteps: {text}. Give them upwards, from the noisiest, 0.")
    calls = [index for index in timesteps if index < grid - 1]
    if not calls:
        raise InputError(f"no timestep before the last in timesteps: {list(timesteps)}. Timestep {grid - 1} of {grid} makes no call.")
    levels = karras_grid(grid, sigma_min=p.sigma_min, sigma_max=p.sigma_max, rho=p.rho).tolist()
    return tuple(levels[index] for index in calls)


def chosen_churn(churn: float | Sequence[float] | None, sampler: str) -> Churn:
    """Churn from S_churn alone, or from up to (S_churn, S_tmin, S_tmax, S_noise)."""
    if churn is None:
        return CALM
    if sampler not in CHURNED:
        raise InputError(f"churn for a sampler without it in churn: {sampler}. It is for {' and '.join(CHURNED)}.")
    values = [churn] if isinstance(churn, (int, float)) else list(churn)
    if not 1 <= len(values) <= 4 or not all(isinstance(v, (int, float)) and v >= 0 for v in values) or math.isinf(values[0]):
        raise InputError(f"illegal value in churn: {churn}. Give S_churn, or S_churn,S_tmin,S_tmax,S_noise, all from 0 on.")
    return Churn(*(float(value) for value in values))


def is_diffusion(info: dict, preconditioning: Preconditioning) -> bool:
    """Whether a model needs a solver: by its training, else (other people's models) by its form, which is no consistency function's."""
    training = info.get("training")
    method = training.get("method") if isinstance(training, dict) else None
    return method == "edm" if method is not None else not preconditioning.is_boundary


def chosen_sampler(sampler: str | None, info: dict, preconditioning: Preconditioning) -> str:
    """The sampler to use where none is named: a diffusion model needs a solver, all others one call."""
    if sampler is not None:
        return sampler
    return TEACHER_DEFAULT if is_diffusion(info, preconditioning) else "consistency"


def chain_steps(info: dict, preconditioning: Preconditioning) -> ChainSteps:
    """What `ddim` follows: the settings that the model's folder brought along, diffusers' own for what they leave out."""
    if preconditioning.betas is None:
        raise InputError(f"no discrete chain for ddim in noise.c_noise: {preconditioning.c_noise}. Use --sampler heun.")
    settings = info.get("ddim")
    settings = settings if isinstance(settings, dict) else {}
    return ChainSteps(**{name: settings[name] for name in ChainSteps._fields if name in settings})


def check_output(output: str) -> str:
    if output not in OUTPUTS:
        raise InputError(f"unknown value in output: {output}. Use one of {', '.join(OUTPUTS)}.{nearest(str(output), OUTPUTS)}")
    return output


def finished(images: np.ndarray, output: str):
    """Images uint8 [N, H, W, C] as a list of PIL images where that was asked for."""
    if output != "pil":
        return images
    from fastcm.generation.pictures import to_pil

    return [to_pil(image) for image in images]
