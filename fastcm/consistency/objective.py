"""The training losses of the family, one function each: images, a place in the noise stream and noise levels in, per-sample loss out."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcm import kernels
from fastcm.consistency.denoiser import Coefficients, Denoiser, expand, working_dtype
from fastcm.consistency.solver import Denoise
from fastcm.consistency.tangent import NetworkTangent
from fastcm.errors import InputError, nearest

PIXEL_DISTANCES = ("l1", "l2", "pseudo_huber")
LOSS_WEIGHTS = ("uniform", "snr", "snr+1", "karras", "truncated-snr", "1/gap")

# An ODE step of the teacher: (x_hi, sigma_hi, sigma_lo, labels) -> x_lo.
TeacherStep = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# A distance of two denoised images through a network: (D_student, D_target) fp32 [B, C, H, W] -> [B]; the gradient goes to D_student.
FeatureDistance = Callable[[Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """Images and their place in the noise stream: everything random about a loss is a function of (seed, position)."""

    images: Tensor  # [B, C, H, W] uint8, or fp32 in [-1, 1]
    labels: Tensor | None  # [B] int64
    seed: Tensor  # [1] int64
    position: Tensor  # [B] int64
    flip: Tensor | None = None  # [B] bool, mirrored where true: the trainer draws it by position
    guidance: Tensor | None = None  # [B] fp32, the teacher's guidance weight, of which the student is told

    @property
    def conditions(self) -> dict[str, Tensor]:
        """What the student's network takes beside labels, by name."""
        return {} if self.guidance is None else {"guidance": self.guidance}


def loss_weight(name: str, sigma_hi: Tensor, sigma_lo: Tensor, *, sigma_data: float) -> Tensor:
    """lambda(sigma) [B]: the published weightings, SNR = sigma^-2 at the noisier level.

    "1/gap" is iCT's and ECT's 1 / (sigma_hi - sigma_lo); "karras", 1 / sigma_data^2 + SNR, is also ECT's for ImageNet,
    (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    """
    snr = sigma_hi.square().reciprocal()
    if name == "uniform":
        return torch.ones_like(sigma_hi)
    if name == "snr":
        return snr
    if name == "snr+1":
        return snr + 1
    if name == "karras":
        return snr + sigma_data**-2
    if name == "truncated-snr":
        return snr.clamp(min=1)
    if name == "1/gap":
        return (sigma_hi - sigma_lo).reciprocal()
    raise InputError(f"unknown value in objective.loss_weight: {name}. Use one of {', '.join(LOSS_WEIGHTS)}.{nearest(name, LOSS_WEIGHTS)}")


def set_dropout_stream(network: nn.Module, batch: Batch) -> None:
    """Hands dropout its place in the stream, so that student and target share their masks."""
    if hasattr(network, "set_stream"):
        network.set_stream(batch.seed, batch.position)


def noised(student: Denoiser, batch: Batch, sigma: Tensor) -> tuple[Coefficients, kernels.Perturbed]:
    """The scalings at sigma [B], and the images there (hi) and clean (lo); the student's dropout is set to draw for them."""
    c, clean, dtype = student.coefficients(sigma), torch.zeros_like(sigma), working_dtype(student.network)
    noisy = kernels.perturb(batch.images, batch.seed, batch.position, sigma, clean, c_in_hi=c.c_in, flip=batch.flip, dtype=dtype)
    set_dropout_stream(student.network, batch)
    return c, noisy


def evened(loss: Tensor, sigma: Tensor, log_weight: nn.Module | None, factor: Tensor | float) -> Tensor:
    """exp(w(sigma)) loss - w(sigma) times factor, with w trained along, of a `loss` [B] that has the factor already; itself for w = None.

    With u = -w, loss / exp(u) + u (Karras et al. 2024, equation 21).
    """
    if log_weight is None:
        return loss
    w = log_weight(sigma)
    return w.exp() * loss - w * factor


def edm_loss(
    student: Denoiser, batch: Batch, sigma: Tensor, *, log_weight: nn.Module | None = None, factor: Tensor | float = 1.0
) -> Tensor:
    """Denoising score matching, [B] fp32: lambda ||D(x + sigma z, sigma) - x||^2 per pixel, lambda = 1 / c_out^2
    (Karras et al. 2022, equation 8 and Table 1). log_weight: w(sigma) [B] of `evened`. factor: multiplies every loss, in fp32, before
    16-bit networks round its gradient."""
    c, noisy = noised(student, batch, sigma)
    F_x = student.network(noisy.scaled_hi, c.c_noise, batch.labels)
    weight = c.c_out.square().reciprocal() * factor
    loss = kernels.distance(noisy.x_hi, F_x, c.c_skip, c.c_out, noisy.x_lo, None, None, None, weight, kind="l2")
    return evened(loss, sigma, log_weight, factor)


def consistency_loss(
    student: Denoiser,
    target: Denoiser,
    batch: Batch,
    sigma_hi: Tensor,
    sigma_lo: Tensor,
    *,
    weight: Tensor,
    distance: str | FeatureDistance,
    huber_c: float = 0.0,
    teacher_step: TeacherStep | None = None,
    first_stage: Denoiser | None = None,
) -> Tensor:
    """Consistency distillation and training, [B] fp32: lambda d(f(x_hi, sigma_hi), f-(x_lo, sigma_lo)).

    Song et al. 2023, Algorithms 2 and 3. iCT and ECT are the same with other pairs, weights and distances.

    student: f with gradient; target: f- without, its moving average or the student itself. sigma_hi > sigma_lo: [B] fp32.
    distance: a name of PIXEL_DISTANCES, or a function of the two denoised images.
    teacher_step: the ODE solver's step with a diffusion teacher (distillation), or None (training from data alone).
    first_stage: a frozen consistency model that answers in the target's place where sigma_lo is below the student's transition
      (truncated training, Lee et al. 2024), with the same dropout masks; None elsewhere.
    """
    hi, lo = student.coefficients(sigma_hi), target.coefficients(sigma_lo)
    dtype = working_dtype(student.network)
    noisy = kernels.perturb(
        batch.images, batch.seed, batch.position, sigma_hi, sigma_lo, c_in_hi=hi.c_in, c_in_lo=lo.c_in, flip=batch.flip, dtype=dtype
    )
    with torch.no_grad():
        x_lo, scaled_lo = noisy.x_lo, noisy.scaled_lo  # training: the same image and noise at the lower level
        if teacher_step is not None:  # distillation: the teacher's solver leads from x_hi to the lower level
            x_lo = teacher_step(noisy.x_hi, sigma_hi, sigma_lo, batch.labels)
            scaled_lo = (expand(lo.c_in, x_lo) * x_lo).to(dtype)
        set_dropout_stream(target.network, batch)
        F_lo = target.network(scaled_lo, lo.c_noise, batch.labels, **batch.conditions)
        if first_stage is not None:
            set_dropout_stream(first_stage.network, batch)
            below, D_lo = sigma_lo < student.preconditioning.transition, first_stage(x_lo, sigma_lo, batch.labels)
            F_lo = torch.where(expand(below, x_lo), D_lo, F_lo.float())  # whose denoised image stands as it is
            lo = lo._replace(c_skip=lo.c_skip * ~below, c_out=torch.where(below, 1.0, lo.c_out))
    set_dropout_stream(student.network, batch)
    F_hi = student.network(noisy.scaled_hi, hi.c_noise, batch.labels, **batch.conditions)
    if not isinstance(distance, str):
        D_hi = kernels.precondition(noisy.x_hi, F_hi, hi.c_skip, hi.c_out)
        return weight * distance(D_hi, kernels.precondition(x_lo, F_lo, lo.c_skip, lo.c_out))
    return kernels.distance(noisy.x_hi, F_hi, hi.c_skip, hi.c_out, x_lo, F_lo, lo.c_skip, lo.c_out, weight, kind=distance, c=huber_c)


def continuous_loss(
    student: Denoiser,
    batch: Batch,
    sigma: Tensor,
    *,
    tangent: NetworkTangent,
    warmup: Tensor | float,
    tangent_c: float = 0.1,
    teacher: Denoise | None = None,
    log_weight: nn.Module | None = None,
    factor: Tensor | float = 1.0,
) -> Tensor:
    """Continuous-time consistency training (sCT) and distillation (sCD), [B] fp32 (Lu and Song 2024, Algorithm 1).

    In TrigFlow's time, tan(t) = sigma / sigma_data, the student in the EDM form is f = cos(t) x_t + sin(t) sigma_data F. With F- the
    student without gradient, the loss is exp(w) / n ||F - (F- - g)||^2 - w, where g is cos(t) df/dt of F-, its last part times
    `warmup`, divided by ||g|| + tangent_c. A student of another form is seen through the EDM form: its F there is A x + B F
    (`Preconditioning.in_form`).

    sigma: [B] fp32. tangent: F- and its derivative (`network_tangent` of the student's network). warmup: r in [0, 1].
    teacher: D(x, sigma, labels), whose ODE gives dx/dt (distillation), or None: the image and its noise do (training from data alone).
    log_weight: w(sigma) [B] of `evened`; None for w = 0. factor: as for `edm_loss`.
    """
    preconditioning, sigma_data = student.preconditioning, student.preconditioning.sigma_data
    c, noisy = noised(student, batch, sigma)
    with torch.no_grad():
        x, image = noisy.x_hi, noisy.x_lo
        hypotenuse = (sigma.square() + sigma_data**2).rsqrt()
        cos, sin = expand(sigma_data * hypotenuse, x), expand(sigma * hypotenuse, x)
        x_t = cos * x
        # training: the image itself; distillation: the teacher's denoised image. sin(t) dx_t/dt = cos(t) x_t - D.
        D_x = image if teacher is None else teacher(x, sigma, batch.labels)
        sin_dx = cos * x_t - D_x
        # cos(t) sin(t) d/dt = d/d ln(sigma): the network's tangent is taken in ln(sigma), where nothing divides by a small sine.
        x_rate = (expand(c.c_in, x) * (expand(preconditioning.input_share(sigma), x) * x - D_x)).to(noisy.scaled_hi.dtype)
        rates = x_rate, preconditioning.c_noise_rate(sigma)
        F_minus, dF = tangent(noisy.scaled_hi, c.c_noise, batch.labels, *rates, **batch.conditions)
        F_minus, dF = F_minus.float(), dF.float()
        in_edm_form = partial(preconditioning.in_form, "edm")
        A, B = in_edm_form(sigma)
        if preconditioning.base != "edm":
            dA, dB = torch.func.jvp(in_edm_form, (sigma,), (sigma,))[1]  # d / d ln(sigma) of each
            dF = expand(dA, x) * x + expand(A, x) * (x - D_x) + expand(dB, x) * F_minus + expand(B, x) * dF
            F_minus = expand(A, x) * x + expand(B, x) * F_minus
        g = cos.square() * (sigma_data * F_minus + sin_dx / sin) - warmup * (cos * sin * x_t - sigma_data * dF)
        g = g / (torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True) + tangent_c)
        goal = F_minus - g
    F_x = student.network(noisy.scaled_hi, c.c_noise, batch.labels, **batch.conditions)
    squared = kernels.distance(x, F_x, A, B, goal, None, None, None, torch.ones_like(sigma) * factor, kind="l2")  # of F in the EDM form
    return evened(squared, sigma, log_weight, factor)
