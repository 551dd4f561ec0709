"""GroupNorm with optional scale, shift and SiLU: silu(norm(x) (1 + scale) + shift), fp32 arithmetic.

norm is Wu and He, 1803.08494, Eq. 1 with per-channel weight and bias; scale and shift are ADM's adaptive GroupNorm (2105.05233,
Section 3.4). x [B, C, H, W] in float32, bfloat16 or float16; the kernels take channels-last memory. With y = (x - mean) / std,
v = y A + b, A = weight (1 + scale), and dv the gradient at v, the backward is (means over a group)
    dx = (dv A - mean(dv A) - y mean(dv A y)) / std,  S1 = sum_pixels dv,  S2 = sum_pixels dv y,
and the gradients of weight, bias, scale and shift are products of S1, S2 [B, C].
Bytes per fp32 element in one pass, where the pixels of a few groups fit a program: 8 forward, 12 backward. Larger slabs are split over
programs: statistics, then the output: 12 forward, 20 backward. A program with one pixel for each thread gives the threads of a group
values of 1 / std that may differ in the last bit: the compiler contracts the first step of the sum of squares.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastcm.kernels import launch
from fastcm.kernels.group_norm_split import split_gradient_kernel, split_output_kernel, split_reduce_kernel, split_sums_kernel
from fastcm.kernels.group_norm_tiles import activated, affine, centred_and_dv, group_sum, input_gradient, slab_place, statistics_of
from fastcm.kernels.group_statistics import _launch_fwd as launch_statistics
from fastcm.kernels.group_statistics import group_statistics_reference, split_grid
from fastcm.kernels.launch import tl, triton
from fastcm.kernels.precondition import FLOATS


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Return silu(norm(x) * (1 + scale) + shift) in x's dtype and memory format.

    x: [B, C, H, W] float32, bfloat16 or float16; groups divides C; weight, bias: [C] or None; scale, shift: [B, C] or both None, each in
    one of these dtypes; silu=False leaves the activation out. Statistics and arithmetic are fp32. Raises ValueError naming a bad argument.
    """
    _check(x, groups, weight, bias, scale, shift)
    # The kernels read channels-last memory; copying another layout would cost what they save.
    if launch.chosen("group_norm", x) == "triton" and x.is_contiguous(memory_format=torch.channels_last):
        return launch.call(_group_norm_op, x, groups, weight, bias, eps, scale, shift, silu)[0]
    return group_norm_reference(x, groups, weight, bias, eps=eps, scale=scale, shift=shift, silu=silu)


def group_norm_reference(x, groups, weight, bias, *, eps=1e-5, scale=None, shift=None, silu=True):
    """The definition, in torch."""
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    if forward_ad._current_level >= 0:
        # torch.compile cannot take a JVP through the native operator (2.13): forward mode uses its definition.
        y = _normalized(x.float(), groups, weight, bias, eps)
    else:
        y = F.group_norm(x.float(), groups, weight, bias, eps)
    if scale is not None:
        y = torch.addcmul(shift.float()[:, :, None, None], y, 1 + scale.float()[:, :, None, None])
    if silu:
        y = F.silu(y)
    # The native operator on CUDA gives channels-last input back contiguous (2.13).
    last = x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
    return y.to(x.dtype, memory_format=torch.channels_last if last else torch.preserve_format)


def _normalized(x, groups, weight, bias, eps):
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(2, keepdim=True) + eps)).reshape(x.shape)
    if weight is not None:
        y = y * weight[:, None, None]
    return y if bias is None else y + bias[:, None, None]


@triton.jit
def _group_norm_fwd_kernel(
    x,
    modulation,
    out,
    mean,
    rstd,
    eps,
    C: tl.constexpr,
    HW: tl.constexpr,
    D: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b, o_c, m_c, o, m = slab_place(C, HW, CHANNELS, BLOCK_P, BLOCK_C)
    b_x = tl.load(x + o, m, other=0.0).to(tl.float32)
    b_mean = group_sum(tl.sum(b_x, 0), D, GROUPS) / (HW * D)
    centred = tl.where(m, b_x - b_mean[None, :], 0.0)
    b_rstd = tl.rsqrt(group_sum(tl.sum(centred * centred, 0), D, GROUPS) / (HW * D) + eps)
    o_group, m_group = i_b * (C // D) + o_c // D, m_c & (o_c % D == 0)
    tl.store(mean + o_group, b_mean, m_group)
    tl.store(rstd + o_group, b_rstd, m_group)
    A, b = affine(modulation, i_b, o_c, m_c)
    A *= b_rstd
    tl.store(out + o, activated(centred * A[None, :] + b[None, :], SILU).to(out.dtype.element_ty), m)


@triton.jit
def _group_norm_bwd_kernel(
    x,
    grad,
    modulation,
    mean,
    rstd,
    grad_x,
    sums,
    C: tl.constexpr,
    HW: tl.constexpr,
    D: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b, o_c, m_c, o, m = slab_place(C, HW, CHANNELS, BLOCK_P, BLOCK_C)
    b_mean, b_rstd = statistics_of(mean, rstd, i_b, o_c, m_c, C, D)
    A, b = affine(modulation, i_b, o_c, m_c)
    slope = A * b_rstd
    centred, dv = centred_and_dv(x, grad, o, m, b_mean, slope, b, SILU)
    S1, S2 = tl.sum(dv, 0), tl.sum(dv * centred, 0) * b_rstd
    tl.store(sums + 2 * i_b * C + o_c, S1, m_c)
    tl.store(sums + (2 * i_b + 1) * C + o_c, S2, m_c)
    mean_1, mean_2 = group_sum(A * S1, D, GROUPS) / (HW * D), group_sum(A * S2, D, GROUPS) / (HW * D)
    b_grad_x = input_gradient(centred, dv, slope, b_rstd, mean_1, mean_2)
    tl.store(grad_x + o, b_grad_x.to(grad_x.dtype.element_ty), m)


def slab_of(channels: int, groups: int, pixels: int, itemsize: int, *, backward: bool) -> dict[str, int] | None:
    """The constants of `slab_place` and the warps of one pass; None where a slab does not fit a program's registers and work is split."""
    depth = channels // groups
    # The fewest groups whose channels fill a 32-byte sector and 128-bit accesses.
    taken = next((g for g in range(1, groups) if g * depth * itemsize >= 32 and g * depth * itemsize % 16 == 0), groups)
    block_c, block_p = triton.next_power_of_2(taken * depth), triton.next_power_of_2(pixels)
    if block_c > 128 or block_c * block_p > (8192 if backward and itemsize == 4 else 16384):
        return None
    slab = {"CHANNELS": taken * depth, "GROUPS": triton.next_power_of_2(taken), "BLOCK_P": block_p, "BLOCK_C": block_c}
    # Four 128-bit accesses to a thread: with fewer, what a program does once for its channels weighs more than its elements.
    return slab | {"num_warps": max(1, min(16, block_c * block_p * itemsize // 2048))}


def _modulation(weight, bias, scale, shift):
    """What `affine` takes. scale and shift may be the halves of one matrix [B, 2 C]: their rows share a stride."""
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    if scale is not None and (scale.stride() != shift.stride() or scale.stride(1) != 1):
        scale, shift = scale.contiguous(), shift.contiguous()
    return weight, bias, scale, shift, 0 if scale is None else scale.stride(0)


def _constants(x, groups, silu):
    return {"C": x.shape[1], "HW": x.shape[2] * x.shape[3], "D": x.shape[1] // groups, "SILU": silu}


def _launch_fwd(x, groups, weight, bias, eps, scale, shift, silu):
    out, mean, rstd = outputs = _empty_outputs(x, groups, weight, bias, eps, scale, shift, silu)
    if x.numel() == 0:
        return outputs
    channels, pixels, constants = x.shape[1], x.shape[2] * x.shape[3], _constants(x, groups, silu)
    modulation = _modulation(weight, bias, scale, shift)
    slab = slab_of(channels, groups, pixels, x.element_size(), backward=False)
    with launch.device_guard(x):
        if slab is not None:
            _group_norm_fwd_kernel[(x.shape[0] * triton.cdiv(channels, slab["CHANNELS"]),)](
                x, modulation, out, mean, rstd, eps, **constants, **slab
            )
            return outputs
        mean, rstd = launch_statistics(x, groups, eps)
        grid = split_grid(x, groups)
        split_output_kernel[(grid.columns * grid.tiles,)](x, modulation, out, mean, rstd, **constants, **grid.tile)
    return out, mean, rstd


def _launch_bwd(grad, x, groups, weight, bias, scale, shift, silu, mean, rstd):
    grad_x, sums = outputs = _empty_gradients(grad, x, groups, weight, bias, scale, shift, silu, mean, rstd)
    if x.numel() == 0:
        return grad_x, sums.zero_()
    grad = grad.contiguous(memory_format=torch.channels_last)
    batch, channels, pixels, constants = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], _constants(x, groups, silu)
    modulation = _modulation(weight, bias, scale, shift)
    inputs = (x, grad, modulation, mean, rstd)
    slab = slab_of(channels, groups, pixels, x.element_size(), backward=True)
    with launch.device_guard(x):
        if slab is not None:
            _group_norm_bwd_kernel[(batch * triton.cdiv(channels, slab["CHANNELS"]),)](*inputs, grad_x, sums, **constants, **slab)
            return outputs
        grid = split_grid(x, groups)
        partial = torch.empty((batch, grid.chunks, 2, channels), dtype=torch.float32, device=x.device)
        means = torch.empty((batch, 2, groups), dtype=torch.float32, device=x.device)
        split_sums_kernel[(grid.columns, grid.chunks)](*inputs, partial, grid.chunk_pixels, **constants, **grid.tile)
        split_reduce_kernel[(batch * groups,)](
            partial, modulation, sums, means, grid.chunks, C=channels, HW=pixels, D=constants["D"], **grid.group_tile
        )
        split_gradient_kernel[(grid.columns * grid.tiles,)](*inputs, means, grad_x, **constants, **grid.tile)
    return outputs


def _empty_outputs(x, groups, weight, bias, eps, scale, shift, silu):
    mean = torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _empty_gradients(grad, x, groups, weight, bias, scale, shift, silu, mean, rstd):
    return torch.empty_like(x), torch.empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32, device=x.device)


@torch.library.custom_op("fastcm::group_norm", mutates_args=())
def _group_norm_op(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, rstd)."""
    out = group_norm_reference(x, groups, weight, bias, eps=eps, scale=scale, shift=shift, silu=silu)
    return out, *group_statistics_reference(x, groups, eps)


@torch.library.custom_op("fastcm::group_norm_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """(gradient to x, S1 and S2 [B, 2, C])."""
    batch, channels = x.shape[:2]
    ones, zeros = torch.ones(batch, channels, device=x.device), torch.zeros(batch, channels, device=x.device)
    A = (ones if weight is None else ones * weight) * (1 if scale is None else 1 + scale)
    b = (zeros if bias is None else zeros + bias) * (1 if scale is None else 1 + scale) + (0 if shift is None else shift)
    A, b = A.view(batch, groups, -1, 1), b.view(batch, groups, -1, 1)
    y = (x.float().reshape(batch, groups, channels // groups, -1) - mean[..., None, None]) * rstd[..., None, None]
    dv = grad.float().reshape(y.shape)
    if silu:
        s = torch.sigmoid(y * A + b)
        dv = dv * (s + (y * A + b) * s * (1 - s))
    sums = torch.stack((dv.sum(3), (dv * y).sum(3)), 1).view(batch, 2, channels)
    along = dv * A
    grad_x = (along - along.mean((2, 3), keepdim=True) - y * (along * y).mean((2, 3), keepdim=True)) * rstd[..., None, None]
    return torch.empty_like(x).copy_(grad_x.view(x.shape)), sums


launch.register(_group_norm_op, _launch_fwd)
launch.register(_backward_op, _launch_bwd)
_group_norm_op.register_fake(_empty_outputs)
_backward_op.register_fake(_empty_gradients)


def _setup_context(ctx, inputs, output):
    x, ctx.groups, weight, bias, _, scale, shift, ctx.silu = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, scale, shift, *output[1:])


def _backward(ctx, grad, _mean, _rstd):
    x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    arguments = (grad, x, ctx.groups, weight, bias, scale, shift, ctx.silu, mean, rstd)
    grad_x, sums = launch.call(_backward_op, *arguments)
    S1, S2 = sums.unbind(1)
    scaled = (S1, S2) if scale is None else (S1 * (1 + scale), S2 * (1 + scale))
    grad_bias, grad_weight = (t.sum(0) for t in scaled)
    grad_scale = None
    if scale is not None:
        grad_scale = (S2 if weight is None else S2 * weight) + (0 if bias is None else S1 * bias)
    gradients = ((weight, grad_weight), (bias, grad_bias), (scale, grad_scale), (shift, S1))
    grad_weight, grad_bias, grad_scale, grad_shift = (None if t is None else g.to(t.dtype) for t, g in gradients)
    return grad_x, None, grad_weight, grad_bias, None, grad_scale, grad_shift, None


_group_norm_op.register_autograd(_backward, setup_context=_setup_context)


def _check(x, groups, weight, bias, scale, shift):
    launch.check_tensor("group_norm", "x", x, dtypes=FLOATS, shape=(None,) * 4)
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"illegal value in group_norm(groups): {groups}. Use a divisor of the {channels} channels.")
    for name, tensor, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        *((name, tensor, (batch, channels)) for name, tensor in (("scale", scale), ("shift", shift))),
    ):
        if tensor is not None:
            launch.check_tensor("group_norm", name, tensor, dtypes=FLOATS, shape=shape, like=x)
    if x.shape[1:].numel() >= 2**31:
        raise ValueError(f"too many elements per sample in group_norm(x): {list(x.shape)}. Use fewer than 2^31; the batch is not limited.")
    if (scale is None) != (shift is None):
        raise ValueError(f"missing argument in group_norm({'scale' if scale is None else 'shift'}): None. Give both or neither.")
