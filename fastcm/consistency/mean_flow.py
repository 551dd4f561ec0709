"""MeanFlow: the average velocity of a trajectory between two times, learned by an identity that it alone fulfils.

In flow matching's time, t = sigma / (1 + sigma), the path is z_t = x / (1 + sigma) = (1 - t) image + t noise with velocity noise - image.
A network with a second time r gives, by the scalings of its form, a denoised image D(x, sigma, r), and with it the average velocity from t
back to r (pMF, Lu et al. 2026, 2601.22158, read from right to left):

    u(z_t, r, t) = (z_t - D(x, sigma, r)) / t,    that is u = A x + B F with the A and B of `Preconditioning.in_form("flow")`.

In the flow form u is F, as published. A diffusion model of any form, to which the second embedding adds nothing yet, has its denoised image
as D at every r and so its velocity at r = t: training can start there. At r = 0, D is the trajectory's end, which sampling, editing and
export call.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastcm import kernels
from fastcm.consistency.denoiser import Denoiser, expand
from fastcm.consistency.guidance import NO_CLASS
from fastcm.consistency.objective import Batch, noised
from fastcm.consistency.tangent import NetworkTangent


def flow_time(sigma: Tensor) -> Tensor:
    """t in [0, 1) of a noise level."""
    return sigma / (1 + sigma)


def mean_flow_loss(
    student: Denoiser,
    batch: Batch,
    sigma: Tensor,
    sigma_end: Tensor,
    *,
    tangent: NetworkTangent,
    power: float = 1.0,
    weight_c: float = 1e-3,
    omega: float = 1.0,
    kappa: float = 0.0,
    velocity: Literal["data", "network"] = "data",
    factor: Tensor | float = 1.0,
) -> Tensor:
    """||d||^2 / sg(||d||^2 + weight_c)^power with d = u - sg(v - (t - r) du/dt), [B] fp32 (Geng et al. 2025, 2505.13447, Algorithm 1).

    sigma >= sigma_end: [B] fp32, the noise levels of t and r. student: its network takes `end`, r. tangent: that network's derivative.
    v is noise - image. With omega and kappa, for images with a label, omega v + kappa u(z, t, t, class) + (1 - omega - kappa) u(z, t, t):
    guidance inside training, of the scale omega / (1 - kappa) (ibid., section 4.2 and appendix B.1). velocity: along what the derivative is
    taken: "data", v as the paper has it, or "network", u(z, t, t, class), with which the loss is a regression of v (iMF, Geng et al. 2025,
    2512.02012). factor: as for `edm_loss`.
    """
    preconditioning = student.preconditioning
    c, noisy = noised(student, batch, sigma)
    t, r = flow_time(sigma), flow_time(sigma_end)
    x, image = noisy.x_hi, noisy.x_lo

    def denoised_at(labels: Tensor | None) -> Tensor:  # whose velocity is u(z, t, t)
        return kernels.precondition(x, student.network(noisy.scaled_hi, c.c_noise, labels, end=t), c.c_skip, c.c_out)

    with torch.no_grad():
        # A velocity v stands here as the image that it points from: v = (z - D) / t, so that D of noise - image is the image.
        own = denoised_at(batch.labels) if kappa or velocity == "network" else image
        D_v = image
        if batch.labels is not None and (omega, kappa) != (1.0, 0.0):
            unlabelled = denoised_at(torch.full_like(batch.labels, NO_CLASS))
            D_v = torch.where(expand(batch.labels >= 0, x), omega * image + kappa * own + (1 - omega - kappa) * unlabelled, image)
        D_along = own if velocity == "network" else D_v
        # The derivative is taken in ln(sigma), as for `continuous_loss`: (t - r) d/dt = (1 - r / t) (1 + sigma) d/d ln(sigma).
        x_rate = (expand(c.c_in, x) * (expand(preconditioning.input_share(sigma), x) * x - D_along)).to(noisy.scaled_hi.dtype)
        F_x, dF = tangent(noisy.scaled_hi, c.c_noise, batch.labels, x_rate, preconditioning.c_noise_rate(sigma), end=r)
        in_flow_form = partial(preconditioning.in_form, "flow")
        (A, B), (dA, dB) = torch.func.jvp(in_flow_form, (sigma.double(),), (sigma.double(),))  # double: A is a small difference over t
        A, B, dA, dB = (expand(coefficient.float(), x) for coefficient in (A, B, dA, dB))
        u, du = A * x + B * F_x.float(), dA * x + A * (x - D_along) + dB * F_x.float() + B * dF.float()
        v = (x - D_v) / expand(sigma, x) - D_v
        goal = v - expand((1 - r / t) * (1 + sigma), x) * du
        squared = (u - goal).square().sum((1, 2, 3))
        weight = image[0].numel() * (squared + weight_c) ** -power  # of the mean over the image, which `distance` takes
    F_x = student.network(noisy.scaled_hi, c.c_noise, batch.labels, end=r)
    return kernels.distance(x, F_x, A.flatten(), B.flatten(), goal, None, None, None, weight * factor, kind="l2")
