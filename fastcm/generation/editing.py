"""Zero-shot editing with a consistency model: what is known of an image is put back after every call (Consistency Models, Algorithm 4).

The algorithm works in a basis A where some coefficients are known. All that it needs of A is the orthogonal projection P onto the span of
the known ones: y = P image, and the mix A^-1[(A y)(1 - Omega) + (A x) Omega] is x - P x + y. A task is its projection.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcm.consistency.noise_schedule import karras_grid
from fastcm.consistency.solver import Denoise
from fastcm.generation.sampler import Noise

Projection = Callable[[Tensor], Tensor]

EDIT_GRID_STEPS = 40
STROKE_SIGMAS = (5.38, 2.24)
# The luminance weights of ITU-R BT.601; their direction is the first column of the paper's orthogonal matrix Q.
LUMINANCE = (0.2989, 0.5870, 0.1140)


def edit_sigmas(*, sigma_min: float, sigma_max: float, rho: float) -> tuple[float, ...]:
    """The noise levels of an edit: the paper's grid of 40 without its last, sigma_min, where a call changes nothing."""
    return tuple(karras_grid(EDIT_GRID_STEPS, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)[:-1].tolist())


def outside(mask: Tensor) -> Projection:
    """Inpainting: A is the identity, known are the pixels where mask (bool [1, 1, H, W]) is False."""
    return lambda x: torch.where(mask, torch.zeros_like(x), x)


def luminance(x: Tensor) -> Tensor:
    """Colourisation: the component of every pixel [B, 3, H, W] along LUMINANCE."""
    direction = torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device)
    direction = (direction / direction.norm()).view(1, 3, 1, 1)
    return direction * (direction * x).sum(dim=1, keepdim=True)


def nothing(x: Tensor) -> Tensor:
    """Stroke-guided generation: no coefficient is known."""
    return torch.zeros_like(x)


def patch_means(factor: int) -> Projection:
    """Super-resolution: the mean of every patch of factor x factor pixels (coefficient 0 of a basis whose first vector is constant)."""
    return lambda x: F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="nearest")


def edit(
    denoise: Denoise,
    noise: Noise,
    known: Tensor,
    *,
    project: Projection,
    sigmas: Sequence[float],
    sigma_min: float,
    start: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Consistency Models, Algorithm 4: samples fp32 [B, C, H, W] with project(sample) = known to rounding.

    known: fp32 [1 or B, C, H, W], what `project` keeps of the image. sigmas: the levels to visit, from high to low.
    start: the image that the first noise is added to, `known` where not given.
    """
    x = (known if start is None else start) + sigmas[0] * noise.normal(0)
    for step, sigma in enumerate(sigmas):
        if step > 0:
            x = x + (sigma**2 - sigma_min**2) ** 0.5 * noise.normal(step)
        x = denoise(x, torch.full((x.shape[0],), sigma, device=x.device), labels).clamp(-1, 1)
        x = x - project(x) + known
    return x


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation of noise fields [C, H, W] along their great circle: fraction 0 gives start, 1 gives end."""
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:  # the same field twice: the circle is a point
        return start + fraction * (end - start)
    return (torch.sin((1 - fraction) * angle) * start + torch.sin(fraction * angle) * end) / torch.sin(angle)


def path(fields: Tensor, frames: int) -> Tensor:
    """`frames` fields [frames, C, H, W] evenly spaced on the way through fields [K, C, H, W], both ends included."""
    places = torch.linspace(0, len(fields) - 1, frames, dtype=torch.float64).tolist()
    legs = [min(int(place), len(fields) - 2) for place in places]
    return torch.stack([slerp(fields[leg], fields[leg + 1], place - leg) for leg, place in zip(legs, places, strict=True)])
