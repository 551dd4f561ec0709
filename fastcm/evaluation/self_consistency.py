"""Self-consistency: how far a consistency function moves along one trajectory, where it should not move (Song et al. 2023, eq. 2)."""

import torch
from torch import Tensor, nn

from fastcm.consistency.denoiser import Denoiser, expand
from fastcm.consistency.noise_schedule import karras_grid
from fastcm.consistency.solver import Denoise, heun_step
from fastcm.errors import InputError
from fastcm.generation.sampler import SeedNoise

SOLVER_STEPS = 4  # Heun steps of the teacher between two neighbouring levels: with one, the solver's own error would be measured
PATHS = {True: "the teacher's ODE, Heun", False: "data paths x0 + sigma z"}


def self_consistency(
    denoiser: Denoiser, images: Tensor, *, labels: Tensor | None, seed: int, levels: int = 8, teacher: Denoise | None = None
) -> float:
    """The mean of `distances_along_paths` over images and pairs of levels, in units of images in [-1, 1]; 0 is perfect along an ODE."""
    return float(distances_along_paths(denoiser, images, labels=labels, seed=seed, levels=levels, teacher=teacher).mean())


@torch.no_grad()
def distances_along_paths(
    denoiser: Denoiser, images: Tensor, *, labels: Tensor | None, seed: int, levels: int = 8, teacher: Denoise | None = None
) -> Tensor:
    """RMS pixel distance of f(x_sigma, sigma) between neighbouring levels of a path, [B, levels - 1] fp32, from the highest level down.

    denoiser: the consistency function f, run in eval mode. images: uint8, or float in [-1, 1], [B, C, H, W], on its device; labels: int64
    [B] or None. Image b starts at x0 + sigma_max z with the sampling noise of seed + b, and the levels are a Karras grid.

    teacher: a diffusion denoiser. Its probability-flow ODE leads from there down (Heun, SOLVER_STEPS per level), and f should not change
    along it. Without one the path is x0 + sigma z with one z: f there is only as constant as the image is certain, so compare runs, and
    do not read 0 as the goal.
    """
    if levels < 2:
        raise InputError(f"too few noise levels in levels: {levels}. Use 2 or more.")
    x0 = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    seeds = torch.arange(seed, seed + len(x0), dtype=torch.int64, device=x0.device)
    z = SeedNoise(seeds, tuple(x0.shape[1:])).normal(0)
    low, high = denoiser.preconditioning.sigma_range
    fine = karras_grid((levels - 1) * SOLVER_STEPS + 1, sigma_min=low, sigma_max=high, rho=denoiser.preconditioning.rho)
    fine = fine.float().to(x0.device)
    x = x0 + fine[0] * z
    modes = [(module, module.training) for module in (denoiser, teacher) if isinstance(module, nn.Module)]
    for module, _ in modes:
        module.eval()
    try:
        before = denoiser(x, fine[:1].expand(len(x0)), labels)
        found = []
        for index, sigma in enumerate(fine[1:], start=1):
            lo = sigma.expand(len(x0))
            if teacher is not None:
                x = heun_step(teacher, x, fine[index - 1].expand(len(x0)), lo, labels)
            if index % SOLVER_STEPS == 0:
                after = denoiser(x if teacher is not None else x0 + expand(lo, x0) * z, lo, labels)
                found.append((after - before).square().flatten(1).mean(1).sqrt())
                before = after
    finally:
        for module, mode in modes:
            module.train(mode)
    return torch.stack(found, dim=1)


def consistency_figures(denoiser: Denoiser, images: Tensor, *, labels: Tensor | None, seed: int, teacher: Denoiser | None) -> dict:
    """Self-consistency with its error bar (the bootstrap deviation of a mean over images), ready for JSON."""
    per_image = distances_along_paths(denoiser, images, labels=labels, seed=seed, teacher=teacher).mean(dim=1)
    error = float(per_image.std()) / len(per_image) ** 0.5 if len(per_image) > 1 else 0.0
    return {"mean": float(per_image.mean()), "std": error, "n": len(per_image), "path": PATHS[teacher is not None], "seed": seed}
