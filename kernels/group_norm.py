"""GroupNorm with optional scale, shift and SiLU: silu(norm(x) (1 + scale) + shift), fp32 arithmetic.

norm is Wu and He, 1803.08494, Eq. 1 with per-channel weight and bias; scale and shift are ADM's adaptive GroupNorm (2105.05233,
Section 3.4). Bytes per fp32 element, one pass: 8 forward, 12 more backward.
"""

import torch
import torch.nn.functional as F


def group_norm(x, groups, weight, bias, *, eps=1e-5, scale=None, shift=None, silu=True):
    """Return silu(norm(x) * (1 + scale) + shift) in x's dtype and memory format.

    x: [B, C, H, W] float; groups divides C; weight, bias: [C] or None; scale, shift: [B, C] or both None; silu=False leaves the
    activation out. Statistics and arithmetic are fp32. Raises ValueError naming a bad argument.
    """
    return group_norm_reference(x, groups, weight, bias, eps=eps, scale=scale, shift=shift, silu=silu)


def group_norm_reference(x, groups, weight, bias, *, eps=1e-5, scale=None, shift=None, silu=True):
    """The definition, in torch."""
    weight, bias = (None if w is None else w.float() for w in (weight, bias))
    if torch.autograd.forward_ad._current_level >= 0:
        # torch.compile cannot take a JVP through the native operator (2.13): forward mode uses its definition.
        y = _normalized(x.float(), groups, weight, bias, eps)
    else:
        y = F.group_norm(x.float(), groups, weight, bias, eps)
    if scale is not None:
        y = torch.addcmul(shift.float()[:, :, None, None], y, 1 + scale.float()[:, :, None, None])
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def _normalized(x, groups, weight, bias, eps):
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(2, keepdim=True) + eps)).reshape(x.shape)
    if weight is not None:
        y = y * weight[:, None, None]
    return y if bias is None else y + bias[:, None, None]
