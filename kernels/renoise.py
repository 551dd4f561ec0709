"""One step of the multistep sampler between two network calls, clip, known pixels and fresh noise, with the final float -> uint8.

x = where(mask, clip(D), known) + sqrt(sigma^2 - sigma_min^2) z (Consistency Models, 2303.01469, Algorithms 1 and 4), z the normals of
stream 16 + step. D [B, C, H, W], fp32 out. Bytes per fp32 element: 8, and 4 + the mask's for known pixels; to_uint8: 5.
"""

import torch
from fastcm.kernels import launch
from fastcm.kernels.philox import normal_reference
from torch import Tensor

STREAM_SAMPLING_NOISE = 16
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MASKS = (torch.bool, torch.uint8, torch.float32)


def renoise(
    D_x: Tensor,
    seed: Tensor,
    position: Tensor,
    sigma: Tensor,
    *,
    step: int,
    sigma_min: float,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    clip: bool = True,
) -> Tensor:
    """Returns the input of the next network call, fp32 [B, C, H, W], contiguous: D_x in [-1, 1] with noise of sigma added.

    D_x: fp32, bf16 or fp16, contiguous or channels-last; seed, position: int64 [B] or [1]; sigma: fp32 [B] or [1]; step: 1 for the noise
    before the second call. known: fp32 [B or 1, C, H, W] takes the place of D_x where mask (bool, uint8 or fp32 [B or 1, C or 1, H, W])
    is 0. Raises ValueError naming a bad argument.
    """
    _check(D_x, seed, position, sigma, step, known, mask)
    return renoise_reference(D_x, seed, position, sigma, step, sigma_min, known, mask, clip)


def to_uint8(D_x: Tensor, *, layout: str = "NHWC") -> Tensor:
    """Returns images in [-1, 1] as uint8 [B, H, W, C] (layout "NHWC") or [B, C, H, W] ("NCHW"): (x + 1) 127.5, clamped, half to even."""
    launch.check_tensor("to_uint8", "D_x", D_x, dtypes=_FLOATS, shape=(None,) * 4)
    launch.check_layout("to_uint8", "D_x", D_x)
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f'unknown value in to_uint8(layout): {layout!r}. Use "NHWC" or "NCHW".')
    return to_uint8_reference(D_x, layout)


def renoise_reference(
    D_x: Tensor,
    seed: Tensor,
    position: Tensor,
    sigma: Tensor,
    step: int,
    sigma_min: float,
    known: Tensor | None,
    mask: Tensor | None,
    clip: bool,
) -> Tensor:
    """The definition of `renoise`, in torch."""
    batch = D_x.shape[0]
    z = normal_reference(seed.expand(batch), position, D_x.shape[1:], STREAM_SAMPLING_NOISE + step)
    x = D_x.float().contiguous()
    if clip:
        x = x.clamp(-1.0, 1.0)
    if known is not None:
        x = torch.where(mask != 0, x, known)
    # A sigma at or below sigma_min adds no noise.
    scale = (sigma.square() - sigma_min**2).clamp(min=0.0).sqrt()
    return torch.addcmul(x, scale.view(-1, 1, 1, 1), z)


def to_uint8_reference(D_x: Tensor, layout: str) -> Tensor:
    """The definition of `to_uint8`, in torch."""
    pixels = ((D_x.float() + 1.0) * 127.5).clamp(0.0, 255.0).round().to(torch.uint8)
    return (pixels.permute(0, 2, 3, 1) if layout == "NHWC" else pixels).contiguous()


def _check(D_x, seed, position, sigma, step, known, mask) -> None:
    launch.check_tensor("renoise", "D_x", D_x, dtypes=_FLOATS, shape=(None,) * 4)
    launch.check_layout("renoise", "D_x", D_x)
    batch, channels, height, width = D_x.shape
    for name, tensor, dtype in (("seed", seed, torch.int64), ("position", position, torch.int64), ("sigma", sigma, torch.float32)):
        launch.check_per_sample("renoise", name, tensor, batch, dtypes=(dtype,), like=D_x)
    if not 1 <= step < 2**16 - STREAM_SAMPLING_NOISE:
        raise ValueError(f"illegal value in renoise(step): {step}. Use 1 for the noise before the second network call, and so on.")
    if (known is None) != (mask is None):
        raise ValueError(f"missing argument in renoise({'known' if known is None else 'mask'}): None. Give known and mask together.")
    for name, tensor, dtypes, planes in (("known", known, (torch.float32,), (channels,)), ("mask", mask, _MASKS, (1, channels))):
        if tensor is None:
            continue
        launch.check_tensor("renoise", name, tensor, dtypes=dtypes, shape=(None, None, height, width), like=D_x)
        if tensor.shape[0] not in (1, batch) or tensor.shape[1] not in planes:
            accepted = " or ".join(str(n) for n in planes)
            raise ValueError(f"wrong shape in renoise({name}): {list(tensor.shape)}. Use [{batch} or 1, {accepted}, {height}, {width}].")
