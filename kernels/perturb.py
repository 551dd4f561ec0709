"""Noised network inputs: images -> x = images + sigma z at one noise level or at a pair with the same z, optionally scaled and cast.

x_hi = images + sigma_hi z, x_lo = images + sigma_lo z with z the normals of stream 0 (Consistency Models, 2303.01469, Algorithm 3);
scaled = c_in x in the network's dtype (EDM, 2206.00364, Eq. 7). uint8 images become v / 127.5 - 1. Images [B, C, H, W], coefficients [B].
Bytes per element: reads 1 (uint8) or 4 (float32), writes 4 for each x and the size of dtype for each scaled copy.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.image_lanes import BYTE_SCALE, by_fours, load_byte_lane, load_lane
from fastcm.kernels.launch import tl, triton
from fastcm.kernels.philox import normal_reference
from fastcm.kernels.quarter_layout import load_scalar, quarter_counters, quarter_lanes, store_lane

STREAM_TRAINING_NOISE = 0
_SCALED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Perturbed(NamedTuple):
    """x_hi, x_lo: fp32 [B, C, H, W]; scaled_hi, scaled_lo: c_in x in the dtype asked for. None where not asked for."""

    x_hi: Tensor
    x_lo: Tensor | None
    scaled_hi: Tensor | None
    scaled_lo: Tensor | None


def perturb(
    images: Tensor,
    seed: Tensor,
    position: Tensor,
    sigma_hi: Tensor,
    sigma_lo: Tensor | None = None,
    *,
    c_in_hi: Tensor | None = None,
    c_in_lo: Tensor | None = None,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Perturbed:
    """Returns the noised images at sigma_hi and, where given, at sigma_lo with the same noise, and their c_in-scaled copies in `dtype`.

    images: uint8 or float32 [B, C, H, W], contiguous or channels-last; seed, position: int64 [B] or [1]; sigma_*, c_in_*: fp32 [B] or
    [1]; flip: bool [B], mirrors the width before the noise is added. Everything returned is contiguous. Raises ValueError naming a bad
    argument.
    """
    _check(images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype)
    if launch.chosen("perturb", images, differentiated=(images, sigma_hi, sigma_lo, c_in_hi, c_in_lo)) == "triton":
        arguments = (images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype)
        x_hi, x_lo, scaled_hi, scaled_lo = launch.call(_perturb_op, *arguments)
        return Perturbed(
            x_hi, None if sigma_lo is None else x_lo, None if c_in_hi is None else scaled_hi, None if c_in_lo is None else scaled_lo
        )
    return perturb_reference(images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype)


def perturb_reference(images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype):
    """The definition, in torch."""
    batch = images.shape[0]
    z = normal_reference(seed.expand(batch), position, images.shape[1:], STREAM_TRAINING_NOISE)
    clean = images.contiguous()
    if images.dtype == torch.uint8:
        clean = (clean.float() - 127.5) / 127.5
    if flip is not None:
        clean = torch.where(flip.view(-1, 1, 1, 1), clean.flip(-1), clean)
    # addcmul rounds images + sigma z as one expression where the machine can, like the kernel.
    x_hi = torch.addcmul(clean, _column(sigma_hi), z)
    x_lo = None if sigma_lo is None else torch.addcmul(clean, _column(sigma_lo), z)
    scaled_hi = None if c_in_hi is None else (_column(c_in_hi) * x_hi).to(dtype)
    scaled_lo = None if c_in_lo is None else (_column(c_in_lo) * x_lo).to(dtype)
    return Perturbed(x_hi, x_lo, scaled_hi, scaled_lo)


def _column(coefficient: Tensor) -> Tensor:
    return coefficient.view(-1, 1, 1, 1)


@triton.jit
def clean_lane(
    p_images,
    i_sample,
    o_i,
    i_first,
    o_first,
    mirrored,
    mirrored_first,
    LANE: tl.constexpr,
    N: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    MATH: tl.constexpr,
):
    """One lane of the images as fp32, bytes v as v / 127.5 - 1 within 1.2e-7."""
    if p_images.dtype.element_ty == tl.uint8 and by_fours(N, WIDTH):
        b_lane = load_byte_lane(p_images, i_first, o_first, mirrored_first, LANE, N, PLANE, WIDTH, LAST, BLOCK, MATH)
    else:
        b_lane = load_lane(p_images, i_sample, o_i, i_first, o_first, mirrored, mirrored_first, LANE, N, PLANE, WIDTH, LAST, BLOCK)
        if p_images.dtype.element_ty == tl.uint8:
            b_lane = b_lane.to(tl.float32) * BYTE_SCALE - 1.0
    return b_lane


@triton.jit
def noise_lane(p_x, p_scaled, b_sigma, b_c_in, o_sample, o_i, b_clean, b_z, LANE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """One lane at one noise level: x = image + sigma z and, where asked for, c_in x."""
    b_x = b_clean + b_sigma * b_z
    store_lane(p_x + o_sample, o_i, b_x, LANE, N, BLOCK)
    if p_scaled is not None:
        store_lane(p_scaled + o_sample, o_i, b_c_in * b_x, LANE, N, BLOCK)


@triton.jit(do_not_specialize=["batch"])
def _perturb_kernel(
    p_images,
    p_seed,
    seed_stride: tl.constexpr,
    p_position,
    position_stride: tl.constexpr,
    p_flip,
    flip_stride: tl.constexpr,
    p_sigma_hi,
    sigma_hi_stride: tl.constexpr,
    p_c_in_hi,
    c_in_hi_stride: tl.constexpr,
    p_x_hi,
    p_scaled_hi,
    p_sigma_lo,
    sigma_lo_stride: tl.constexpr,
    p_c_in_lo,
    c_in_lo_stride: tl.constexpr,
    p_x_lo,
    p_scaled_lo,
    batch,
    N: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr,
    MATH: tl.constexpr,
):
    i_sample, o_i, i_first, o_first = quarter_counters(batch, N, BLOCK, SAMPLES)
    z0, z1, z2, z3 = quarter_lanes(p_seed, seed_stride, p_position, position_stride, i_first, o_first, 0, True, MATH)
    mirrored = None
    mirrored_first = None
    if p_flip is not None:
        mirrored = tl.load(p_flip + i_sample * flip_stride).to(tl.int32)
        mirrored_first = tl.load(p_flip + i_first * flip_stride).to(tl.int32)
    b0 = clean_lane(p_images, i_sample, o_i, i_first, o_first, mirrored, mirrored_first, 0, N, PLANE, WIDTH, LAST, BLOCK, MATH)
    b1 = clean_lane(p_images, i_sample, o_i, i_first, o_first, mirrored, mirrored_first, 1, N, PLANE, WIDTH, LAST, BLOCK, MATH)
    b2 = clean_lane(p_images, i_sample, o_i, i_first, o_first, mirrored, mirrored_first, 2, N, PLANE, WIDTH, LAST, BLOCK, MATH)
    b3 = clean_lane(p_images, i_sample, o_i, i_first, o_first, mirrored, mirrored_first, 3, N, PLANE, WIDTH, LAST, BLOCK, MATH)
    o_sample = i_sample * N
    b_sigma_hi, b_c_in_hi = load_scalar(p_sigma_hi, sigma_hi_stride, i_sample), load_scalar(p_c_in_hi, c_in_hi_stride, i_sample)
    noise_lane(p_x_hi, p_scaled_hi, b_sigma_hi, b_c_in_hi, o_sample, o_i, b0, z0, 0, N, BLOCK)
    noise_lane(p_x_hi, p_scaled_hi, b_sigma_hi, b_c_in_hi, o_sample, o_i, b1, z1, 1, N, BLOCK)
    noise_lane(p_x_hi, p_scaled_hi, b_sigma_hi, b_c_in_hi, o_sample, o_i, b2, z2, 2, N, BLOCK)
    noise_lane(p_x_hi, p_scaled_hi, b_sigma_hi, b_c_in_hi, o_sample, o_i, b3, z3, 3, N, BLOCK)
    if p_x_lo is not None:
        b_sigma_lo, b_c_in_lo = load_scalar(p_sigma_lo, sigma_lo_stride, i_sample), load_scalar(p_c_in_lo, c_in_lo_stride, i_sample)
        noise_lane(p_x_lo, p_scaled_lo, b_sigma_lo, b_c_in_lo, o_sample, o_i, b0, z0, 0, N, BLOCK)
        noise_lane(p_x_lo, p_scaled_lo, b_sigma_lo, b_c_in_lo, o_sample, o_i, b1, z1, 1, N, BLOCK)
        noise_lane(p_x_lo, p_scaled_lo, b_sigma_lo, b_c_in_lo, o_sample, o_i, b2, z2, 2, N, BLOCK)
        noise_lane(p_x_lo, p_scaled_lo, b_sigma_lo, b_c_in_lo, o_sample, o_i, b3, z3, 3, N, BLOCK)


def _launch_perturb(images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype):
    x_hi, x_lo, scaled_hi, scaled_lo = outputs = _fake_perturb(images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype)
    batch, elements = images.shape[0], images[0].numel() if images.shape[0] else 0
    if x_hi.numel() == 0:
        return outputs
    if images.data_ptr() % 16:
        images = images.clone()  # the kernel reads bytes by words
    grid = launch.quarter_grid("perturb", batch, elements)
    with launch.device_guard(images):
        _perturb_kernel[(grid.programs,)](
            images,
            *launch.strided(seed, batch),
            *launch.strided(position, batch),
            *launch.strided(flip, batch),
            *launch.strided(sigma_hi, batch),
            *launch.strided(c_in_hi, batch),
            x_hi,
            None if c_in_hi is None else scaled_hi,
            *launch.strided(sigma_lo, batch),
            *launch.strided(c_in_lo, batch),
            None if sigma_lo is None else x_lo,
            None if c_in_lo is None else scaled_lo,
            batch,
            N=elements,
            PLANE=images.shape[2] * images.shape[3],
            WIDTH=images.shape[3],
            LAST=not images.is_contiguous(),
            **grid.constants,
        )
    return outputs


def _fake_perturb(images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype):
    """x_hi, x_lo, scaled_hi, scaled_lo, uninitialised; those not asked for are empty, because an op cannot return None in a list."""
    kinds = ((sigma_hi, torch.float32), (sigma_lo, torch.float32), (c_in_hi, dtype), (c_in_lo, dtype))
    return [images.new_empty(images.shape if asked is not None else (0,), dtype=kind) for asked, kind in kinds]


@torch.library.custom_op("fastcm::perturb", mutates_args=())
def _perturb_op(
    images: Tensor,
    seed: Tensor,
    position: Tensor,
    sigma_hi: Tensor,
    sigma_lo: Tensor | None,
    c_in_hi: Tensor | None,
    c_in_lo: Tensor | None,
    flip: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    found = perturb_reference(images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype)
    dtypes = (torch.float32, torch.float32, dtype, dtype)
    return [images.new_empty(0, dtype=kind) if x is None else x for x, kind in zip(found, dtypes, strict=True)]


launch.register(_perturb_op, _launch_perturb)
_perturb_op.register_fake(_fake_perturb)


def _check(images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype) -> None:
    launch.check_tensor("perturb", "images", images, dtypes=(torch.uint8, torch.float32), shape=(None,) * 4)
    launch.check_layout("perturb", "images", images)
    batch = images.shape[0]
    for name, tensor, dtypes in (
        ("seed", seed, (torch.int64,)),
        ("position", position, (torch.int64,)),
        ("sigma_hi", sigma_hi, (torch.float32,)),
        ("sigma_lo", sigma_lo, (torch.float32,)),
        ("c_in_hi", c_in_hi, (torch.float32,)),
        ("c_in_lo", c_in_lo, (torch.float32,)),
        ("flip", flip, (torch.bool,)),
    ):
        if tensor is not None or name in ("seed", "position", "sigma_hi"):
            launch.check_per_sample("perturb", name, tensor, batch, dtypes=dtypes, like=images)
    if c_in_lo is not None and sigma_lo is None:
        raise ValueError("missing argument in perturb(sigma_lo): None. Give it where c_in_lo is given.")
    if dtype not in _SCALED_DTYPES:
        raise ValueError(f"wrong dtype in perturb(dtype): {dtype}. Use float32 or bfloat16 or float16.")
