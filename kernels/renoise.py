"""One step of the multistep sampler between two network calls, clip, known pixels and fresh noise, with the final float -> uint8.

x = where(mask, clip(D), known) + sqrt(sigma^2 - sigma_min^2) z (Consistency Models, 2303.01469, Algorithms 1 and 4), z the normals of
stream 16 + step. D [B, C, H, W], fp32 out. Bytes per fp32 element: 8, and 4 + the mask's for known pixels; to_uint8: 5.
"""

import torch
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.image_lanes import load_lane
from fastcm.kernels.launch import tl, triton
from fastcm.kernels.philox import normal_reference
from fastcm.kernels.quarter_layout import lane_mask, lane_offsets, load_scalar, quarter_counters, quarter_lanes, store_lane

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
    if launch.chosen("renoise", D_x, differentiated=(D_x, sigma, known)) == "triton":
        return launch.call(_renoise_op, D_x, seed, position, sigma, step, sigma_min, known, mask, clip)
    return renoise_reference(D_x, seed, position, sigma, step, sigma_min, known, mask, clip)


def to_uint8(D_x: Tensor, *, layout: str = "NHWC") -> Tensor:
    """Returns images in [-1, 1] as uint8 [B, H, W, C] (layout "NHWC") or [B, C, H, W] ("NCHW"): (x + 1) 127.5, clamped, half to even."""
    launch.check_tensor("to_uint8", "D_x", D_x, dtypes=_FLOATS, shape=(None,) * 4)
    launch.check_layout("to_uint8", "D_x", D_x)
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f'unknown value in to_uint8(layout): {layout!r}. Use "NHWC" or "NCHW".')
    if launch.chosen("to_uint8", D_x) == "triton":
        return launch.call(_to_uint8_op, D_x, layout)
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


@triton.jit
def renoise_lane(
    p_out,
    o_i,
    b_D,
    b_z,
    b_scale,
    p_known,
    p_mask,
    LANE: tl.constexpr,
    N: tl.constexpr,
    PLANE: tl.constexpr,
    MASK_PLANES: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b_x = b_D.to(tl.float32)
    if CLIP:
        b_x = tl.clamp(b_x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    if p_known is not None:
        o_lane = lane_offsets(o_i, LANE, N)
        m_lane = lane_mask(o_i, LANE, N, BLOCK)
        o_mask = o_lane % PLANE if MASK_PLANES == 1 else o_lane
        b_x = tl.where(tl.load(p_mask + o_mask, mask=m_lane) != 0, b_x, tl.load(p_known + o_lane, mask=m_lane))
    store_lane(p_out, o_i, b_x + b_scale * b_z, LANE, N, BLOCK)


@triton.jit(do_not_specialize=["stream", "batch"])
def _renoise_kernel(
    p_D,
    p_seed,
    seed_stride: tl.constexpr,
    p_position,
    position_stride: tl.constexpr,
    p_sigma,
    sigma_stride: tl.constexpr,
    sigma_min_squared,
    stream,
    p_known,
    known_stride,
    p_mask,
    mask_stride,
    p_out,
    batch,
    N: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK_PLANES: tl.constexpr,
    CLIP: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr,
    MATH: tl.constexpr,
):
    i_sample, o_i, i_first, o_first = quarter_counters(batch, N, BLOCK, SAMPLES)
    b0 = load_lane(p_D, i_sample, o_i, i_first, o_first, None, None, 0, N, PLANE, WIDTH, LAST, BLOCK)
    b1 = load_lane(p_D, i_sample, o_i, i_first, o_first, None, None, 1, N, PLANE, WIDTH, LAST, BLOCK)
    b2 = load_lane(p_D, i_sample, o_i, i_first, o_first, None, None, 2, N, PLANE, WIDTH, LAST, BLOCK)
    b3 = load_lane(p_D, i_sample, o_i, i_first, o_first, None, None, 3, N, PLANE, WIDTH, LAST, BLOCK)
    b_sigma = load_scalar(p_sigma, sigma_stride, i_sample)
    b_scale = tl.sqrt(tl.maximum(b_sigma * b_sigma - sigma_min_squared, 0.0))
    if p_known is not None:
        p_known += i_sample * known_stride
        p_mask += i_sample * mask_stride
    z0, z1, z2, z3 = quarter_lanes(p_seed, seed_stride, p_position, position_stride, i_first, o_first, stream, True, MATH)
    p_out += i_sample * N
    renoise_lane(p_out, o_i, b0, z0, b_scale, p_known, p_mask, 0, N, PLANE, MASK_PLANES, CLIP, BLOCK)
    renoise_lane(p_out, o_i, b1, z1, b_scale, p_known, p_mask, 1, N, PLANE, MASK_PLANES, CLIP, BLOCK)
    renoise_lane(p_out, o_i, b2, z2, b_scale, p_known, p_mask, 2, N, PLANE, MASK_PLANES, CLIP, BLOCK)
    renoise_lane(p_out, o_i, b3, z3, b_scale, p_known, p_mask, 3, N, PLANE, MASK_PLANES, CLIP, BLOCK)


@triton.jit
def _to_uint8_kernel(
    p_D, p_out, N: tl.constexpr, PLANE: tl.constexpr, FROM_PLANES: tl.constexpr, TO_PLANES: tl.constexpr, BLOCK: tl.constexpr
):
    """Walks the output in memory order. FROM_PLANES and TO_PLANES: whether input and output hold one plane per channel."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    i_sample = (pid // BLOCKS).to(tl.int64)
    o_out = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    m_out = None
    if N % BLOCK != 0:
        m_out = o_out < N
    CHANNELS: tl.constexpr = N // PLANE
    o_in = o_out
    if FROM_PLANES and not TO_PLANES:
        o_in = (o_out % CHANNELS) * PLANE + o_out // CHANNELS
    elif TO_PLANES and not FROM_PLANES:
        o_in = (o_out % PLANE) * CHANNELS + o_out // PLANE
    b_x = tl.load(p_D + i_sample * N + o_in, mask=m_out).to(tl.float32)
    b_level = tl.minimum(tl.maximum((b_x + 1.0) * 127.5, 0.0), 255.0)
    # Adding 2^23 rounds half to even and leaves the integer in the low bits.
    b_pixel = (b_level + 8388608.0).to(tl.int32, bitcast=True)
    tl.store(p_out + i_sample * N + o_out, b_pixel.to(tl.uint8), mask=m_out)


def _launch_renoise(D_x, seed, position, sigma, step, sigma_min, known, mask, clip):
    out = _fake_renoise(D_x)
    if out.numel() == 0:
        return out
    batch, elements = D_x.shape[0], D_x[0].numel()
    grid = launch.quarter_grid("renoise", batch, elements)
    known, known_stride = launch.strided(None if known is None else known.contiguous(), batch)
    mask, mask_stride = launch.strided(None if mask is None else mask.contiguous(), batch)
    with launch.device_guard(D_x):
        _renoise_kernel[(grid.programs,)](
            D_x,
            *launch.strided(seed, batch),
            *launch.strided(position, batch),
            *launch.strided(sigma, batch),
            sigma_min**2,
            STREAM_SAMPLING_NOISE + step,
            known,
            known_stride,
            mask,
            mask_stride,
            out,
            batch,
            N=elements,
            PLANE=D_x.shape[2] * D_x.shape[3],
            WIDTH=D_x.shape[3],
            MASK_PLANES=0 if mask is None else mask.shape[1],
            CLIP=clip,
            LAST=not D_x.is_contiguous(),
            **grid.constants,
        )
    return out


def _launch_to_uint8(D_x: Tensor, layout: str) -> Tensor:
    out = _fake_to_uint8(D_x, layout)
    if out.numel() == 0:
        return out
    elements, block = D_x[0].numel(), 512
    blocks = -(-elements // block)
    with launch.device_guard(D_x):
        _to_uint8_kernel[(D_x.shape[0] * blocks,)](
            D_x,
            out,
            N=elements,
            PLANE=D_x.shape[2] * D_x.shape[3],
            FROM_PLANES=D_x.is_contiguous(),
            TO_PLANES=layout == "NCHW" or D_x.shape[1] == 1,
            BLOCK=block,
            num_warps=4,
        )
    return out


def _fake_renoise(D_x, *others):
    return D_x.new_empty(D_x.shape, dtype=torch.float32)


def _fake_to_uint8(D_x: Tensor, layout: str) -> Tensor:
    batch, channels, height, width = D_x.shape
    shape = (batch, height, width, channels) if layout == "NHWC" else (batch, channels, height, width)
    return D_x.new_empty(shape, dtype=torch.uint8)


_renoise_op = torch.library.custom_op("fastcm::renoise", renoise_reference, mutates_args=())
_to_uint8_op = torch.library.custom_op("fastcm::to_uint8", to_uint8_reference, mutates_args=())
launch.register(_renoise_op, _launch_renoise)
launch.register(_to_uint8_op, _launch_to_uint8)
_renoise_op.register_fake(_fake_renoise)
_to_uint8_op.register_fake(_fake_to_uint8)


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
