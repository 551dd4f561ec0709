"""One optimizer update with its averages over flat buffers: RAdam or AdamW, clip, skip, target, averages, low-precision copies.

With g the clipped gradient, t the number of this update and decoupled weight decay wd (Loshchilov and Hutter, 1711.05101):

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        p <- (1 - lr wd) p - size m / (a sqrt(v) + b)
    target <- mu target + (1 - mu) p        average_k <- decay_k average_k + (1 - decay_k) p        low precision <- cast(p)

AdamW: a = 1, b = eps sqrt(1 - b2^t), size = lr sqrt(1 - b2^t) / (1 - b1^t). RAdam (Liu et al., 1908.03265, Algorithm 2) with
rho_inf = 2 / (1 - b2) - 1 and rho = rho_inf - 2 t b2^t / (1 - b2^t): for rho > 5 a = 1, b = eps, size = lr r sqrt(1 - b2^t) / (1 - b1^t)
with r^2 = (rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho); otherwise a = 0, b = 1, size = lr / (1 - b1^t). The threshold 5
is torch.optim.RAdam's (the paper has 4). Buffers are fp32, scalars fp64. Bytes per parameter: 28 + 8 k, k counting the target and the
averages, plus 2 for each 16-bit copy.

Rows of magnitude-preserving layers can be set back after the update, p <- p / (eps + |p|) with |p| the root of the mean of the row's
squares (Karras et al. 2024, 2312.02696, equation 66), before target, averages and copies follow. It is the same launch: a program takes
whole rows, stores their new weights, and loads them once more when it knows their magnitude. Rows are at most some hundred KB and too
large for registers; the second-level cache still has them, so memory has to move no more bytes than without.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcm.kernels import launch
from fastcm.kernels.launch import tl, triton
from fastcm.kernels.optimizer_slices import UNIT_EPS, follow_slice, set_rows_back, step_coefficients, step_slice
from fastcm.kernels.optimizer_update import step_scalars, update_blocks, update_rows

# Elements of one slice on the CPU: bounds the scratch memory and keeps a slice's passes in the cache.
SLICE = 1 << 20
KINDS = ("radam", "adamw")
BLOCK = 1024
# A program takes every PROGRAMS-th block, so that the scalars of a step are computed once per program and not once per block.
PROGRAMS_PER_PROCESSOR = 8
# The update count leaves its upper bits to the count of finished programs while the kernel runs.
TICKET = tl.constexpr(1 << 40)
# Elements that belong to no row are cut into stretches of so many blocks.
STRETCH = 16


def optimizer_step(
    kind: str,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    grad_norm: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float | None,
    target: Tensor | None = None,
    mu: Tensor | None = None,
    averages: Sequence[Tensor] = (),
    decays: Tensor | None = None,
    low_precision: Tensor | None = None,
    target_low_precision: Tensor | None = None,
    unit_rows: Sequence[tuple[int, int, int]] = (),
    tiles: Tensor | None = None,
) -> None:
    """Apply one update in place to flat buffers, in one launch on CUDA.

    kind: "radam" or "adamw". param, exp_avg, exp_avg_sq, target, averages: fp32 [n], contiguous, one device; grad: fp32, bf16 or fp16
    [n]. step: int64 [1], updates applied so far, incremented here. lr, grad_norm, mu: fp32 [1]; decays: fp32 [k]. grad_norm is the L2
    norm of grad: clip (float or None) scales grad by min(1, clip / (grad_norm + 1e-6)), and a grad_norm that is not finite leaves every
    buffer, step included, bit-equal. low_precision, target_low_precision: bf16 or fp16 [n] copies of the new param and target.
    unit_rows: (start, rows, length) of weights whose rows are set back to unit magnitude; tiles: `row_tiles` of them on the device. Raises
    ValueError naming a bad argument.
    """
    buffers = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "target": target}
    buffers |= {f"averages[{i}]": average for i, average in enumerate(averages)}
    _check_buffers(param, grad, buffers, {"low_precision": low_precision, "target_low_precision": target_low_precision})
    _check_scalars(param, step, lr, grad_norm, mu if target is not None else None, decays if len(averages) else None, len(averages))
    _check_options(kind, betas, clip, target, mu, target_low_precision)
    if len(unit_rows) and tiles is None:
        raise ValueError("missing argument in optimizer_step(tiles): None. Give row_tiles(unit_rows, n, device).")
    scalars = {"step": step, "lr": lr, "grad_norm": grad_norm, "eps": float(eps), "weight_decay": float(weight_decay), "clip": clip}
    followers = {"target": target, "mu": mu, "decays": decays, "low_precision": low_precision, "target_low_precision": target_low_precision}
    arguments = (kind, param, grad, exp_avg, exp_avg_sq)
    if launch.chosen("optimizer_step", param) == "triton":
        with torch.no_grad():
            flat = [number for part in unit_rows for number in part]
            moments = {"beta1": betas[0], "beta2": betas[1], "averages": list(averages)}
            _optimizer_step_op(*arguments, **scalars, **moments, **followers, unit_rows=flat, tiles=tiles)
    else:
        optimizer_step_reference(*arguments, **scalars, betas=betas, averages=averages, **followers, unit_rows=unit_rows)


def row_tiles(unit_rows: Sequence[tuple[int, int, int]], n: int, device: torch.device) -> Tensor:
    """int64 [tiles, 3]: (start, length, 1) of each row, and (start, length, 0) of stretches between them, for buffers of n elements.

    unit_rows: in ascending order, each beginning at a multiple of 16, before which elements of no weight are zero.
    """
    tiles, end = [], 0
    for start, rows, length in (*unit_rows, (n, 0, 1)):
        for first in range(end, start, STRETCH * BLOCK):
            tiles.append((first, min(STRETCH * BLOCK, start - first), 0))
        tiles += [(start + row * length, length, 1) for row in range(rows)]
        end = -(-(start + rows * length) // 16) * 16
    return torch.tensor(tiles, dtype=torch.int64, device=device).reshape(-1, 3)


@torch.no_grad()
def optimizer_step_reference(
    kind,
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    *,
    step,
    lr,
    grad_norm,
    betas,
    eps,
    weight_decay,
    clip,
    target=None,
    mu=None,
    averages=(),
    decays=None,
    low_precision=None,
    target_low_precision=None,
    unit_rows=(),
):
    """The definition, in torch, in place. On the CPU a gradient that is not finite returns at once; elsewhere the device decides."""
    accepted = torch.isfinite(grad_norm)
    n, width = param.numel(), max(param.numel(), 1)
    coefficients = step_coefficients(kind, accepted, step, lr, grad_norm, betas, eps, weight_decay, clip)
    if param.is_cpu and not torch.compiler.is_compiling():
        if not accepted:
            return
        accepted, width = None, SLICE
    followers = [(target, 1 - mu, target_low_precision)] if target is not None else []
    followers += [(average, 1 - decays[i : i + 1], None) for i, average in enumerate(averages)]
    parts = [slice(start, start + width) for start in range(0, n, width)]
    for part in parts:
        step_slice(param[part], grad[part], exp_avg[part], exp_avg_sq[part], accepted, coefficients, betas)
        if not unit_rows:  # while the slice is in the cache
            follow_slice(param[part], part, accepted, low_precision, followers)
    if unit_rows:
        set_rows_back(param, unit_rows, accepted)
        for part in parts:
            follow_slice(param[part], part, accepted, low_precision, followers)
    step.add_(1 if accepted is None else accepted)


@triton.jit
def _optimizer_step_fwd_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    lr,
    grad_norm,
    mu,
    decays,
    target,
    averages,
    low_precision,
    target_low_precision,
    tiles,
    n,
    tile_count,
    eps,
    weight_decay,
    clip,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    RADAM: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    UNIT_EPS: tl.constexpr,
):
    i_program, programs = tl.program_id(0), tl.num_programs(0)
    t = (tl.load(step) & (TICKET - 1)) + 1
    norm = tl.load(grad_norm)
    accepted = tl.abs(norm) < float("inf")
    if accepted:
        rate = tl.load(lr)
        a, b, size = step_scalars(t, rate, eps, BETA1, BETA2, RADAM)
        decay = 1 - rate * weight_decay
        factor = tl.minimum(clip / (norm + 1e-6), 1.0) if CLIP else 1.0
        b_mu = tl.load(mu) if mu is not None else 0.0
        buffers, coefficients = (param, grad, exp_avg, exp_avg_sq), (factor, decay, a, b, size)
        followers = (target, averages, decays, low_precision, target_low_precision)
        if tiles is not None:
            update_rows(
                buffers, followers, coefficients, b_mu, tiles, tile_count, i_program, programs, BETA1, BETA2, BLOCK, ALIGNMENT, UNIT_EPS
            )
        else:
            update_blocks(buffers, followers, coefficients, b_mu, n, i_program, programs, BETA1, BETA2, BLOCK)
    # step counts finished programs above bit 40; the last one clears them and counts the update. The barrier comes before the ticket
    # because every thread has to have read step by then.
    tl.debug_barrier()
    finished = tl.atomic_add(step, TICKET, sem="acq_rel") // TICKET
    if finished == programs - 1:
        tl.atomic_add(step, accepted.to(tl.int64) - programs.to(tl.int64) * TICKET)


def _launch_fwd(
    kind,
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    lr,
    grad_norm,
    eps,
    weight_decay,
    clip,
    beta1,
    beta2,
    averages,
    target,
    mu,
    decays,
    low_precision,
    target_low_precision,
    unit_rows=(),
    tiles=None,
):
    n = param.numel()
    processors = torch.cuda.get_device_properties(param.device).multi_processor_count if param.is_cuda else 1
    programs = max(1, min(triton.cdiv(n, BLOCK) if tiles is None else len(tiles), PROGRAMS_PER_PROCESSOR * processors))
    with launch.device_guard(param):
        _optimizer_step_fwd_kernel[(programs,)](
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            step,
            lr,
            grad_norm,
            mu,
            decays,
            target,
            tuple(averages),
            low_precision,
            target_low_precision,
            tiles,
            n,
            0 if tiles is None else len(tiles),
            eps,
            weight_decay,
            0.0 if clip is None else clip,
            BETA1=beta1,
            BETA2=beta2,
            RADAM=kind == "radam",
            CLIP=clip is not None,
            BLOCK=BLOCK,
            ALIGNMENT=math.gcd(16, *unit_rows[2::3]),
            UNIT_EPS=UNIT_EPS,
            num_warps=4,
        )


_MUTATED = ("param", "exp_avg", "exp_avg_sq", "step", "target", "averages", "low_precision", "target_low_precision")


@torch.library.custom_op("fastcm::optimizer_step", mutates_args=_MUTATED)
def _optimizer_step_op(
    kind: str,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    grad_norm: Tensor,
    eps: float,
    weight_decay: float,
    clip: float | None,
    beta1: float,
    beta2: float,
    averages: list[Tensor],
    target: Tensor | None,
    mu: Tensor | None,
    decays: Tensor | None,
    low_precision: Tensor | None,
    target_low_precision: Tensor | None,
    unit_rows: list[int],
    tiles: Tensor | None,
) -> None:
    optimizer_step_reference(
        kind,
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        step=step,
        lr=lr,
        grad_norm=grad_norm,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        clip=clip,
        target=target,
        mu=mu,
        averages=averages,
        decays=decays,
        low_precision=low_precision,
        target_low_precision=target_low_precision,
        unit_rows=list(zip(unit_rows[::3], unit_rows[1::3], unit_rows[2::3], strict=True)),
    )


launch.register(_optimizer_step_op, _launch_fwd)


def _check_buffers(param, grad, buffers, copies):
    op, n = "optimizer_step", param.shape
    low = (torch.bfloat16, torch.float16)
    launch.check_tensor(op, "param", param, shape=(None,), contiguous=True)
    launch.check_tensor(op, "grad", grad, dtypes=(torch.float32, *low), shape=n, like=param, contiguous=True)
    for name, buffer in buffers.items():
        if buffer is not None or name != "target":
            launch.check_tensor(op, name, buffer, shape=n, like=param, contiguous=True)
    for name, copy in copies.items():
        if copy is not None:
            launch.check_tensor(op, name, copy, dtypes=low, shape=n, like=param, contiguous=True)


def _check_scalars(param, step, lr, grad_norm, mu, decays, k):
    op = "optimizer_step"
    launch.check_tensor(op, "step", step, dtypes=(torch.int64,), shape=(1,), like=param)
    for name, scalar, n in (("lr", lr, 1), ("grad_norm", grad_norm, 1), ("mu", mu, 1), ("decays", decays, k)):
        if scalar is not None:
            launch.check_tensor(op, name, scalar, shape=(n,), like=param, contiguous=True)
        elif name == "decays" and k:
            raise ValueError(f"missing argument in optimizer_step(decays): None. Give fp32 [{k}], one decay for each average.")


def _check_options(kind, betas, clip, target, mu, target_low_precision):
    if kind not in KINDS:
        raise ValueError(f"unknown kind in optimizer_step(kind): {kind!r}. Use {' or '.join(KINDS)}.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"illegal value in optimizer_step(betas): {betas}. Use two numbers from 0, below 1.")
    if clip is not None and not clip > 0:
        raise ValueError(f"illegal value in optimizer_step(clip): {clip}. Use a number above 0, or None.")
    for name, argument, needs_it in (("mu", mu, target), ("target", target, target_low_precision)):
        if argument is None and needs_it is not None:
            raise ValueError(f"missing argument in optimizer_step({name}): None. A target needs mu, and its 16-bit copy needs the target.")
    if forward_ad._current_level >= 0:
        raise RuntimeError("optimizer_step has no forward-mode derivative. Call it outside torch.func.jvp.")
