"""The model that a run starts from or learns from: its network's settings, how it has to agree with the run, its weights."""

import json
from dataclasses import fields, replace
from typing import Any

from torch import nn

from fastcm import networks
from fastcm.consistency.denoiser import C_NOISE, FLOW_TIME, STEPS, Denoiser
from fastcm.data.dataset import Dataset
from fastcm.errors import InputError
from fastcm.generation.generator import class_names
from fastcm.generation.guided import check_levels
from fastcm.generation.request import is_diffusion
from fastcm.training.config import TrainConfig
from fastcm.training.methods import CONTINUOUS_METHODS, DIFFERENTIATED_METHODS, form_of
from fastcm.weights.model_folder import network_config

DIFFERENCE_STEP = 0.05  # of ln(sigma): a derivative in a chain's step is mostly that of the embedding's fast sines
SMOOTH_C_NOISE = tuple(name for name in C_NOISE if name not in ("250 ln sigma", *STEPS))
# What a run decides itself on another model's network: its images and classes, and what is no part of the weights.
OWN_FIELDS = ("resolution", "in_channels", "out_channels", "num_classes", "second_time", "dropout", "dropout_resolution", "checkpoint")
ZERO_AT_FIRST = ("guidance_embed.", "second_embed.")  # layers that a model without them can start: new, they add nothing
CLASS_TABLES = ("label_emb.", "map_label.", "emb_label.", "class_embedding.")  # the layers whose shape follows the number of classes


def like(config: TrainConfig, model: Denoiser, *, teacher: Denoiser | None = None) -> TrainConfig:
    """The run's settings with the network of `model`, for the run's own images and classes, and with the noise of that network, or of the
    teacher where there is one: its levels, how it is told them, and what it predicts, in the form that the method trains.

    scd and sct, which differentiate by c_noise, keep their own, which `check_against` compares, where the EDM form lets them; from other
    forms they take differences, in fp32. meanflow takes the model's, with differences where its sines are fast, and adds the second time.
    Networks of users' own change nothing.
    """
    theirs = network_config(model.network)
    if theirs["kind"] not in networks.KINDS:
        return config
    config_class, _ = networks.KINDS[theirs["kind"]]
    own = {f.name: config.network.get(f.name, f.default) for f in fields(config_class) if f.name in OWN_FIELDS}
    noise = (teacher or model).preconditioning
    if config.method == "meanflow" and "second_time" in own:
        own["second_time"] = theirs["second_time"] or ("gap" if noise.c_noise == FLOW_TIME else "end")
    config = replace(config, network={**theirs, **own})
    if config.method in DIFFERENTIATED_METHODS and config.objective.tangent != "finite-difference":
        if config.method in CONTINUOUS_METHODS and noise.base == "edm":
            return config
        if config.method in CONTINUOUS_METHODS or noise.c_noise not in SMOOTH_C_NOISE:
            differences = replace(config.objective, tangent="finite-difference", tangent_step=DIFFERENCE_STEP)
            config = replace(config, objective=differences, precision="fp32")
    own = {"form": form_of(config.method, noise.base), "transition": config.noise.transition}
    return replace(config, noise=replace(noise, **own))


def check_images(info: dict[str, Any], dataset: Dataset, option: str, *, answers: bool = True) -> None:
    """Refuses a teacher or first model of other images than the run's, and one that `answers` in training of other classes.

    info: the model's config.json.
    """
    expected = {"resolution": dataset.resolution, "channels": dataset.channels, "number of classes": len(dataset.class_names or ())}
    found = {"resolution": info.get("resolution"), "channels": info.get("channels"), "number of classes": len(info.get("classes") or ())}
    for field, want in expected.items():
        if found[field] != want and (answers or field != "number of classes"):
            raise InputError(f"another {field} in {option}: {found[field]} (the run has {want}). Choose a model of the run's data.")


def check_guide(guide: Denoiser, info: dict[str, Any], config: TrainConfig, dataset: Dataset) -> None:
    """Refuses a guide of other images than the run's, of other classes where it has any, or of fewer noise levels."""
    check_images(info if class_names(guide, info) else {**info, "classes": dataset.class_names}, dataset, "--guide")
    check_levels(guide.preconditioning, config.noise, "--guide")


def check_against(model: Denoiser, info: dict[str, Any], config: TrainConfig, dataset: Dataset, option: str) -> None:
    """Refuses a teacher or first model whose images, classes or noise range differ from the run's."""
    first_stage = config.method == "tcm" and option == "--init"
    check_images(info, dataset, option, answers=option == "--teacher" or first_stage)
    if first_stage and (is_diffusion(info, model.preconditioning) or model.preconditioning.transition is not None):
        raise InputError(f"not a first stage in {option}: {config.init}. Give a consistency model of all levels, made by ect or ict.")
    theirs, ours = model.preconditioning, config.noise
    if theirs.base != ours.base:
        own = form_of(config.method, theirs.base)
        raise InputError(f"another form in {option}: {theirs.form} (the run has {ours.form}). Pass --set noise.form={own}.")
    # A run within the levels of its teacher needs nothing of it beyond; sigma_data is a choice of the boundary in all forms but EDM's.
    same = {
        "sigma_min": ours.sigma_min >= theirs.sigma_min,
        "sigma_max": ours.sigma_max <= theirs.sigma_max,
        "sigma_data": ours.sigma_data == theirs.sigma_data or ours.base != "edm",
        "c_noise": ours.c_noise == theirs.c_noise and ours.betas == theirs.betas,
    }
    for field, fits in same.items():
        have, want = getattr(theirs, field), getattr(ours, field)
        if not fits:
            raise InputError(f"another {field} in {option}: {have} (the run has {want}). Pass --set noise.{field}={json.dumps(have)}.")


def copy_weights(network: nn.Module, source: nn.Module, option: str) -> str | None:
    """Fills the network with another's weights; its class table stays as it is where that is of another number of classes,
    and the layer of a second time where the other has none.

    Returns the line that says so. Raises InputError naming up to three tensors of other names or shapes.
    """
    own = network.state_dict()
    state = {name: value for name, value in own.items() if name.startswith(ZERO_AT_FIRST)}
    state |= {name.removeprefix("_orig_mod."): value for name, value in source.state_dict().items()}
    wrong = [name for name in {**own, **state} if name not in state or name not in own or state[name].shape != own[name].shape]
    anew = bool(wrong) and all(name.startswith(CLASS_TABLES) for name in wrong)
    if wrong and not anew:
        raise InputError(
            f"another architecture in {option}: {', '.join(wrong[:3])}. Leave the network's settings out: they are taken from the model."
        )
    kept = {name: value for name, value in own.items() if anew and name.startswith(CLASS_TABLES)}
    network.load_state_dict({**{name: value for name, value in state.items() if name in own}, **kept})
    return f"another number of classes in {option}: the class table starts anew, all other weights are the model's" if anew else None
