"""Guidance: a denoiser carried beyond itself, away from one that knows less, between two noise levels."""

import torch
from torch import Tensor, nn

from fastcm.consistency.denoiser import expand
from fastcm.consistency.solver import Denoise
from fastcm.errors import InputError
from fastcm.networks.checks import is_number

NO_CLASS = -1  # the label that adds no class embedding


def guided(
    denoise: Denoise,
    x: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    *,
    weight: Tensor | float,
    interval: tuple[float, float] | None = None,
    guide: Denoise | None = None,
) -> Tensor:
    """D_w = D_u + w (D_c - D_u), fp32 [B, C, H, W]: classifier-free guidance (Ho and Salimans 2022, 2207.12598, whose weight is w - 1).

    x, sigma, labels: as `denoise` takes them; labels may be None beside a guide alone. weight: w, or w of each sample, fp32 [B]; 1 is none.
    interval: w where low < sigma <= high, 1 elsewhere (the guidance interval of Kynkäänniemi et al. 2024, 2404.07724).
    guide: what D_u comes from, at the same labels (autoguidance: Karras et al. 2024, 2406.02507, equation 3); None: `denoise` itself
    without the labels, both halves in one call.
    """
    w = weight if isinstance(weight, Tensor) else torch.full_like(sigma, weight)
    if interval is not None:
        w = torch.where((sigma > interval[0]) & (sigma <= interval[1]), w, 1.0)
        # On the host a look is free, and spares the second half. A tensor without memory, of an estimate, has nothing to look at.
        if type(w) is Tensor and w.device.type == "cpu" and bool((w == 1).all()):
            return denoise(x, sigma, labels)
    if guide is not None:
        return beyond(denoise(x, sigma, labels), guide(x, sigma, labels), w)
    both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    return beyond(*denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2), w)


def beyond(D_c: Tensor, D_u: Tensor, weight: Tensor) -> Tensor:
    """D_u + w (D_c - D_u), in the form that is D_c itself at w = 1. D_c, D_u [B, ...], weight [B]."""
    return D_c + expand(weight - 1, D_c) * (D_c - D_u)


def checked_weight(weight: object, where: str) -> float | tuple[float, float]:
    """A guidance weight from 0 on, or a range of them; InputError naming `where` for anything else."""
    if is_number(weight) and weight >= 0:
        return float(weight)
    return checked_interval(weight, where)


def checked_interval(interval: object, where: str) -> tuple[float, float]:
    """Two rising numbers from 0 on; InputError naming `where` for anything else."""
    numbers = interval if isinstance(interval, (list, tuple)) else ()
    if len(numbers) != 2 or not all(map(is_number, numbers)) or not 0 <= numbers[0] < numbers[1]:
        raise InputError(f"illegal value in {where}: {interval}. Give numbers from 0 on, two of them as LOW,HIGH.")
    return float(numbers[0]), float(numbers[1])


def as_guide(denoise: Denoise, *, has_classes: bool) -> Denoise:
    """`denoise` for labels that it may have no classes for."""
    return denoise if has_classes else lambda x, sigma, labels: denoise(x, sigma, None)


def takes_weight(network: nn.Module) -> bool:
    """Whether the weight of its teacher's guidance is a condition of the network: F(x, c_noise, labels, guidance=w)."""
    return getattr(getattr(network, "config", None), "default_guidance", None) is not None
