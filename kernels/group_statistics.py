"""Mean and 1 / std of every group of channels, over many programs: the first half of GroupNorm where a group is large.

mean and rstd = 1 / sqrt(var + eps) [B, groups] of x [B, C, H, W] (Wu and He, 1803.08494, Eq. 2). x is channels-last, in float32,
bfloat16 or float16; arithmetic fp32. Programs take a stretch of pixels each, and a second launch merges
what they found. Bytes per fp32 element: 4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.launch import tl, triton
from fastcm.kernels.precondition import FLOATS


def group_statistics(x: Tensor, groups: int, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Return (mean, rstd), fp32 [B, groups] each, without a gradient. x: [B, C, H, W]; groups divides C. ValueError for bad arguments."""
    launch.check_tensor("group_statistics", "x", x, dtypes=FLOATS, shape=(None,) * 4)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"illegal value in group_statistics(groups): {groups}. Use a divisor of the {x.shape[1]} channels.")
    if launch.chosen("group_norm", x) == "triton" and x.is_contiguous(memory_format=torch.channels_last) and x.numel():
        return launch.call(_group_statistics_op, x.detach(), groups, eps)
    return group_statistics_reference(x, groups, eps)


@torch.no_grad()
def group_statistics_reference(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The definition, in torch."""
    variance, mean = torch.var_mean(x.float().reshape(x.shape[0], groups, -1), 2, correction=0)
    return mean, torch.rsqrt(variance + eps)


@triton.jit
def channel_tile(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's sample, channels and their mask."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_program = tl.program_id(0)
    o_c = (i_program % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (i_program // BLOCKS).to(tl.int64), o_c, o_c < C


@triton.jit
def pixel_tile(C: tl.constexpr, HW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's sample, channels and their mask, and offsets and mask of its pixels. The grid has one axis: others end at 65,535."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TILES: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
    # Programs walk through memory: the channels of a tile of pixels, the tiles of a sample, the samples.
    i_program = tl.program_id(0)
    o_c = (i_program % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = (i_program // BLOCKS % TILES) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_b, m_c = (i_program // (BLOCKS * TILES)).to(tl.int64), o_c < C
    return i_b, o_c, m_c, i_b * HW * C + o_p[:, None] * C + o_c[None, :], (o_p < HW)[:, None] & m_c[None, :]


@triton.jit
def _group_statistics_partial_kernel(x, partial, PIXELS, C: tl.constexpr, HW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of each channel over PIXELS pixels. The first pixel is the origin, so nothing cancels."""
    i_b, o_c, m_c = channel_tile(C, BLOCK_C)
    i_chunk = tl.program_id(1)
    first = i_chunk * PIXELS
    last = tl.minimum(first + PIXELS, HW)
    p_x = x + i_b * HW * C + o_c
    origin = tl.load(p_x + first * C, m_c, other=0.0).to(tl.float32)
    total, squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m = (o_p < last)[:, None] & m_c[None, :]
        b_x = tl.load(p_x[None, :] + o_p[:, None] * C, m, other=0.0).to(tl.float32)
        moved = tl.where(m, b_x - origin[None, :], 0.0)
        total += moved
        squares += moved * moved
    b_total = tl.sum(total, 0)
    b_mean = b_total / (last - first)
    p_partial = partial + (i_b * tl.num_programs(1) + i_chunk) * 2 * C + o_c
    tl.store(p_partial, origin + b_mean, m_c)
    tl.store(p_partial + C, tl.maximum(tl.sum(squares, 0) - b_total * b_mean, 0.0), m_c)


@triton.jit
def group_tile(CHUNKS, C: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """A merging program's (sample, group), its first channel, and the offsets and mask of its partial numbers [chunks, channels]."""
    i_group = tl.program_id(0).to(tl.int64)
    i_b, o_c, o_k = i_group // (C // D), (i_group % (C // D)) * D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    m_c = tl.arange(0, BLOCK_D) < D
    o = (i_b * CHUNKS + o_k[:, None]) * 2 * C + o_c[None, :]
    return i_group, i_b, o_c, m_c, o_k, o, (o_k < CHUNKS)[:, None] & m_c[None, :]


@triton.jit
def _group_statistics_merge_kernel(
    partial,
    mean,
    rstd,
    PIXELS,
    CHUNKS,
    eps,
    C: tl.constexpr,
    HW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean and 1 / std of a group from its chunks (Chan et al. 1983, Algorithms for computing the sample variance, Eq. 2.1)."""
    i_group, _i_b, _o_c, _m_c, o_k, o, m = group_tile(CHUNKS, C, D, BLOCK_K, BLOCK_D)
    b_mean, squares = tl.load(partial + o, m, other=0.0), tl.load(partial + C + o, m, other=0.0)
    count = tl.minimum(PIXELS, HW - o_k * PIXELS).to(tl.float32)[:, None]
    total_mean = tl.sum(tl.sum(tl.where(m, count * b_mean, 0.0), 1), 0) / (HW * D)
    moved = b_mean - total_mean
    squares = tl.sum(tl.sum(tl.where(m, squares + count * moved * moved, 0.0), 1), 0)
    tl.store(mean + i_group, total_mean)
    tl.store(rstd + i_group, tl.rsqrt(squares / (HW * D) + eps))


class SplitGrid(NamedTuple):
    """How a large sample is split: programs of BLOCK_C channels by a chunk of pixels, in tiles of BLOCK_P pixels."""

    columns: int
    chunks: int
    chunk_pixels: int
    tiles: int
    tile: dict[str, int]
    group_tile: dict[str, int]


def split_grid(x: Tensor, groups: int) -> SplitGrid:
    """The grid by shape. tile and group_tile are the constants of `channel_tile` and `group_tile` with their warps."""
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    block_p, block_c, block_d = 64, min(64, triton.next_power_of_2(channels)), triton.next_power_of_2(channels // groups)
    columns = batch * triton.cdiv(channels, block_c)
    # About a thousand programs, several for each processor of any GPU, as long as one program can merge the chunks of a group.
    chunks = max(1, min(triton.cdiv(1024, columns), triton.cdiv(pixels, block_p), 128, 8192 // block_d))
    chunk_pixels = triton.cdiv(triton.cdiv(pixels, chunks), block_p) * block_p
    chunks = triton.cdiv(pixels, chunk_pixels)
    tile = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": max(1, block_c // 8)}
    group_tile_ = {"BLOCK_K": triton.next_power_of_2(chunks), "BLOCK_D": block_d, "num_warps": 4}
    return SplitGrid(columns, chunks, chunk_pixels, triton.cdiv(pixels, block_p), tile, group_tile_)


def _launch_fwd(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    mean, rstd = statistics = _empty_statistics(x, groups, eps)
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    grid = split_grid(x, groups)
    partial = torch.empty((batch, grid.chunks, 2, channels), dtype=torch.float32, device=x.device)
    with launch.device_guard(x):
        _group_statistics_partial_kernel[(grid.columns, grid.chunks)](x, partial, grid.chunk_pixels, C=channels, HW=pixels, **grid.tile)
        _group_statistics_merge_kernel[(batch * groups,)](
            partial, mean, rstd, grid.chunk_pixels, grid.chunks, eps, C=channels, HW=pixels, D=channels // groups, **grid.group_tile
        )
    return statistics


def _empty_statistics(x, groups, eps):
    mean = torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device)
    return mean, torch.empty_like(mean)


@torch.library.custom_op("fastcm::group_statistics", mutates_args=())
def _group_statistics_op(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    return group_statistics_reference(x, groups, eps)


launch.register(_group_statistics_op, _launch_fwd)
_group_statistics_op.register_fake(_empty_statistics)
