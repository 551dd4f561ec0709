"""Every published run, one function each with its source: a method in, the run's settings out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastcm.consistency.denoiser import Preconditioning
from fastcm.errors import InputError, nearest
from fastcm.training.config import BOUNDARY_METHODS, CONTINUOUS_METHODS, METHODS, ObjectiveConfig, OptimizerConfig, TrainConfig
from fastcm.training.data import Dataset

DEFAULT = "digits"


def objective(method: str) -> ObjectiveConfig:
    """The method's published loss, without what depends on the data set.

    edm: Karras et al. 2022, Table 1. cd, ct: Song et al. 2023, Table 3 (CIFAR-10), with l2 where the paper's best uses LPIPS.
    ict: Song and Dhariwal 2023, Table 1, the grid's last size lowered for runs of thousands rather than hundreds of thousands of steps.
    ect: Geng et al. 2024, CIFAR-10: the pair closes by halves in eight stages. scd, sct: Lu and Song 2024, CIFAR-10.
    """
    return {
        "edm": ObjectiveConfig(P_mean=-1.2, P_std=1.2),
        "cd": ObjectiveConfig(curriculum="fixed", s0=18, s1=18, mu_schedule="fixed", mu0=0.0, solver="heun"),
        "ct": ObjectiveConfig(curriculum="progressive", s0=2, s1=150, mu_schedule="adaptive", mu0=0.9),
        "ict": ObjectiveConfig(
            distance="pseudo_huber", loss_weight="1/gap", pairs="log-normal", P_mean=-1.1, P_std=2.0,
            curriculum="doubling", s0=10, s1=160, mu_schedule="zero",
        ),
        "ect": ObjectiveConfig(
            distance="pseudo_huber", huber_c=0.0, loss_weight="1/gap", pairs="ect", P_mean=-1.1, P_std=2.0,
            curriculum="stages", s0=1, s1=8, mu_schedule="zero",
        ),
        "scd": ObjectiveConfig(P_mean=-1.0, P_std=1.4, tangent_warmup_kimg=5120.0),
        "sct": ObjectiveConfig(P_mean=-1.0, P_std=1.4, tangent_warmup_kimg=5120.0),
    }[method]  # fmt: skip


def digits(method: str = "ict", *, teacher: str | None = None) -> TrainConfig:
    """The 1,797 real 8x8 digits of scikit-learn by class, minutes on two CPU cores. Source: this project's own runs.

    Beside the published losses: levels drawn higher (in one step all of the image is made at the highest ones) and fewer of them, and a
    learning rate and betas for thousands of steps rather than hundreds of thousands.
    """
    _check_method(method)
    network = {
        "kind": "adm", "resolution": 8, "in_channels": 1, "out_channels": 1, "channels": 24, "channel_mult": (1, 2), "blocks": 1,
        "attention_resolutions": (4,), "head_channels": 24, "num_classes": 10, "resblock_updown": False,
    }  # fmt: skip
    optimizer = OptimizerConfig(kind="radam", lr=2e-3, betas=(0.9, 0.99), lr_decay="linear", ema_halflife_kimg=(30.0,), ema_rampup=0.1)
    loss = objective(method)
    if method == "ict":
        loss = replace(loss, P_mean=0.6, P_std=1.8, s1=40)
    if method == "cd":  # iCT's distance, weight and pairs, which need fewer steps than l2 here
        loss = replace(loss, distance="pseudo_huber", loss_weight="1/gap", pairs="log-normal", P_mean=0.6, P_std=1.8)
    if method in ("ect", "scd", "sct"):
        loss = replace(loss, P_mean=0.6, P_std=1.8)
    if method in CONTINUOUS_METHODS:
        loss = replace(loss, tangent_warmup_kimg=20.0)
    return TrainConfig(
        preset="digits", method=method, data="digits", network=network, noise=noise(method), objective=loss,
        optimizer=optimizer, duration_kimg={"edm": 150.0, "cd": 128.0}.get(method, 176.0), batch=64, resolution=8, teacher=teacher,
    )  # fmt: skip


def folder(method: str = "ict", *, dataset: Dataset, data: str, teacher: str | None = None) -> TrainConfig:
    """A user's own pictures: resolution, channels and classes from the data, width by resolution."""
    _check_method(method)
    resolution = dataset.resolution
    levels = max(1, min(4, (resolution & -resolution).bit_length() - 3))  # halve down to 8 pixels, as far as the size divides
    width = 32 if resolution <= 16 else 64 if resolution <= 32 else 128
    network = {
        "kind": "adm", "resolution": resolution, "in_channels": dataset.channels, "out_channels": dataset.channels, "channels": width,
        "channel_mult": (1, 2, 2, 2)[:levels], "blocks": 1 if resolution <= 16 else 2, "head_channels": 32,
        "attention_resolutions": tuple(resolution >> level for level in range(1, levels) if resolution >> level <= 16),
        "num_classes": len(dataset.class_names) if dataset.class_names else None,
    }  # fmt: skip
    optimizer = OptimizerConfig(kind="radam", lr=4e-4, ema_halflife_kimg=(500.0,))
    return TrainConfig(
        preset="folder", method=method, data=data, network=network, noise=noise(method), objective=objective(method),
        optimizer=optimizer, duration_kimg=5000.0, batch=128, resolution=resolution, teacher=teacher, sample_every_kimg=100.0,
    )  # fmt: skip


def noise(method: str) -> Preconditioning:
    """sigma from 0.002 to 80, sigma_data 0.5 (Song et al. 2023, Appendix C); diffusion models take the EDM form."""
    return Preconditioning(form="boundary" if method in BOUNDARY_METHODS else "edm")


PRESETS: dict[str, Callable[..., TrainConfig]] = {"digits": digits, "folder": folder}


def preset(name: str, *, method: str | None, **arguments: Any) -> TrainConfig:
    """The named preset for a method, or for its own where method is None."""
    if name not in PRESETS:
        raise InputError(f"unknown preset in PRESET: {name}. Use one of {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    config = PRESETS[name](**arguments) if method is None else PRESETS[name](method, **arguments)
    return replace(config)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise InputError(f"unknown value in --method: {method}. Use one of {', '.join(METHODS)}.{nearest(method, METHODS)}")
