"""What changes from step to step: learning rate, averages' decays, N(k), mu(k) and the levels of noise, all functions of nimg."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcm.consistency import curriculum, noise_schedule
from fastcm.training.config import OptimizerConfig, TrainConfig
from fastcm.training.objective_config import ObjectiveConfig
from fastcm.training.power_average import power_decay


@dataclass(frozen=True)
class StepValues:
    """The host-side scalars of one step."""

    lr: float
    ema_decays: tuple[float, ...]
    steps: int  # N, the number of noise levels; ECT's stage
    mu: float
    tangent_warmup: float  # r of continuous-time methods


def step_values(config: TrainConfig, nimg: int) -> StepValues:
    """The values for the step that begins after `nimg` images."""
    total_nimg = round(config.duration_kimg * 1000)
    progress = min(nimg / total_nimg, 1.0)
    objective = config.objective
    steps = curriculum.discretization_steps(objective.curriculum, progress, s0=objective.s0, s1=objective.s1)
    mu = curriculum.target_decay(objective.mu_schedule, steps, s0=objective.s0, mu0=objective.mu0)
    decays = [ema_decay(config.optimizer, halflife, nimg=nimg, batch=config.batch) for halflife in config.optimizer.ema_halflife_kimg]
    decays += [power_decay(width, nimg // config.batch + 1) for width in config.optimizer.ema_widths]
    warmup_nimg = objective.tangent_warmup_kimg * 1000
    warmup = 1.0 if warmup_nimg == 0 else min(nimg / warmup_nimg, 1.0)
    return StepValues(learning_rate(config.optimizer, nimg=nimg, total_nimg=total_nimg), tuple(decays), steps, mu, warmup)


def learning_rate(optimizer: OptimizerConfig, *, nimg: int, total_nimg: int) -> float:
    """Linear rise over lr_warmup_kimg, then constant, linear to zero at the end of the run, or as 1 / sqrt(nimg) after lr_decay_kimg."""
    rise = 1.0 if optimizer.lr_warmup_kimg == 0 else min(nimg / (optimizer.lr_warmup_kimg * 1000), 1.0)
    fall = max(1 - nimg / total_nimg, 0.0) if optimizer.lr_decay == "linear" else 1.0
    if optimizer.lr_decay == "inverse-sqrt":
        fall = max(nimg / (optimizer.lr_decay_kimg * 1000), 1.0) ** -0.5
    return optimizer.lr * rise * fall


def ema_decay(optimizer: OptimizerConfig, halflife_kimg: float, *, nimg: int, batch: int) -> float:
    """0.5^(batch / half-life); the half-life is at most `ema_rampup` of the images seen, so that the first weights are forgotten."""
    halflife_nimg = halflife_kimg * 1000
    if optimizer.ema_rampup is not None:
        halflife_nimg = min(halflife_nimg, max(nimg, 1) * optimizer.ema_rampup)
    return 0.5 ** (batch / halflife_nimg)


def sigma_pair(config: TrainConfig, u: Tensor, steps: Tensor | int) -> tuple[Tensor, Tensor]:
    """The two noise levels (sigma_hi, sigma_lo), each [B] fp32, from uniforms u [B]. steps: N, or ECT's stage;
    a tensor [] where compiled code should see no new constant."""
    noise, objective = config.noise, config.objective
    grid = {"sigma_min": noise.sigma_min, "sigma_max": noise.sigma_max, "rho": noise.rho}
    if objective.pairs == "uniform":
        return noise_schedule.uniform_pair(u, steps, **grid)
    if objective.pairs == "ect":
        return noise_schedule.ect_pair(u, steps, P_mean=objective.P_mean, P_std=objective.P_std, **objective.ect_map)
    return noise_schedule.log_normal_pair(u, steps, **grid, P_mean=objective.P_mean, P_std=objective.P_std)


def truncated_pair(
    config: TrainConfig, levels: noise_schedule.TruncatedStudentT, u: Tensor, steps: Tensor | int
) -> tuple[Tensor, Tensor, Tensor]:
    """tcm's two levels (sigma_hi, sigma_lo) and what each sample's loss counts, each [B] fp32, from uniforms u [B] (Lee et al. 2024, 4.2).

    The share tcm_share of all samples has its higher level at the transition, the boundary, the others have theirs from `levels`. In the
    mean over the batch the counts give the mean over the others and tcm_weight times the mean over the boundary.
    """
    objective, share = config.objective, config.objective.tcm_share
    at_boundary = u < share
    drawn = levels(((u.double() - share) / (1 - share)).clamp(min=0))
    sigma_hi = torch.where(at_boundary, config.noise.transition, drawn)
    sigma_lo = noise_schedule.ect_lower(sigma_hi, steps, **objective.ect_map)
    counts = torch.where(at_boundary, objective.tcm_weight / max(share, 1e-9), 1 / (1 - share))
    return sigma_hi, sigma_lo.float(), counts.float()


def flow_pair(objective: ObjectiveConfig, u: Tensor, u_end: Tensor, u_share: Tensor) -> tuple[Tensor, Tensor]:
    """The levels (sigma, sigma_end) [B] fp32 of MeanFlow's times t >= r from uniforms [B] (Geng et al. 2025, section 4.3).

    ln sigma is the logit of t = sigma / (1 + sigma): the paper's logit-normal draw is a log-normal one of sigma. Of two draws the larger is
    t and the smaller r, which in a share of the samples is then t itself.
    """
    one, other = sigma_draw(objective, u), sigma_draw(objective, u_end)
    sigma = torch.maximum(one, other)
    return sigma, torch.where(u_share < objective.flow_share, sigma, torch.minimum(one, other))


def sigma_draw(objective: ObjectiveConfig, u: Tensor) -> Tensor:
    """Noise levels [B] fp32 of diffusion and of continuous-time consistency training."""
    return noise_schedule.log_normal(u, P_mean=objective.P_mean, P_std=objective.P_std)
