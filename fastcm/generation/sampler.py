"""From noise to images: one call of a consistency model, several calls, and the ODE solvers that diffusion teachers need.

A *level* is a denoiser at one fixed noise level: a callable `level(x, labels) -> D` with `level.sigma`, a float (see frozen.py).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastcm import kernels
from fastcm.consistency.betas import Betas
from fastcm.consistency.noise_schedule import karras_grid
from fastcm.consistency.solver import Denoise, euler_step, heun_step, slope
from fastcm.errors import InputError, nearest

SAMPLING_STREAM = 16  # the noise before step j of a sample is stream 16 + j, its first noise stream 16: public numbers
TEACHER_STEPS = 18


class Level(Protocol):
    sigma: float

    def __call__(self, x: Tensor, labels: Tensor | None) -> Tensor: ...


class SeedNoise:
    """Noise of a batch of seeds, int64 [B]: image b depends on seeds[b] alone, whatever its batch or device."""

    def __init__(self, seeds: Tensor, shape: tuple[int, int, int]):
        self.seeds = seeds
        self.position = torch.zeros_like(seeds)
        self.shape = tuple(shape)

    def normal(self, step: int) -> Tensor:
        """The unit normal noise before `step`, fp32 [B, C, H, W]."""
        return kernels.normal(self.seeds, self.position, self.shape, stream=SAMPLING_STREAM + step)

    def renoise(self, D_x: Tensor, sigma: float, *, step: int, sigma_min: float, clip: bool) -> Tensor:
        """D_x, clipped, lifted back to noise level sigma."""
        sigmas = torch.full((D_x.shape[0],), sigma, device=D_x.device)
        return kernels.renoise(D_x, self.seeds, self.position, sigmas, step=step, sigma_min=sigma_min, clip=clip)


class GivenNoise:
    """Noise handed over: a unit normal field per step, each fp32 [B, C, H, W] (what an exported graph takes)."""

    def __init__(self, fields: Sequence[Tensor]):
        self.fields = fields

    def normal(self, step: int) -> Tensor:
        return self.fields[step]

    def renoise(self, D_x: Tensor, sigma: float, *, step: int, sigma_min: float, clip: bool) -> Tensor:
        # Consistency Models, Algorithm 1: x ~ N(D, sigma^2 - sigma_min^2).
        D_x = D_x.clamp(-1, 1) if clip else D_x
        return D_x + (sigma**2 - sigma_min**2) ** 0.5 * self.normal(step)


Noise = SeedNoise | GivenNoise


def onestep(level: Level, noise: Noise, *, labels: Tensor | None = None, clip: bool = True) -> Tensor:
    """D(sigma z, sigma), fp32 [B, C, H, W]: one call of a consistency model, from pure noise of the level's sigma."""
    D_x = level(level.sigma * noise.normal(0), labels)
    return D_x.clamp(-1, 1) if clip else D_x


def multistep(levels: Sequence[Level], noise: Noise, *, sigma_min: float, labels: Tensor | None = None, clip: bool = True) -> Tensor:
    """Multistep consistency sampling (Consistency Models, Algorithm 1), fp32 [B, C, H, W].

    The first level starts from pure noise; before each further level j the image is clipped and renoised with the stream of step j.
    With one level this is `onestep`.
    """
    D_x = levels[0](levels[0].sigma * noise.normal(0), labels)
    for step, level in enumerate(levels[1:], start=1):
        D_x = level(noise.renoise(D_x, level.sigma, step=step, sigma_min=sigma_min, clip=clip), labels)
    return D_x.clamp(-1, 1) if clip else D_x


def teacher_grid(steps: int, *, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """The Karras grid of `steps` levels and the 0 where a diffusion sampler ends (Karras et al. 2022, equation 5): steps + 1 numbers."""
    levels = [sigma_max] if steps == 1 else karras_grid(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).tolist()
    return [*levels, 0.0]


def _clipped(denoise: Denoise, clip: bool) -> Denoise:
    return (lambda x, sigma, labels: denoise(x, sigma, labels).clamp(-1, 1)) if clip else denoise


def _batch(sigma: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)


class Churn(NamedTuple):
    """Fresh noise between the steps of an ODE solver (Karras et al. 2022, Algorithm 2): S_churn, S_tmin, S_tmax and S_noise."""

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def applied(self, x: Tensor, sigma: float, noise: Noise, *, step: int, steps: int) -> tuple[Tensor, float]:
        """Raises the noise level before a step (lines 4-6 of the algorithm): returns (x, sigma_hat).

        gamma = min(amount / (n - 1), sqrt(2) - 1) with n the number of grid levels, as published for consistency models.
        """
        gamma = min(self.amount / max(steps - 1, 1), 2**0.5 - 1) if self.low <= sigma <= self.high else 0.0
        if gamma == 0:
            return x, sigma
        sigma_hat = sigma * (1 + gamma)
        return x + self.noise * (sigma_hat**2 - sigma**2) ** 0.5 * noise.normal(step + 1), sigma_hat


CALM = Churn()


def euler(denoise: Denoise, noise: Noise, grid: Sequence[float], *, labels: Tensor | None = None, clip: bool = True) -> Tensor:
    """Deterministic Euler along the probability-flow ODE, one call per step."""
    denoise, x = _clipped(denoise, clip), grid[0] * noise.normal(0)
    for hi, lo in zip(grid, grid[1:], strict=False):
        x = euler_step(denoise, x, _batch(hi, x), _batch(lo, x), labels)
    return x.clamp(-1, 1) if clip else x


def heun(
    denoise: Denoise, noise: Noise, grid: Sequence[float], *, labels: Tensor | None = None, clip: bool = True, churn: Churn = CALM
) -> Tensor:
    """Heun's method with optional churn (Karras et al. 2022, Algorithm 2): two calls per step, one for the last step to 0."""
    denoise, x = _clipped(denoise, clip), grid[0] * noise.normal(0)
    for step, (sigma, lo) in enumerate(zip(grid, grid[1:], strict=False)):
        x, hi = churn.applied(x, sigma, noise, step=step, steps=len(grid) - 1)
        x = (heun_step if lo > 0 else euler_step)(denoise, x, _batch(hi, x), _batch(lo, x), labels)
    return x.clamp(-1, 1) if clip else x


def dpm(
    denoise: Denoise, noise: Noise, grid: Sequence[float], *, labels: Tensor | None = None, clip: bool = True, churn: Churn = CALM
) -> Tensor:
    """The midpoint method with sigma_mid = ((hi^(1/3) + lo^(1/3)) / 2)^3 and optional churn: two calls per step, the last included."""
    denoise, x = _clipped(denoise, clip), grid[0] * noise.normal(0)
    for step, (sigma, lo) in enumerate(zip(grid, grid[1:], strict=False)):
        x, hi = churn.applied(x, sigma, noise, step=step, steps=len(grid) - 1)
        mid = ((hi ** (1 / 3) + lo ** (1 / 3)) / 2) ** 3
        x_mid = euler_step(denoise, x, _batch(hi, x), _batch(mid, x), labels)
        x = x + (lo - hi) * slope(denoise, x_mid, _batch(mid, x), labels)
    return x.clamp(-1, 1) if clip else x


def ancestral(denoise: Denoise, noise: Noise, grid: Sequence[float], *, labels: Tensor | None = None, clip: bool = True) -> Tensor:
    """Euler to sigma_down, then fresh noise of sigma_up: sigma_up^2 = lo^2 (hi^2 - lo^2) / hi^2, sigma_down^2 = lo^2 - sigma_up^2."""
    denoise, x = _clipped(denoise, clip), grid[0] * noise.normal(0)
    for step, (hi, lo) in enumerate(zip(grid, grid[1:], strict=False)):
        up = (lo**2 * (hi**2 - lo**2) / hi**2) ** 0.5
        down = (lo**2 - up**2) ** 0.5
        x = euler_step(denoise, x, _batch(hi, x), _batch(down, x), labels)
        if up > 0:
            x = x + up * noise.normal(step + 1)
    return x.clamp(-1, 1) if clip else x


class ChainSteps(NamedTuple):
    """Which steps of a discrete chain `ddim` visits, by the settings of diffusers' DDIMScheduler of the same names.

    clip: the largest pixel of the denoised image, None for no limit.
    """

    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip: float | None = 1.0

    def pairs(self, betas: Betas, steps: int) -> list[tuple[float, float]]:
        """(sigma, sigma of the step it leads to) of each of `steps` calls, from the noisiest on. Raises InputError for too many steps.

        Each leads to the step steps_of_the_chain // steps before it, as there, even where the spacing visits another one next.
        """
        levels, total = betas.levels().tolist(), betas.steps
        if betas.schedule == "continuous":
            raise InputError("no discrete chain for ddim in noise.betas: continuous. Use --sampler heun.")
        if steps > total:
            raise InputError(f"too many steps for ddim in --steps: {steps}. The chain has {total}.")
        if self.timestep_spacing == "linspace":
            visited = [round(i * (total - 1) / max(steps - 1, 1)) for i in range(steps)][::-1]
        elif self.timestep_spacing == "trailing":
            visited = [round(total - i * total / steps) - 1 for i in range(steps)]
        else:
            visited = [i * (total // steps) + self.steps_offset for i in range(steps)][::-1]
        if visited[0] >= len(levels):
            remedy = "give fewer steps" if visited[0] >= total else "its noise level is infinite; use another sampler"
            raise InputError(f"step beyond the chain for ddim in --steps: {visited[0]} of {total}. Please {remedy}.")
        last = 0.0 if self.set_alpha_to_one else levels[0]
        before = [index - total // steps for index in visited]
        return [(levels[index], levels[lower] if lower >= 0 else last) for index, lower in zip(visited, before, strict=True)]


def ddim(
    denoise: Denoise, noise: Noise, pairs: Sequence[tuple[float, float]], *, labels: Tensor | None = None, clip: float | None = 1.0
) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, equation 12 with eta = 0) as diffusers has it: x_lo = clip(D) + sigma_lo (x - D) / sigma_hi.

    The chain's own variable is x / sqrt(1 + sigma^2), which begins as unit noise and keeps its value where the next call is at another
    level than this one led to. One call per pair of `ChainSteps.pairs`.
    """
    x, level = noise.normal(0), 0.0  # in the chain's variable at first
    for hi, lo in pairs:
        x = x * ((1 + hi**2) / (1 + level**2)) ** 0.5
        D_x = denoise(x, _batch(hi, x), labels)
        x, level = (D_x if clip is None else D_x.clamp(-clip, clip)) + lo / hi * (x - D_x), lo
    return (x / (1 + level**2) ** 0.5).clamp(-1, 1)


TEACHER_SAMPLERS: dict[str, Callable[..., Tensor]] = {"heun": heun, "euler": euler, "dpm": dpm, "ancestral": ancestral, "ddim": ddim}
CHURNED = ("heun", "dpm")
SAMPLERS = ("consistency", *TEACHER_SAMPLERS)


def teacher_sampler(name: str) -> Callable[..., Tensor]:
    """Returns heun, euler, dpm, ancestral or ddim by name."""
    if name not in TEACHER_SAMPLERS:
        raise InputError(f"unknown value in --sampler: {name}. Use one of {', '.join(SAMPLERS)}.{nearest(name, SAMPLERS)}")
    return TEACHER_SAMPLERS[name]
