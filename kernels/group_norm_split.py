"""The kernels of `group_norm` where the pixels of a group do not fit a program. Names and formulas are those of its docstring."""

from fastcm.kernels.group_norm_tiles import activated, affine, centred_and_dv, input_gradient, statistics_of
from fastcm.kernels.group_statistics import channel_tile, group_tile, pixel_tile
from fastcm.kernels.launch import tl, triton


@triton.jit
def split_output_kernel(
    x,
    modulation,
    out,
    mean,
    rstd,
    C: tl.constexpr,
    HW: tl.constexpr,
    D: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b, o_c, m_c, o, m = pixel_tile(C, HW, BLOCK_P, BLOCK_C)
    b_mean, b_rstd = statistics_of(mean, rstd, i_b, o_c, m_c, C, D)
    A, b = affine(modulation, i_b, o_c, m_c)
    A *= b_rstd
    centred = tl.load(x + o, m, other=0.0).to(tl.float32) - b_mean[None, :]
    tl.store(out + o, activated(centred * A[None, :] + b[None, :], SILU).to(out.dtype.element_ty), m)


@triton.jit
def split_sums_kernel(
    x,
    grad,
    modulation,
    mean,
    rstd,
    partial,
    PIXELS,
    C: tl.constexpr,
    HW: tl.constexpr,
    D: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S1 and S2 of each channel over PIXELS pixels."""
    i_b, o_c, m_c = channel_tile(C, BLOCK_C)
    i_chunk = tl.program_id(1)
    first = i_chunk * PIXELS
    last = tl.minimum(first + PIXELS, HW)
    b_mean, b_rstd = statistics_of(mean, rstd, i_b, o_c, m_c, C, D)
    A, b = affine(modulation, i_b, o_c, m_c)
    A *= b_rstd
    S1, S2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        o, m = i_b * HW * C + o_p[:, None] * C + o_c[None, :], (o_p < last)[:, None] & m_c[None, :]
        centred, dv = centred_and_dv(x, grad, o, m, b_mean, A, b, SILU)
        S1 += dv
        S2 += dv * centred
    p_partial = partial + (i_b * tl.num_programs(1) + i_chunk) * 2 * C + o_c
    tl.store(p_partial, tl.sum(S1, 0), m_c)
    tl.store(p_partial + C, tl.sum(S2, 0) * b_rstd, m_c)


@triton.jit
def split_reduce_kernel(
    partial,
    modulation,
    sums,
    means,
    CHUNKS,
    C: tl.constexpr,
    HW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """S1 and S2 over all pixels, and the two means of a group, [B, 2, groups]."""
    i_group, i_b, o_c, m_c, _o_k, o, m = group_tile(CHUNKS, C, D, BLOCK_K, BLOCK_D)
    S1, S2 = tl.sum(tl.load(partial + o, m, other=0.0), 0), tl.sum(tl.load(partial + C + o, m, other=0.0), 0)
    tl.store(sums + 2 * i_b * C + o_c, S1, m_c)
    tl.store(sums + (2 * i_b + 1) * C + o_c, S2, m_c)
    A, _b = affine(modulation, i_b, o_c, m_c)
    p_means = means + i_group + i_b * (C // D)
    tl.store(p_means, tl.sum(tl.where(m_c, A * S1, 0.0), 0) / (HW * D))
    tl.store(p_means + C // D, tl.sum(tl.where(m_c, A * S2, 0.0), 0) / (HW * D))


@triton.jit
def split_gradient_kernel(
    x,
    grad,
    modulation,
    mean,
    rstd,
    means,
    grad_x,
    C: tl.constexpr,
    HW: tl.constexpr,
    D: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b, o_c, m_c, o, m = pixel_tile(C, HW, BLOCK_P, BLOCK_C)
    b_mean, b_rstd = statistics_of(mean, rstd, i_b, o_c, m_c, C, D)
    mean_1, mean_2 = statistics_of(means, means + C // D, 2 * i_b, o_c, m_c, C, D)
    A, b = affine(modulation, i_b, o_c, m_c)
    slope = A * b_rstd
    centred, dv = centred_and_dv(x, grad, o, m, b_mean, slope, b, SILU)
    b_grad_x = input_gradient(centred, dv, slope, b_rstd, mean_1, mean_2)
    tl.store(grad_x + o, b_grad_x.to(grad_x.dtype.element_ty), m)
