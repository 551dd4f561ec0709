"""What presets are put together from: each method's published loss, the preconditioning, and a published run in its authors' units."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastcm.consistency.denoiser import FLOW_TIME, Preconditioning
from fastcm.errors import InputError, nearest
from fastcm.training.config import OptimizerConfig, TrainConfig
from fastcm.training.methods import BOUNDARY_METHODS, CONTINUOUS_METHODS, METHODS
from fastcm.training.objective_config import ObjectiveConfig

TRIGFLOW_TWO_STEP = 0.5 * math.tan(1.1)  # sigma of the second of scd's and sct's two steps, t = 1.1 (Lu and Song 2024, Appendix G)


def objective(method: str) -> ObjectiveConfig:
    """The method's published loss, without what depends on the data set.

    edm: Karras et al. 2022, Table 1. cd, ct: Song et al. 2023, Table 3 (CIFAR-10), with l2 where the paper's best uses LPIPS.
    ict: Song and Dhariwal 2023, Table 1, the grid's last size lowered for runs of thousands rather than hundreds of thousands of steps.
    ect: Geng et al. 2024, CIFAR-10: the pair closes by halves in eight stages. scd, sct: Lu and Song 2024, CIFAR-10.
    tcm: Lee et al. 2024, CIFAR-10: ECT's, with the pair as close from the start as its first stage ends (1 - r / t = 0.001 n(t)).
    meanflow: Geng et al. 2025 (2505.13447), appendix, CIFAR-10.
    """
    ect = ObjectiveConfig(
        distance="pseudo_huber",
        huber_c=0.0,
        loss_weight="1/gap",
        pairs="ect",
        P_mean=-1.1,
        P_std=2.0,
        curriculum="stages",
        s0=1,
        s1=8,
        mu_schedule="zero",
    )
    return {
        "edm": ObjectiveConfig(P_mean=-1.2, P_std=1.2, adaptive_weight=False),
        "cd": ObjectiveConfig(curriculum="fixed", s0=18, s1=18, mu_schedule="fixed", mu0=0.0, solver="heun"),
        "ct": ObjectiveConfig(curriculum="progressive", s0=2, s1=150, mu_schedule="adaptive", mu0=0.9),
        "ict": ObjectiveConfig(
            distance="pseudo_huber",
            loss_weight="1/gap",
            pairs="log-normal",
            P_mean=-1.1,
            P_std=2.0,
            curriculum="doubling",
            s0=10,
            s1=160,
            mu_schedule="zero",
        ),
        "ect": ect,
        "tcm": replace(ect, P_mean=0.0, P_std=0.2, s1=1, ect_q=1000.0),
        "scd": ObjectiveConfig(P_mean=-1.0, P_std=1.4, tangent_warmup_kimg=5120.0),
        "sct": ObjectiveConfig(P_mean=-1.0, P_std=1.4, tangent_warmup_kimg=5120.0),
        "meanflow": ObjectiveConfig(P_mean=-2.0, P_std=2.0, flow_share=0.25, weight_power=0.75, weight_c=1e-3),
    }[method]


def noise(method: str, *, kind: str = "adm") -> Preconditioning:
    """sigma from 0.002 to 80, sigma_data 0.5 (Song et al. 2023, Appendix C); diffusion models take the EDM form.

    kind: the network's, which has its convention of c_noise, and methods share it, so that a student can start from its teacher's
    weights. scd and sct take TrigFlow's t (Lu and Song 2024, section 4.1): in 250 ln sigma the derivative that they need is mostly that
    of the embedding's fast sines. An scd teacher is then trained with the same noise.c_noise, or the student takes its teacher's and
    objective.tangent finite-difference, as digits do. EDM2's published models have ln sigma / 4, which their students share.
    tcm's transition is that of its paper. meanflow takes flow matching's form and t.
    """
    c_noise = {"adm": "250 ln sigma", "song": "ln sigma / 4", "edm2": "ln sigma / 4"}[kind]
    if method in CONTINUOUS_METHODS and kind != "edm2":
        c_noise = "arctan(sigma / sigma_data)"
    if method == "meanflow":
        return Preconditioning(form="flow", c_noise=FLOW_TIME)
    form, transition = "boundary" if method in BOUNDARY_METHODS else "edm", 1.0 if method == "tcm" else None
    return Preconditioning(form=form, c_noise=c_noise, transition=transition)


def ema_halflife_kimg(decay: float, batch: int) -> float:
    """The half-life, in thousands of images, of an average that keeps the share `decay` of itself at each step of `batch` images."""
    return batch * math.log(0.5) / math.log(decay) / 1000


def check_method(preset: str, method: str, known: Collection[str]) -> None:
    """Refuses what is no method, and a method that the preset has no settings for."""
    if method not in METHODS:
        raise InputError(f"unknown value in --method: {method}. Use one of {', '.join(known)}.{nearest(method, known)}")
    if method not in known:
        raise InputError(f"no settings of the preset {preset} in --method: {method}. Use one of {', '.join(known)}.")


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run in its authors' units: steps of `batch` images, averages by their decay per step.

    ema_decays: the first is the model's. ema_halflife_kimg replaces them where a paper gives half-lives. two_step: the second noise level
    of the published two-step samples. lr_decay_kimg: where a rate begins to fall with the square root of the step; None: it does not.
    The other fields are TrainConfig's and OptimizerConfig's; no run decays its weights.
    """

    network: dict[str, Any]
    objective: ObjectiveConfig
    steps: float  # a quotient where a paper gives images
    batch: int
    lr: float
    ema_decays: tuple[float, ...] = ()
    ema_halflife_kimg: tuple[float, ...] = ()
    ema_rampup: float | None = None
    optimizer: str = "radam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lr_warmup_kimg: float = 0.0
    lr_decay_kimg: float | None = None
    ema_widths: tuple[float, ...] = ()
    snapshot_every_kimg: float | None = None
    flip: bool = True
    precision: str = "fp32"
    two_step: float | None = None
    c_noise: str | None = None  # of the model that it starts from, where that is not the method's own

    def config(self, preset: str, method: str, *, teacher: str | None, data: str | None) -> TrainConfig:
        halflives = tuple(ema_halflife_kimg(decay, self.batch) for decay in self.ema_decays)
        optimizer = OptimizerConfig(
            kind=self.optimizer,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            lr_warmup_kimg=self.lr_warmup_kimg,
            lr_decay="none" if self.lr_decay_kimg is None else "inverse-sqrt",
            lr_decay_kimg=self.lr_decay_kimg,
            ema_widths=self.ema_widths,
            snapshot_every_kimg=self.snapshot_every_kimg,
            ema_halflife_kimg=halflives or self.ema_halflife_kimg,
            ema_rampup=self.ema_rampup,
        )
        levels = noise(method, kind=self.network["kind"])
        levels = levels if self.c_noise is None else replace(levels, c_noise=self.c_noise)
        return TrainConfig(
            preset=preset,
            method=method,
            data=data or "",
            network=dict(self.network),
            noise=levels,
            objective=self.objective,
            optimizer=optimizer,
            duration_kimg=self.steps * self.batch / 1000,
            batch=self.batch,
            resolution=self.network["resolution"],
            flip=self.flip,
            precision=self.precision,
            teacher=teacher,
            checkpoint_every_s=600.0,
            sampling={} if self.two_step is None else {"2": [levels.sigma_max, self.two_step]},
        )


def published(preset: str, method: str, runs: Mapping[str, PublishedRun], *, teacher: str | None, data: str | None) -> TrainConfig:
    """The preset's run of `method`. Raises InputError for a method without published settings."""
    check_method(preset, method, runs)
    return runs[method].config(preset, method, teacher=teacher, data=data)
