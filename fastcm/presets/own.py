"""This project's own runs: the built-in data sets, and a user's pictures."""

from dataclasses import replace
from typing import Any

from fastcm.consistency.denoiser import Preconditioning
from fastcm.data.dataset import Dataset
from fastcm.presets.settings import check_method, noise, objective
from fastcm.training.config import OptimizerConfig, TrainConfig
from fastcm.training.methods import METHODS
from fastcm.training.objective_config import ObjectiveConfig

LOWEST_SIDE = 8  # levels are added until one has at most so many places a side


def mnist(method: str = "cd", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """8,000 digits of MNIST, 28x28 pixels by class, on 2x2 patches: minutes on two CPU cores. Source: this project's own runs.

    Of minutes the best one-step images come from a teacher that is guided: cd, after an edm run of the preset's own.
    """
    check_method("mnist", method, METHODS)
    return TrainConfig(
        preset="mnist",
        method=method,
        data=data or "mnist",
        network=own_network(method, patch_network(28, channels=1, classes=10, width=32)),
        noise=own_noise(method),
        objective=distilling(own_objective(method), method, guidance=2.5 if teacher is None else 1.0),
        optimizer=own_optimizer(method),
        duration_kimg={"edm": 70.0, "cd": 24.0}.get(method, 100.0),
        batch=32,
        resolution=28,
        teacher=teacher,
        precision="fp32",
    )


def digits(method: str = "ict", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """The 1,797 real 8x8 digits of scikit-learn by class, minutes on two CPU cores. Source: this project's own runs."""
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
    return TrainConfig(
        preset="digits",
        method=method,
        data=data or "digits",
        network=own_network(method, network),
        noise=own_noise(method),
        objective=own_objective(method, P_std=1.8, s1=40),
        optimizer=own_optimizer(method, lr=2e-3),
        duration_kimg={"edm": 150.0, "cd": 128.0}.get(method, 176.0),
        batch=64,
        resolution=8,
        teacher=teacher,
        precision="fp32",  # narrow layers: on a CPU that multiplies bf16 a step in it takes longer
    )


def own_objective(method: str, *, P_std: float = 2.0, s1: int = 20) -> ObjectiveConfig:
    """The method's loss for runs of hundreds of thousands of images rather than hundreds of millions.

    Beside the published losses: levels drawn higher (in one step all of the image is made at the highest ones) and fewer of them.
    """
    changes = {
        "ict": {"s1": s1},
        # iCT's distance, weight and pairs, which need fewer steps than l2 here.
        "cd": {"distance": "pseudo_huber", "loss_weight": "1/gap", "pairs": "log-normal"},
        # Pairs as wide as ect's second stage: closer ones carry the first stage's images upwards too slowly for runs of minutes.
        "tcm": {"ect_q": 4.0, "tcm_nu": 1e4, "P_mean": 1.5, "P_std": 1.5},
        "sct": {"tangent_warmup_kimg": 20.0},
        # Wider levels: of two draws the lower has to come near 0, where a sample's trajectory ends, and the higher near where it starts.
        "meanflow": {"P_mean": -1.0, "P_std": 2.6},
        # An ADM teacher's scd: a difference over 5 % of sigma in place of the derivative, which is mostly noise in 250 ln sigma.
        "scd": {"tangent": "finite-difference", "tangent_step": 0.05, "tangent_warmup_kimg": 4.0},
    }.get(method, {})
    levels = {} if method in ("edm", "ct", "tcm", "meanflow") else {"P_mean": 0.6, "P_std": P_std}
    return replace(objective(method), **levels, **changes)


def distilling(loss: ObjectiveConfig, method: str, *, guidance: float) -> ObjectiveConfig:
    """The loss; cd's with Euler's steps, which cost one call of the teacher for Heun's two and lose nothing here, and with the guidance
    that a teacher of the preset's own is trained for: the shorter it is trained, the more of it."""
    return replace(loss, solver="euler", guidance=guidance) if method == "cd" else loss


def own_network(method: str, network: dict[str, Any]) -> dict[str, Any]:
    """The network with a second time where the method needs one."""
    return {**network, "second_time": "gap"} if method == "meanflow" else network


def own_optimizer(method: str, *, lr: float = 1e-3) -> OptimizerConfig:
    """A learning rate and betas for thousands of steps rather than hundreds of thousands, and an average that widens with the run. tcm
    takes half the rate, as published."""
    lr = lr / 2 if method == "tcm" else lr
    return OptimizerConfig(kind="radam", lr=lr, betas=(0.9, 0.99), lr_decay="linear", ema_halflife_kimg=(30.0,), ema_rampup=0.1)


def own_noise(method: str) -> Preconditioning:
    """That of `noise`, with an scd student that takes the c_noise of its diffusion teacher, made by the same preset."""
    return noise("edm") if method == "scd" else noise(method)


def patch_network(resolution: int, *, channels: int, classes: int | None, width: int, blocks: int = 1) -> dict[str, Any]:
    """An ADM network whose first level has at most 64 places a side, its lowest one 4 to 8, where it attends.

    Patches of 2 beyond 16 pixels, of 4 beyond 64, of 8 beyond 256; sizes that do not halve evenly are padded inside the network.
    """
    patch = 1 if resolution <= 16 else 2 if resolution <= 64 else 4 if resolution <= 256 else 8
    side, levels = -(-resolution // patch), 1
    while -(-side // 2 ** (levels - 1)) > LOWEST_SIDE or (levels == 1 and side >= LOWEST_SIDE):
        levels += 1
    lowest = -(-side // 2 ** (levels - 1))
    return {
        "kind": "adm",
        "resolution": resolution,
        "in_channels": channels,
        "out_channels": channels,
        "patch": patch,
        "channels": width,
        "channel_mult": (1, 2, 2, 2, 2, 2)[:levels],
        "blocks": blocks,
        "attention_resolutions": (lowest,),
        "head_channels": 32,
        "num_classes": classes,
        "resblock_updown": False,
    }


def emoji32(method: str = "ict", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """1,432 emoji of 32x32 pixels in colour, unconditional, on 2x2 patches. Source: this project's own; not searched."""
    check_method("emoji32", method, ("edm", "cd", "ict", "ect"))
    return TrainConfig(
        preset="emoji32",
        method=method,
        data=data or "emoji32",
        network=patch_network(32, channels=3, classes=None, width=64),
        noise=noise(method),
        objective=own_objective(method),
        optimizer=own_optimizer(method),
        duration_kimg=400.0,
        batch=32,
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
    """A user's own pictures: resolution, channels and classes from the data, the network by `patch_network`.

    The width follows the resolution and the number of pictures; losses and optimizer are mnist's, for runs of an hour on two cores as
    well as for longer ones: the average widens and the learning rate falls with the run's length.
    """
    check_method("folder", method, METHODS)
    resolution, many = dataset.resolution, len(dataset) >= 50_000
    width = (64 if many else 32) if resolution <= 32 else (96 if many else 64)
    classes = len(dataset.class_names) if dataset.class_names else None
    return TrainConfig(
        preset="folder",
        method=method,
        data=data,
        network=own_network(method, patch_network(resolution, channels=dataset.channels, classes=classes, width=width)),
        noise=own_noise(method),
        objective=distilling(own_objective(method), method, guidance=1.5 if teacher is None else 1.0),
        optimizer=replace(own_optimizer(method), ema_halflife_kimg=(500.0,)),
        duration_kimg=400.0 if resolution <= 64 else 1000.0,
        batch=32,
        resolution=resolution,
        teacher=teacher,
        sample_every_kimg=20.0,
        precision="fp32" if method == "scd" else "auto",  # a difference needs fp32
    )
