"""Noised network inputs: images -> x = images + sigma z at one noise level or at a pair with the same z, optionally scaled and cast.

x_hi = images + sigma_hi z, x_lo = images + sigma_lo z with z the normals of stream 0 (Consistency Models, 2303.01469, Algorithm 3);
scaled = c_in x in the network's dtype (EDM, 2206.00364, Eq. 7). uint8 images become v / 127.5 - 1. Images [B, C, H, W], coefficients [B].
Bytes per element: reads 1 (uint8) or 4 (float32), writes 4 for each x and the size of dtype for each scaled copy.
"""

from typing import NamedTuple

import torch
from fastcm.kernels import launch
from fastcm.kernels.philox import normal_reference
from torch import Tensor

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
    return perturb_reference(images, seed, position, sigma_hi, sigma_lo, c_in_hi, c_in_lo, flip, dtype)


def perturb_reference(
    images: Tensor,
    seed: Tensor,
    position: Tensor,
    sigma_hi: Tensor,
    sigma_lo: Tensor | None,
    c_in_hi: Tensor | None,
    c_in_lo: Tensor | None,
    flip: Tensor | None,
    dtype: torch.dtype,
) -> Perturbed:
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
