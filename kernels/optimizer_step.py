"""One optimizer update with its averages over flat buffers: RAdam or AdamW, clip, skip, target, averages, low-precision copies.

With g the clipped gradient, t the number of this update and decoupled weight decay wd (Loshchilov and Hutter, 1711.05101):

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        p <- (1 - lr wd) p - size m / (a sqrt(v) + b)
    target <- mu target + (1 - mu) p        average_k <- decay_k average_k + (1 - decay_k) p        low precision <- cast(p)

AdamW: a = 1, b = eps sqrt(1 - b2^t), size = lr sqrt(1 - b2^t) / (1 - b1^t). RAdam (Liu et al., 1908.03265, Algorithm 2) with
rho_inf = 2 / (1 - b2) - 1 and rho = rho_inf - 2 t b2^t / (1 - b2^t): for rho > 5 a = 1, b = eps, size = lr r sqrt(1 - b2^t) / (1 - b1^t)
with r^2 = (rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho); otherwise a = 0, b = 1, size = lr / (1 - b1^t). The threshold 5
is torch.optim.RAdam's (the paper has 4). Buffers are fp32, scalars fp64. Bytes per parameter: 28 + 8 k, k counting the target and the
averages, plus 2 for each 16-bit copy.
"""

import torch

# Elements of one slice on the CPU: bounds the scratch memory and keeps a slice's passes in the cache.
SLICE = 1 << 20


def optimizer_step(
    kind, param, grad, exp_avg, exp_avg_sq, *, step, lr, grad_norm, betas, eps, weight_decay, clip,
    target=None, mu=None, averages=(), decays=None, low_precision=None, target_low_precision=None,
):
    """Apply one update in place to flat buffers.

    kind: "radam" or "adamw". param, exp_avg, exp_avg_sq, target, averages: fp32 [n], contiguous, one device; grad: fp32, bf16 or fp16 [n].
    step: int64 [1], updates applied so far, incremented here. lr, grad_norm, mu: fp32 [1]; decays: fp32 [k]. grad_norm is the L2 norm of grad: clip (float
    or None) scales grad by min(1, clip / (grad_norm + 1e-6)), and a grad_norm that is not finite leaves every buffer, step included,
    bit-equal. low_precision, target_low_precision: bf16 or fp16 [n] copies of the new param and target. betas, eps, weight_decay: floats.
    Raises ValueError naming a bad argument.
    """
    return optimizer_step_reference(
        kind, param, grad, exp_avg, exp_avg_sq, step=step, lr=lr, grad_norm=grad_norm, betas=betas, eps=eps,
        weight_decay=weight_decay, clip=clip,
        target=target, mu=mu, averages=averages, decays=decays, low_precision=low_precision, target_low_precision=target_low_precision,
    )


@torch.no_grad()
def optimizer_step_reference(
    kind, param, grad, exp_avg, exp_avg_sq, *, step, lr, grad_norm, betas, eps, weight_decay, clip,
    target=None, mu=None, averages=(), decays=None, low_precision=None, target_low_precision=None,
):
    """The definition, in torch: no host synchronisation, in place, whole-buffer passes on CUDA and slices on the CPU."""
    accepted = torch.isfinite(grad_norm)
    coefficients = _coefficients(kind, accepted, step, lr, grad_norm, betas, eps, weight_decay, clip)
    followers = [(target, 1 - mu, target_low_precision)] if target is not None else []
    followers += [(average, 1 - decays[i : i + 1], None) for i, average in enumerate(averages)]
    n = param.numel()
    width = SLICE if param.device.type == "cpu" and not torch.compiler.is_compiling() else max(n, 1)
    for start in range(0, n, width):
        part = slice(start, start + width)
        p = param[part]
        scratch = _step_slice(p, grad[part], exp_avg[part], exp_avg_sq[part], accepted, coefficients, betas, weight_decay, clip)
        _store_low_precision(low_precision, part, p, accepted)
        for follower, rate, copy in followers:
            f = follower[part]
            torch.lerp(f, p, rate, out=scratch)
            torch.where(accepted, scratch, f, out=f)
            _store_low_precision(copy, part, f, accepted)
    step.add_(accepted)


def _coefficients(kind, accepted, step, lr, grad_norm, betas, eps, weight_decay, clip):
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


def _step_slice(p, grad, exp_avg, exp_avg_sq, accepted, coefficients, betas, weight_decay, clip):
    """Update one slice of the moments and of the weights; returns the slice's scratch buffer."""
    factor, rate, decay2, decay, a, b, negative_size = coefficients
    scratch = torch.where(accepted, grad.float(), 0.0)
    if clip is not None:
        scratch.mul_(factor)
    exp_avg.lerp_(scratch, rate)
    exp_avg_sq.mul_(decay2).addcmul_(scratch, scratch, value=1 - betas[1])
    torch.sqrt(exp_avg_sq, out=scratch)
    torch.addcmul(b, scratch, a, out=scratch)
    torch.div(exp_avg, scratch, out=scratch)
    if weight_decay:
        scratch.mul_(negative_size).addcmul_(p, decay)
    else:
        torch.addcmul(p, scratch, negative_size, out=scratch)
    torch.where(accepted, scratch, p, out=p)
    return scratch


def _store_low_precision(copy, part, values, accepted):
    if copy is not None:
        copy[part].copy_(torch.where(accepted, values.to(copy.dtype), copy[part]))
