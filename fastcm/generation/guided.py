"""What a caller asks of guidance, checked against what the model was trained for, and the denoiser that results."""

import functools
import logging
from typing import NamedTuple, Protocol

from torch import nn

from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.consistency.guidance import as_guide, checked_interval, guided, takes_weight
from fastcm.consistency.solver import Denoise
from fastcm.errors import InputError
from fastcm.generation.request import is_diffusion
from fastcm.networks.checks import is_number
from fastcm.networks.inference import with_guidance

log = logging.getLogger("fastcm")


class Model(Protocol):
    """What is asked of a generator here; `_worker` is its network in the dtype that it draws in."""

    denoiser: Denoiser
    info: dict
    classes: list[str] | None
    resolution: int
    channels: int
    _worker: nn.Module

    @property
    def preconditioning(self) -> Preconditioning: ...


class Guidance(NamedTuple):
    """weight: None where none was given: a teacher is not guided, a student keeps the default of its weight."""

    weight: float | None = None
    interval: tuple[float, float] | None = None
    guide: Model | None = None

    def denoiser(self, model: Model) -> Denoise:
        """D(x, sigma, labels) of a diffusion teacher so guided, or of a student told this weight."""
        worker, preconditioning = model._worker, model.preconditioning
        if self.weight is None:
            return Denoiser(worker, preconditioning)
        if takes_weight(worker):
            return Denoiser(with_guidance(worker, self.weight), preconditioning)
        denoiser = Denoiser(worker, preconditioning)
        guide = None
        if self.guide is not None:
            guide = as_guide(Denoiser(self.guide._worker, self.guide.preconditioning), has_classes=bool(self.guide.classes))
        return functools.partial(guided, denoiser, weight=self.weight, interval=self.interval, guide=guide)


def chosen_guidance(model: Model, weight: float | None, interval, guide: Model | None, *, sampler: str) -> Guidance:
    """Guidance as asked for; InputError where the model cannot have it. A weight of 1 is none at all for a teacher."""
    if weight is None:
        for name, value in (("guidance_interval", interval), ("guide", guide)):
            if value is not None:
                raise InputError(f"no weight for {name} in guidance: None. Give one, as 2.")
        return Guidance()
    if not is_number(weight) or weight < 0:
        raise InputError(f"illegal value in guidance: {weight}. Give a number from 0 on; 1 is none.")
    if not is_diffusion(model.info, model.preconditioning):
        if interval is not None or guide is not None:
            raise InputError("an option for diffusion teachers in guidance_interval or guide: the model is a student. Leave it out.")
        return Guidance(student_weight(model.denoiser.network, model.info, weight))
    if sampler == "consistency":
        raise InputError(f"guidance of a single call in guidance: {weight:g}. A diffusion teacher needs a solver: sampler heun.")
    interval = None if interval is None else checked_interval(interval, "guidance_interval")
    if weight == 1:
        return Guidance()
    if guide is None:
        check_guidable(model.classes, model.info, "guidance")
    else:
        if not hasattr(guide, "denoiser"):
            raise InputError(f"an exported graph in guide: {type(guide).__name__}. Give the model that it was exported from.")
        check_levels(guide.preconditioning, model.preconditioning, "guide")
        for name in ("resolution", "channels"):
            have, want = getattr(guide, name), getattr(model, name)
            if have != want:
                raise InputError(f"another {name} in guide: {have} (the model has {want}). Choose a guide of the same images.")
        if guide.classes and len(guide.classes) != len(model.classes or ()):
            have, want = len(guide.classes), len(model.classes or ())
            raise InputError(
                f"another number of classes in guide: {have} (the model has {want}). Choose one of the same classes, or of none."
            )
    return Guidance(float(weight), interval, guide)


def student_weight(network: nn.Module, info: dict, weight: float | None) -> float | None:
    """The weight that a student is told; InputError where it was trained for one weight alone, or for others."""
    if weight is None:
        return None
    training = info.get("training")
    trained = training.get("guidance") if isinstance(training, dict) else None
    if not takes_weight(network):
        fixed = f"it was trained with {trained:g}" if is_number(trained) else "none was given to it"
        raise InputError(
            f"guidance of a model whose weight is fixed in guidance: {weight:g} ({fixed}). Distil it with --guidance LOW,HIGH."
        )
    if isinstance(trained, (list, tuple)) and not trained[0] <= weight <= trained[1]:
        raise InputError(f"weight out of range in guidance: {weight:g}. The model was trained from {trained[0]:g} to {trained[1]:g}.")
    return float(weight)


def check_levels(guide: Preconditioning, ours: Preconditioning, where: str) -> None:
    """Refuses a guide that was trained for fewer noise levels."""
    if guide.sigma_min > ours.sigma_min or guide.sigma_max < ours.sigma_max:
        have, want = (f"{p.sigma_min:g} to {p.sigma_max:g}" for p in (guide, ours))
        raise InputError(f"fewer noise levels in {where}: {have} (needed are {want}). Choose a model of these levels.")


def check_guidable(classes, info: dict, where: str) -> None:
    """Refuses guidance without an unconditional half; a line on stderr where nobody says whether there is one."""
    remedy = "Give a second model (guide)" if where == "guidance" else "Give a second model (--guide MODEL)"
    if not classes:
        raise InputError(f"no unconditional half in {where}: the model has no classes. {remedy}.")
    training = info.get("training")
    training = training if isinstance(training, dict) else {}
    if training.get("method") is None:
        log.warning("guidance of somebody else's model: it needs one that was trained without its labels now and then")
    elif not training.get("label_drop"):
        raise InputError(f"no unconditional half in {where}: the model always saw its labels. {remedy}, or train it with --label-drop 0.1.")
