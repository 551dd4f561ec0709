"""The skip connection of a denoiser: D = c_skip x + c_out F (EDM, 2206.00364, Eq. 7), with fp32 arithmetic.

x and F_x [B, C, H, W] in float32, bfloat16 or float16, each contiguous or channels-last; coefficients fp32 [B]; D fp32 in the layout of x.
Bytes per element, all fp32: 12 forward, 8 backward to F_x or to x, 12 to both.
"""

import torch
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.launch import tl, triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_PLANES = 4


def precondition(x: Tensor, F_x: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """Return D = c_skip x + c_out F_x, fp32 [B, C, H, W], differentiable in every argument (forward mode included).

    x, F_x: float32, bfloat16 or float16 [B, C, H, W]; c_skip, c_out: fp32 [B] or [1]. Raises ValueError naming a bad argument.
    """
    launch.check_tensor("precondition", "x", x, dtypes=FLOATS, shape=(None,) * 4)
    launch.check_tensor("precondition", "F_x", F_x, dtypes=FLOATS, shape=x.shape, like=x)
    launch.check_per_sample("precondition", "c_skip", c_skip, x.shape[0], like=x)
    launch.check_per_sample("precondition", "c_out", c_out, x.shape[0], like=x)
    if launch.chosen("precondition", x, differentiated=(c_skip, c_out)) == "triton":
        return launch.call(_precondition_op, x, F_x, c_skip, c_out)
    return precondition_reference(x, F_x, c_skip, c_out)


def precondition_reference(x: Tensor, F_x: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """The definition, in torch."""
    return c_skip.view(-1, 1, 1, 1) * x.float() + c_out.view(-1, 1, 1, 1) * F_x.float()


@triton.jit
def sample_block(N: tl.constexpr, BLOCK: tl.constexpr):
    """This program's place: (sample int64, offsets [BLOCK] within it, mask) for samples of N elements."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    i_program = tl.program_id(0)
    o = (i_program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    # N is a constant, so the compiler knows its divisors and keeps wide accesses under the mask.
    return (i_program // BLOCKS).to(tl.int64), o, o < N


@triton.jit
def other_layout(o, N: tl.constexpr, INNER: tl.constexpr):
    """The offsets of the same elements in a second tensor. INNER = 0: in the same layout; else INNER is the inner extent of the first."""
    return (o % INNER) * (N // INNER) + o // INNER if INNER > 0 else o


@triton.jit
def _precondition_fwd_kernel(
    x,
    F_x,
    c_skip,
    skip_stride: tl.constexpr,
    c_out,
    out_stride: tl.constexpr,
    D_x,
    N: tl.constexpr,
    INNER: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Walks x. PLANES > 1: x holds PLANES planes and F_x their pixels together; a program takes its pixels of every plane."""
    i_b, o, m = sample_block(N // PLANES, BLOCK)
    b_skip, b_out = tl.load(c_skip + i_b * skip_stride), tl.load(c_out + i_b * out_stride)
    for plane in tl.static_range(PLANES):
        o_x = o + plane * (N // PLANES)
        o_F = o * PLANES + plane if PLANES > 1 else other_layout(o, N, INNER)
        b_x, b_F = tl.load(x + i_b * N + o_x, m).to(tl.float32), tl.load(F_x + i_b * N + o_F, m).to(tl.float32)
        tl.store(D_x + i_b * N + o_x, b_skip * b_x + b_out * b_F, m)


@triton.jit
def _precondition_bwd_kernel(
    grad,
    c_skip,
    skip_stride: tl.constexpr,
    c_out,
    out_stride: tl.constexpr,
    grad_x,
    grad_F,
    N: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Walks grad and grad_x, or grad_F where that is all: the first-level cache merges scattered loads, not stores."""
    i_b, o, m = sample_block(N, BLOCK)
    o_other = other_layout(o, N, INNER)
    b_grad = tl.load(grad + i_b * N + (o_other if grad_x is None else o), m)
    if grad_x is not None:
        tl.store(grad_x + i_b * N + o, (tl.load(c_skip + i_b * skip_stride) * b_grad).to(grad_x.dtype.element_ty), m)
    if grad_F is not None:
        p_F = grad_F + i_b * N + (o if grad_x is None else o_other)
        tl.store(p_F, (tl.load(c_out + i_b * out_stride) * b_grad).to(grad_F.dtype.element_ty), m)


def dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels-last, a contiguous copy otherwise."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def relative_layout(x: Tensor, other: Tensor) -> int:
    """INNER of `other_layout` for two dense tensors of one shape: 0 for one layout, otherwise the inner extent of x."""
    formats = (torch.contiguous_format, torch.channels_last)
    if any(x.is_contiguous(memory_format=f) and other.is_contiguous(memory_format=f) for f in formats):
        return 0
    return x.shape[2] * x.shape[3] if x.is_contiguous() else x.shape[1]


def block_and_warps(elements: int, largest: int) -> tuple[int, int]:
    """(BLOCK, num_warps): a power of two that covers `elements`, at most `largest`; eight elements to a thread (two 128-bit accesses)."""
    if elements >= 2**31:
        raise ValueError(f"too many elements per sample: {elements}. Use fewer than 2^31; the batch is not limited.")
    block = min(largest, max(16, 1 << (elements - 1).bit_length()))
    return block, max(1, block // 256)


def _launch_fwd(x: Tensor, F_x: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    x, F_x = dense(x), dense(F_x)
    D_x = torch.empty_like(x, dtype=torch.float32)
    if D_x.numel():
        batch, n, inner = x.shape[0], x[0].numel(), relative_layout(x, F_x)
        # A program of a single plane would use a part of each sector of F_x. Images have few planes; more are not unrolled.
        planes = x.shape[1] if inner and x.is_contiguous() and x.shape[1] <= MOST_PLANES else 1
        block, warps = block_and_warps(n // planes, 1024 if planes == 1 else 512)
        with launch.device_guard(x):
            _precondition_fwd_kernel[(batch * triton.cdiv(n // planes, block),)](
                x,
                F_x,
                *launch.strided(c_skip, batch),
                *launch.strided(c_out, batch),
                D_x,
                N=n,
                INNER=inner,
                PLANES=planes,
                BLOCK=block,
                num_warps=warps if planes == 1 else 2 * warps,
            )
    return D_x


def _launch_bwd(
    grad: Tensor, c_skip: Tensor, c_out: Tensor, x_dtype: torch.dtype | None, F_dtype: torch.dtype | None, F_last: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_F = gradients = _empty_gradients(grad, c_skip, c_out, x_dtype, F_dtype, F_last)
    grad = dense(grad)
    if grad.numel():
        batch, n = grad.shape[0], grad[0].numel()
        block, warps = block_and_warps(n, 1024)
        walked, other = (grad, grad_F) if x_dtype else (grad_F, grad)
        with launch.device_guard(grad):
            _precondition_bwd_kernel[(batch * triton.cdiv(n, block),)](
                grad,
                *launch.strided(c_skip, batch),
                *launch.strided(c_out, batch),
                grad_x if x_dtype else None,
                grad_F if F_dtype else None,
                N=n,
                INNER=relative_layout(walked, other) if F_dtype else 0,
                BLOCK=block,
                num_warps=warps,
            )
    return gradients


def _empty_gradients(grad, c_skip, c_out, x_dtype, F_dtype, F_last):
    # grad_x takes the layout of grad, which the kernel walks; grad_F that of F_x, which the network's backward expects.
    F_format = torch.channels_last if F_last else torch.contiguous_format
    return (
        torch.empty_like(dense(grad), dtype=x_dtype) if x_dtype else grad.new_empty(0),
        torch.empty_like(grad, dtype=F_dtype, memory_format=F_format) if F_dtype else grad.new_empty(0),
    )


def _fake_fwd(x, F_x, c_skip, c_out):
    return torch.empty_like(dense(x), dtype=torch.float32)


@torch.library.custom_op("fastcm::precondition", mutates_args=())
def _precondition_op(x: Tensor, F_x: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    return _fake_fwd(x, F_x, c_skip, c_out).copy_(precondition_reference(x, F_x, c_skip, c_out))


@torch.library.custom_op("fastcm::precondition_backward", mutates_args=())
def _backward_op(
    grad: Tensor, c_skip: Tensor, c_out: Tensor, x_dtype: torch.dtype | None, F_dtype: torch.dtype | None, F_last: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to x and to F_x in these dtypes; an empty tensor for None."""
    gradients = _empty_gradients(grad, c_skip, c_out, x_dtype, F_dtype, F_last)
    for gradient, dtype, coefficient in zip(gradients, (x_dtype, F_dtype), (c_skip, c_out), strict=True):
        if dtype:
            gradient.copy_(coefficient.view(-1, 1, 1, 1) * grad)
    return gradients


launch.register(_precondition_op, _launch_fwd)
launch.register(_backward_op, _launch_bwd)
_precondition_op.register_fake(_fake_fwd)
_backward_op.register_fake(_empty_gradients)


def _setup_context(ctx, inputs, output):
    x, F_x, c_skip, c_out = inputs
    ctx.save_for_backward(c_skip, c_out)
    ctx.x_dtype, ctx.F_dtype = x.dtype, F_x.dtype
    ctx.F_last = not F_x.is_contiguous() and F_x.is_contiguous(memory_format=torch.channels_last)


def _backward(ctx, grad):
    needs_x, needs_F = ctx.needs_input_grad[:2]
    x_dtype, F_dtype = ctx.x_dtype if needs_x else None, ctx.F_dtype if needs_F else None
    grad_x, grad_F = launch.call(_backward_op, grad, *ctx.saved_tensors, x_dtype, F_dtype, ctx.F_last)
    return grad_x if needs_x else None, grad_F if needs_F else None, None, None


_precondition_op.register_autograd(_backward, setup_context=_setup_context)
