"""Which noise levels training and sampling visit: the Karras grid and the distributions over it."""

import math

import torch
from torch import Tensor

from fastcm.errors import InputError


def karras_sigma(index: Tensor, steps: Tensor | int, *, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Returns the noise level at `index` of a grid of `steps` levels, counted downwards: 0 is sigma_max, steps - 1 is sigma_min.

    Karras et al. 2022, equation 5. The Consistency Models paper counts the same grid upwards: its t_i is index steps - i.
    index may be fractional, and steps a tensor, so that compiled code sees no new constant when N grows.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = (high + index / (steps - 1) * (low - high)) ** rho
    return sigma.clamp(sigma_min, sigma_max)


def karras_index(sigma: Tensor, steps: Tensor | int, *, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """The inverse of `karras_sigma`: the fractional index of a noise level."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (sigma ** (1 / rho) - high) / (low - high) * (steps - 1)


def karras_grid(steps: int, *, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Returns the whole grid, [steps] float64, from sigma_max down to sigma_min."""
    if steps < 2:
        raise InputError(f"too few noise levels in steps: {steps}. Use 2 or more.")
    index = torch.arange(steps, dtype=torch.float64)
    return karras_sigma(index, steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def sampling_sigmas(steps: int, *, sigma_min: float, sigma_max: float, rho: float, transition: float | None = None) -> tuple[float, ...]:
    """The noise levels of a consistency sampler of `steps` calls where none are given: a Karras grid of steps + 1 levels without its
    last, so one call starts at sigma_max and two at sigma_max and the grid's middle. A truncated model's grid ends with a call at its
    transition, the second of two steps (Lee et al. 2024)."""
    if steps < 1:
        raise InputError(f"illegal value in --steps: {steps}. Use 1 or more.")
    if transition is not None and steps > 1:
        return tuple(karras_grid(steps, sigma_min=transition, sigma_max=sigma_max, rho=rho).tolist())
    return tuple(karras_grid(steps + 1, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)[:-1].tolist())


def log_normal(u: Tensor, *, P_mean: float, P_std: float) -> Tensor:
    """ln sigma ~ N(P_mean, P_std^2) from uniforms u [B] in (0, 1) (Karras et al. 2022, Table 1)."""
    return torch.exp(P_mean + P_std * normal_quantile(u.double())).float()


def normal_quantile(u: Tensor) -> Tensor:
    """The inverse of the standard normal distribution function, float64."""
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


def uniform_pair(u: Tensor, steps: Tensor | int, *, sigma_min: float, sigma_max: float, rho: float) -> tuple[Tensor, Tensor]:
    """Adjacent levels (sigma_hi, sigma_lo), each [B] fp32, with an index uniform over 0 .. N-2 (Consistency Models, Algorithms 2, 3)."""
    index = (u.double() * (steps - 1)).floor().clamp(max=steps - 2)
    return _pair(index, steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def log_normal_pair(
    u: Tensor, steps: Tensor | int, *, sigma_min: float, sigma_max: float, rho: float, P_mean: float, P_std: float
) -> tuple[Tensor, Tensor]:
    """Adjacent levels (sigma_hi, sigma_lo), each [B] fp32, from the discretised log-normal of iCT (Song & Dhariwal 2023, section 3.5).

    p(i) is proportional to erf((ln sigma_hi - P_mean) / (sqrt(2) P_std)) - erf((ln sigma_lo - P_mean) / (sqrt(2) P_std)). The sum
    telescopes: the draw is a log-normal truncated to [sigma_min, sigma_max] and binned to the grid. No table, and N may be a tensor.
    """
    first, last = (0.5 * (1 + math.erf((math.log(s) - P_mean) / (math.sqrt(2) * P_std))) for s in (sigma_min, sigma_max))
    sigma = torch.exp(P_mean + P_std * normal_quantile(first + u.double() * (last - first))).clamp(sigma_min, sigma_max)
    grid = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    index = karras_index(sigma, steps, **grid).floor().clamp(min=0).clamp(max=steps - 2)
    return _pair(index, steps, **grid)


def ect_pair(
    u: Tensor, stage: Tensor | int, *, P_mean: float, P_std: float, q: float, k: float, b: float, limit: float | None = None
) -> tuple[Tensor, Tensor]:
    """Levels (sigma_hi, sigma_lo) = (t, r), each [B] fp32, of Easy Consistency Tuning (Geng et al. 2024, section 3).

    t is log-normal; r = max(0, t (1 - n(t) / q^(stage + 1))) with n(t) = 1 + k sigmoid(-b t). The pair closes as the stage a grows;
    where it is wide open r is 0, and the target is the image itself.
    """
    t = log_normal(u, P_mean=P_mean, P_std=P_std)
    return t, ect_lower(t, stage, q=q, k=k, b=b, limit=limit)


def ect_lower(t: Tensor, stage: Tensor | int, *, q: float, k: float, b: float, limit: float | None = None) -> Tensor:
    """The lower level r [B] of ECT's pair whose higher one is t [B] (`ect_pair`). limit: the most that q^(stage + 1) becomes, by which
    Lee et al. 2024 end their first stages (as ratio_limit = 1 - 1 / limit in their code); None for none."""
    n, closeness = 1 + k * torch.sigmoid(-b * t), q ** (stage + 1)
    if limit is not None:
        closeness = closeness.clamp(max=limit) if isinstance(closeness, Tensor) else min(closeness, limit)
    return (t * (1 - n / closeness)).clamp(min=0)


class TruncatedStudentT:
    """ln sigma ~ P_mean + P_std T, T of Student's distribution with nu degrees of freedom, truncated to sigma from `low` to `high`
    (the second stage of Lee et al. 2024, 2410.14895). Called with uniforms u [B] it returns sigma [B] fp32.

    With T = sqrt(nu) sinh(y) the density (1 + T^2 / nu)^(-(nu + 1) / 2) dT is proportional to cosh(y)^-nu dy, which has no peak and no
    tail that a small nu would make steep: a table of its sum, made once, is inverted by interpolation.
    """

    NODES = 4097

    def __init__(self, *, nu: float, P_mean: float, P_std: float, low: float, high: float):
        self.P_mean, self.scale, self.low, self.high = P_mean, P_std * math.sqrt(nu), low, high
        ends = [math.asinh((math.log(sigma) - P_mean) / self.scale) for sigma in (low, high)]
        self.y = torch.linspace(*ends, self.NODES, dtype=torch.float64)
        log_density = -nu * self.y.cosh().log()
        density = (log_density - log_density.amax()).exp()  # its peak is 1, wherever the levels lie
        total = torch.cumulative_trapezoid(density, dim=0)
        self.distribution = torch.cat([torch.zeros_like(total[:1]), total / total[-1]])

    def __call__(self, u: Tensor) -> Tensor:
        u = u.double()
        right = torch.searchsorted(self.distribution, u).clamp(1, self.NODES - 1)
        before, after = self.distribution[right - 1], self.distribution[right]
        y = torch.lerp(self.y[right - 1], self.y[right], ((u - before) / (after - before)).clamp(0, 1))
        return torch.exp(self.P_mean + self.scale * y.sinh()).float().clamp(self.low, self.high)


def _pair(index: Tensor, steps: Tensor | int, *, sigma_min: float, sigma_max: float, rho: float) -> tuple[Tensor, Tensor]:
    hi, lo = (karras_sigma(i, steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).float() for i in (index, index + 1))
    return hi, lo
