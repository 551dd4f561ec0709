"""Schedulers of diffusers as preconditioning: what the network beside them predicts, at which noise levels, and how it is told them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcm.consistency.betas import MOST_STEPS, Betas
from fastcm.consistency.denoiser import Preconditioning
from fastcm.errors import InputError, nearest, shown
from fastcm.weights.fields import COUNT, NUMBER, TEXT, field
from fastcm.weights.foreign_file import refuse
from fastcm.weights.model_folder import read_json

CONSISTENCY, VARIANCE_EXPLODING = "CMStochasticIterativeScheduler", "ScoreSdeVeScheduler"
# Samplers of one and the same chain of betas.
CHAINS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
C_NOISE = "250 ln sigma"
FORMS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
NAMED_CHAINS = {**{name: name for name in ("linear", "scaled_linear", "squaredcos_cap_v2")}, "cosine": "squaredcos_cap_v2"}


def read_scheduler(path: Path) -> tuple[Preconditioning, dict]:
    """(preconditioning, info) of a scheduler_config.json. Raises InputError naming the file and the option that cannot be followed."""
    settings = read_json(path)
    name = field(settings, "_class_name", TEXT, path, default=CONSISTENCY)
    readers = {CONSISTENCY: _consistency, VARIANCE_EXPLODING: _variance_exploding, **dict.fromkeys(CHAINS, _chain)}
    if name not in readers:
        remedy = f"Read are {CONSISTENCY}, {VARIANCE_EXPLODING} and schedulers of betas, as DDPMScheduler."
        refuse(path, expected="a scheduler of a pixel model", reason=f"a {name}", remedy=remedy)
    try:
        return readers[name](settings, path)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{error} It stands in {path}.") from None


def _consistency(settings: Mapping[str, Any], path: Path) -> tuple[Preconditioning, dict]:
    names = ("sigma_min", "sigma_max", "sigma_data", "rho")
    sigmas = {name: float(field(settings, name, NUMBER, path)) for name in names if name in settings}
    steps = field(settings, "num_train_timesteps", COUNT, path, default=40)
    return Preconditioning(form="boundary", c_noise=C_NOISE, **sigmas), {"discretization_steps": steps}


def _variance_exploding(settings: Mapping[str, Any], path: Path) -> tuple[Preconditioning, dict]:
    """Its sigma is of pixels from 0 to 1, half of ours."""
    low, high = (float(field(settings, name, NUMBER, path, default=usual)) for name, usual in (("sigma_min", 0.01), ("sigma_max", 1348.0)))
    return Preconditioning(form="ve", c_noise="ln(sigma / 2)", sigma_min=2 * low, sigma_max=2 * high), {}


def _chain(settings: Mapping[str, Any], path: Path) -> tuple[Preconditioning, dict]:
    prediction = settings.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in FORMS:
        reason = f"prediction_type is {shown(prediction)}"
        refuse(path, expected="a chain of a pixel model", reason=reason, remedy=f"It has to be {', '.join(FORMS)}.")
    trained = settings.get("trained_betas")
    schedule = "trained_betas" if trained is not None else field(settings, "beta_schedule", TEXT, path, default="linear")
    steps = field(settings, "num_train_timesteps", COUNT, path, default=1000)
    if trained is not None and (not isinstance(trained, list) or len(trained) > MOST_STEPS):
        refuse(path, expected="a chain of betas", reason=f"trained_betas is {shown(trained)}, not a list of numbers")
    betas = Betas(
        schedule=schedule,
        start=float(field(settings, "beta_start", NUMBER, path, default=0.0001)),
        end=float(field(settings, "beta_end", NUMBER, path, default=0.02)),
        steps=steps if trained is None else len(trained),
        trained=None if trained is None else tuple(trained),
        zero_snr=bool(settings.get("rescale_betas_zero_snr", False)),
    )
    clipped = settings.get("clip_sample", True)
    ddim = {
        "timestep_spacing": field(settings, "timestep_spacing", TEXT, path, default="leading"),
        "steps_offset": settings.get("steps_offset", 0),
        "set_alpha_to_one": bool(settings.get("set_alpha_to_one", True)),
        "clip": float(field(settings, "clip_sample_range", NUMBER, path, default=1.0)) if clipped else None,
        **({"thresholding": True} if settings.get("thresholding") else {}),
    }
    return of_chain(FORMS[prediction], betas), {"ddim": ddim}


def of_chain(form: str, betas: Betas) -> Preconditioning:
    """The preconditioning of a network of this chain. It is told real numbers between the steps, as its embedding takes them."""
    low, high = betas.sigma_range
    return Preconditioning(form=form, c_noise="interpolated step", betas=betas, sigma_min=low, sigma_max=high)


def named_chain(prediction: str | None, betas: str | None, *, source: object, scale_to: int | None = None) -> Preconditioning:
    """The preconditioning that `--prediction` and `--betas` name, for models that do not say it. Raises InputError where one is missing.

    betas: a name of NAMED_CHAINS, with a number of steps other than 1000 as `cosine:4000`. scale_to: the steps are told the network as if
    they were so many (guided-diffusion rescales to 1000).
    """
    if prediction is None or betas is None:
        missing = " and ".join(name for name, value in (("--prediction", prediction), ("--betas", betas)) if value is None)
        choices = f"--prediction {', '.join(FORMS)}; --betas {', '.join(NAMED_CHAINS)}"
        raise InputError(f"a diffusion model without a scheduler in MODEL: {source}. Give fastcm convert {missing} ({choices}).")
    forms = {**FORMS, "v": "v"}
    if prediction not in forms:
        raise InputError(f"unknown value in --prediction: {prediction}. Use one of {', '.join(FORMS)}.{nearest(prediction, forms)}")
    name, _, steps = betas.partition(":")
    if name not in NAMED_CHAINS or (steps and not (steps.isdecimal() and len(steps) < 7)):
        hint = nearest(name, NAMED_CHAINS)
        raise InputError(f"unknown value in --betas: {betas}. Use one of {', '.join(NAMED_CHAINS)}, as cosine or cosine:4000.{hint}")
    count = int(steps or 1000)
    stretch = 1000 / count if count else 1.0  # Nichol and Dhariwal 2021: shorter chains take longer steps
    ends = {"start": 0.0001 * stretch, "end": 0.02 * stretch} if name == "linear" else {}
    return of_chain(forms[prediction], Betas(schedule=NAMED_CHAINS[name], steps=count, scale=(scale_to or count) / max(count, 1), **ends))
