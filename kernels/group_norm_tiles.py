"""Device code of `group_norm`: what its kernels share, in one pass and split. Names and formulas are those of its docstring."""

from fastcm.kernels import launch
from fastcm.kernels.launch import libdevice, tl, triton

MATH = tl.constexpr(launch.MATH)


@triton.jit
def affine(modulation, i_b, o_c, m_c):
    """A and b [channels] of the module docstring, v = y A + b, from modulation = (weight, bias, scale, shift, the stride of both)."""
    weight, bias, scale, shift, stride = modulation
    b_weight = tl.full(o_c.shape, 1.0, tl.float32) if weight is None else tl.load(weight + o_c, m_c, other=0.0).to(tl.float32)
    b_bias = tl.full(o_c.shape, 0.0, tl.float32) if bias is None else tl.load(bias + o_c, m_c, other=0.0).to(tl.float32)
    if scale is not None:
        b_scale = 1.0 + tl.load(scale + i_b * stride + o_c, m_c, other=0.0).to(tl.float32)
        b_weight *= b_scale
        b_bias = b_bias * b_scale + tl.load(shift + i_b * stride + o_c, m_c, other=0.0).to(tl.float32)
    return b_weight, b_bias


@triton.jit
def statistics_of(mean, rstd, i_b, o_c, m_c, C, D: tl.constexpr):
    """Mean and 1 / std of the group of each channel."""
    o_group = i_b * (C // D) + o_c // D
    return tl.load(mean + o_group, m_c, other=0.0), tl.load(rstd + o_group, m_c, other=0.0)


@triton.jit
def sigmoid(v):
    # The accurate exponential and division cost about twenty instructions for each element, which is more than its bytes take.
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-v)) if MATH == 1 else tl.sigmoid(v)


@triton.jit
def centred_and_dv(x, grad, o, m, b_mean, slope, b, SILU: tl.constexpr):
    """x - mean, which is y / rstd, and dv; slope = A rstd, so that v = (x - mean) slope + b. Sums over pixels take rstd at their end."""
    centred = tl.load(x + o, m, other=0.0).to(tl.float32) - b_mean[None, :]
    dv = tl.load(grad + o, m, other=0.0).to(tl.float32)
    if SILU:
        v = centred * slope[None, :] + b[None, :]
        s = sigmoid(v)
        dv *= s + v * s * (1.0 - s)
    return centred, dv


@triton.jit
def input_gradient(centred, dv, slope, b_rstd, mean_1, mean_2):
    """dx of the module docstring, mean_1 and mean_2 its two means."""
    return dv * slope[None, :] - (mean_1 * b_rstd)[None, :] - centred * (mean_2 * b_rstd * b_rstd)[None, :]


@triton.jit
def activated(v, SILU: tl.constexpr):
    return v * sigmoid(v) if SILU else v


@triton.jit
def group_sum(b_sums, D: tl.constexpr, GROUPS: tl.constexpr):
    """Sums of channels [BLOCK_C] -> for each channel the sum over its group. The block starts with a group; D may be any number."""
    i_group = tl.arange(0, b_sums.shape[0]) // D
    member = i_group[None, :] == tl.arange(0, GROUPS)[:, None]
    b_groups = tl.sum(tl.where(member, b_sums[None, :], 0.0), 1)
    return tl.sum(tl.where(member, b_groups[:, None], 0.0), 0)


@triton.jit
def slab_place(C: tl.constexpr, HW: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """One pass: a program's sample, channels and the offsets and mask of its slab, all pixels of CHANNELS channels (whole groups)."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    i_program = tl.program_id(0)
    i_b, lane = (i_program // BLOCKS).to(tl.int64), tl.arange(0, BLOCK_C)
    o_c, o_p = (i_program % BLOCKS) * CHANNELS + lane, tl.arange(0, BLOCK_P)
    m_c = (lane < CHANNELS) if C % CHANNELS == 0 else (lane < CHANNELS) & (o_c < C)
    return i_b, o_c, m_c, i_b * HW * C + o_p[:, None] * C + o_c[None, :], (o_p < HW)[:, None] & m_c[None, :]
