"""One step of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma from sigma_hi to sigma_lo."""

from collections.abc import Callable

from torch import Tensor

from fastcm.consistency.denoiser import expand
from fastcm.errors import InputError, nearest

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def slope(denoise: Denoise, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """dx/dsigma at x [B, C, H, W] and sigma [B] (Karras et al. 2022, equation 1 with s(t) = 1, sigma(t) = t)."""
    return (x - denoise(x, sigma, labels)) / expand(sigma, x)


def euler_step(denoise: Denoise, x: Tensor, sigma_hi: Tensor, sigma_lo: Tensor, labels: Tensor | None = None) -> Tensor:
    """First order: one call of the denoiser. x [B, C, H, W] fp32, sigma_hi and sigma_lo [B] fp32."""
    return x + expand(sigma_lo - sigma_hi, x) * slope(denoise, x, sigma_hi, labels)


def heun_step(denoise: Denoise, x: Tensor, sigma_hi: Tensor, sigma_lo: Tensor, labels: Tensor | None = None) -> Tensor:
    """Second order: two calls (Karras et al. 2022, Algorithm 1 without churn). sigma_lo must be above 0."""
    d = slope(denoise, x, sigma_hi, labels)
    x_euler = x + expand(sigma_lo - sigma_hi, x) * d
    return x + expand(sigma_lo - sigma_hi, x) * (d + slope(denoise, x_euler, sigma_lo, labels)) / 2


STEPS = {"euler": euler_step, "heun": heun_step}


def solver_step(name: str) -> Callable[..., Tensor]:
    """Returns `euler_step` or `heun_step` by name."""
    if name not in STEPS:
        raise InputError(f"unknown value in objective.solver: {name}. Use one of {', '.join(STEPS)}.{nearest(name, STEPS)}")
    return STEPS[name]
