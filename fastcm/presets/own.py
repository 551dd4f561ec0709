"""This project's own runs: the built-in data sets, and a user's pictures."""

from dataclasses import replace

from fastcm.consistency.denoiser import Preconditioning
from fastcm.data.dataset import Dataset
from fastcm.presets.settings import check_method, noise, objective
from fastcm.training.config import METHODS, ObjectiveConfig, OptimizerConfig, TrainConfig


def digits(method: str = "ict", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """The 1,797 real 8x8 digits of scikit-learn by class, minutes on two CPU cores. Source: this project's own runs.

    Beside the published losses: levels drawn higher (in one step all of the image is made at the highest ones) and fewer of them, and a
    learning rate and betas for thousands of steps rather than hundreds of thousands.
    """
    check_method("digits", method, METHODS)
    network = {
        "kind": "adm",
        "resolution": 8,
        "in_channels": 1,
        "out_channels": 1,
        "channels": 24,
        "channel_mult": (1, 2),
        "blocks": 1,
        "attention_resolutions": (4,),
        "head_channels": 24,
        "num_classes": 10,
        "resblock_updown": False,
    }
    optimizer = OptimizerConfig(kind="radam", lr=2e-3, betas=(0.9, 0.99), lr_decay="linear", ema_halflife_kimg=(30.0,), ema_rampup=0.1)
    loss = objective(method)
    if method == "ict":
        loss = replace(loss, P_mean=0.6, P_std=1.8, s1=40)
    if method == "cd":  # iCT's distance, weight and pairs, which need fewer steps than l2 here
        loss = replace(loss, distance="pseudo_huber", loss_weight="1/gap", pairs="log-normal", P_mean=0.6, P_std=1.8)
    if method in ("ect", "scd", "sct"):
        loss = replace(loss, P_mean=0.6, P_std=1.8)
    if method == "sct":
        loss = replace(loss, tangent_warmup_kimg=20.0)
    if method == "scd":
        loss = replace(smoothed(loss), tangent_warmup_kimg=4.0)
    return TrainConfig(
        preset="digits",
        method=method,
        data=data or "digits",
        network=network,
        noise=own_noise(method),
        objective=loss,
        optimizer=optimizer,
        duration_kimg={"edm": 150.0, "cd": 128.0}.get(method, 176.0),
        batch=64,
        resolution=8,
        teacher=teacher,
        precision=own_precision(method),
    )


def mnist(method: str = "ict", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """8,000 digits of MNIST, 28x28 pixels by class, on 2x2 patches: minutes on two CPU cores. Source: this project's own runs."""
    check_method("mnist", method, METHODS)
    network = {
        "kind": "adm",
        "resolution": 28,
        "in_channels": 1,
        "out_channels": 1,
        "patch": 2,
        "channels": 32,
        "channel_mult": (1, 2),
        "blocks": 1,
        "attention_resolutions": (7,),
        "head_channels": 32,
        "num_classes": 10,
        "resblock_updown": False,
    }
    optimizer = OptimizerConfig(kind="radam", lr=1e-3, betas=(0.9, 0.99), lr_decay="linear", ema_halflife_kimg=(30.0,), ema_rampup=0.1)
    loss = objective(method)
    if method == "ict":
        loss = replace(loss, P_mean=0.6, P_std=2.0, s1=40)
    if method == "cd":
        loss = replace(loss, distance="pseudo_huber", loss_weight="1/gap", pairs="log-normal", P_mean=0.6, P_std=2.0)
    if method in ("ect", "scd", "sct"):
        loss = replace(loss, P_mean=0.6, P_std=2.0)
    if method == "sct":
        loss = replace(loss, tangent_warmup_kimg=20.0)
    if method == "scd":
        loss = replace(smoothed(loss), tangent_warmup_kimg=4.0)
    return TrainConfig(
        preset="mnist",
        method=method,
        data=data or "mnist",
        network=network,
        noise=own_noise(method),
        objective=loss,
        optimizer=optimizer,
        duration_kimg=300.0,
        batch=64,
        resolution=28,
        teacher=teacher,
        precision=own_precision(method),
    )


def own_noise(method: str) -> Preconditioning:
    """That of `noise`, with an scd student that takes the c_noise of its diffusion teacher, made by the same preset."""
    return noise("edm") if method == "scd" else noise(method)


def smoothed(loss: ObjectiveConfig) -> ObjectiveConfig:
    """scd of an ADM teacher: a difference over 5 % of sigma in place of the derivative, which is mostly noise in 250 ln sigma."""
    return replace(loss, tangent="finite-difference", tangent_step=0.05)


def own_precision(method: str) -> str:
    """A difference needs fp32."""
    return "fp32" if method == "scd" else "auto"


def emoji32(method: str = "ict", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """1,432 emoji of 32x32 pixels in colour, unconditional, on a network of 1.2 M weights for two CPU cores. Source: this project's own.

    The settings are those of digits with wider levels of noise, for four times the resolution; they have not been searched.
    """
    check_method("emoji32", method, ("edm", "cd", "ict", "ect"))
    network = {
        "kind": "adm",
        "resolution": 32,
        "in_channels": 3,
        "out_channels": 3,
        "channels": 32,
        "channel_mult": (1, 2, 2),
        "blocks": 1,
        "attention_resolutions": (8,),
        "head_channels": 32,
        "num_classes": None,
        "resblock_updown": False,
    }
    optimizer = OptimizerConfig(kind="radam", lr=1e-3, betas=(0.9, 0.99), lr_decay="linear", ema_halflife_kimg=(20.0,), ema_rampup=0.1)
    loss = objective(method)
    if method == "ict":
        loss = replace(loss, P_mean=0.6, P_std=2.0, s1=40)
    if method == "cd":
        loss = replace(loss, distance="pseudo_huber", loss_weight="1/gap", pairs="log-normal", P_mean=0.6, P_std=2.0)
    if method == "ect":
        loss = replace(loss, P_mean=0.6, P_std=2.0)
    return TrainConfig(
        preset="emoji32",
        method=method,
        data=data or "emoji32",
        network=network,
        noise=noise(method),
        objective=loss,
        optimizer=optimizer,
        duration_kimg=128.0,
        batch=64,
        resolution=32,
        teacher=teacher,
    )


def emoji32_large(method: str = "ict", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """The emoji on a DDPM++ network of 35 M weights, for a GPU. Source: this project's own; the settings have not been searched.

    Losses as published, iCT's with a last grid of 320 levels.
    """
    check_method("emoji32-large", method, ("edm", "cd", "ict", "ect"))
    network = {
        "kind": "song",
        "resolution": 32,
        "in_channels": 3,
        "out_channels": 3,
        "channels": 128,
        "channel_mult": (2, 2, 2),
        "blocks": 2,
        "attention_resolutions": (16,),
        "dropout": 0.2,
        "num_classes": None,
    }
    optimizer = OptimizerConfig(kind="radam", lr=4e-4, lr_decay="linear", ema_halflife_kimg=(200.0,), ema_rampup=0.05)
    loss = objective(method)
    if method == "ict":
        loss = replace(loss, s1=320)
    return TrainConfig(
        preset="emoji32-large",
        method=method,
        data=data or "emoji32",
        network=network,
        noise=noise(method, kind="song"),
        objective=loss,
        optimizer=optimizer,
        duration_kimg=8000.0,
        batch=256,
        resolution=32,
        teacher=teacher,
        sample_every_kimg=500.0,
    )


def folder(method: str = "ict", *, dataset: Dataset, data: str, teacher: str | None = None) -> TrainConfig:
    """A user's own pictures: resolution, channels and classes from the data, width by resolution."""
    check_method("folder", method, METHODS)
    resolution = dataset.resolution
    levels = max(1, min(4, (resolution & -resolution).bit_length() - 3))  # halve down to 8 pixels, as far as the size divides
    width = 32 if resolution <= 16 else 64 if resolution <= 32 else 128
    network = {
        "kind": "adm",
        "resolution": resolution,
        "in_channels": dataset.channels,
        "out_channels": dataset.channels,
        "channels": width,
        "channel_mult": (1, 2, 2, 2)[:levels],
        "blocks": 1 if resolution <= 16 else 2,
        "head_channels": 32,
        "attention_resolutions": tuple(resolution >> level for level in range(1, levels) if resolution >> level <= 16),
        "num_classes": len(dataset.class_names) if dataset.class_names else None,
    }
    optimizer = OptimizerConfig(kind="radam", lr=4e-4, ema_halflife_kimg=(500.0,))
    return TrainConfig(
        preset="folder",
        method=method,
        data=data,
        network=network,
        noise=own_noise(method),
        objective=smoothed(objective(method)) if method == "scd" else objective(method),
        optimizer=optimizer,
        duration_kimg=5000.0,
        batch=128,
        resolution=resolution,
        teacher=teacher,
        sample_every_kimg=100.0,
        precision=own_precision(method),
    )
