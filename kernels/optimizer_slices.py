"""The update of `optimizer_step` in torch, a slice of the buffers at a time. Names and formulas are those of its docstring."""

import math

import torch

UNIT_EPS = 1e-4


def step_coefficients(kind, accepted, step, lr, grad_norm, betas, eps, weight_decay, clip):
    """fp32 [1]: clip factor, 1 - b1, b2, 1 - lr wd, a, b, -size; those of the moments are neutral when the step is skipped."""
    beta1, beta2 = betas
    t = (step + 1).double()
    power = beta2**t
    correction1, correction2 = 1 - beta1**t, 1 - power
    size = lr.double() / correction1
    if kind == "adamw":
        a, b = torch.ones_like(t), eps * correction2.sqrt()
        size = size * correction2.sqrt()
    else:
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * power / correction2
        rectification = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).clamp(min=0).sqrt()
        rectified = rho > 5
        a, b = rectified.double(), torch.where(rectified, eps, 1.0)
        size = torch.where(rectified, size * rectification * correction2.sqrt(), size)
    factor = torch.ones_like(t) if clip is None else (clip / (grad_norm.double() + 1e-6)).clamp(max=1.0)
    factor = torch.where(accepted, factor, 1.0)
    # A skipped step multiplies by -0.0, not 0.0: x + -0.0 * 0.0 is x to the bit, also for x = -0.0.
    rate = torch.where(accepted, 1 - beta1, -0.0)
    decay2 = torch.where(accepted, beta2, 1.0)
    decay = 1 - lr.double() * weight_decay
    return [c.float() for c in (factor, rate, decay2, decay, a, b, -size)]


def step_slice(p, grad, exp_avg, exp_avg_sq, accepted, coefficients, betas):
    """Update one slice of the moments and of the weights. accepted: bool [1], or None where it is known to be true."""
    factor, rate, decay2, decay, a, b, negative_size = coefficients
    scratch = torch.mul(grad if accepted is None else torch.where(accepted, grad, 0.0), factor)
    exp_avg.lerp_(scratch, rate)
    exp_avg_sq.mul_(decay2).addcmul_(scratch, scratch, value=1 - betas[1])
    torch.div(exp_avg, torch.sqrt(exp_avg_sq, out=scratch).mul_(a).add_(b), out=scratch)
    if accepted is None:
        p.mul_(decay).addcmul_(scratch, negative_size)
    else:
        p.copy_(torch.where(accepted, scratch.mul_(negative_size).addcmul_(p, decay), p))


def set_rows_back(param, unit_rows, accepted):
    """Each row over its magnitude; accepted: as in `_step_slice`."""
    for start, rows, length in unit_rows:
        p = param[start : start + rows * length].view(rows, length)
        magnitude = torch.linalg.vector_norm(p, dim=1, keepdim=True) / math.sqrt(length)
        inverse = (UNIT_EPS + magnitude).reciprocal()
        p.mul_(inverse if accepted is None else torch.where(accepted, inverse, 1.0))


def follow_slice(p, part, accepted, low_precision, followers):
    """What follows from one slice p of the new weights: its 16-bit copy, target and averages."""
    _store_low_precision(low_precision, part, p, accepted)
    for follower, rate, copy in followers:
        f = follower[part]
        f.copy_(torch.where(accepted, torch.lerp(f, p, rate), f)) if accepted is not None else f.lerp_(p, rate)
        _store_low_precision(copy, part, f, accepted)


def _store_low_precision(copy, part, values, accepted):
    if copy is not None:
        copy[part].copy_(values if accepted is None else torch.where(accepted, values.to(copy.dtype), copy[part]))
