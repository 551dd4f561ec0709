"""The one noise stream: Philox4x32-10 words, uniforms and normals, a function of (seed, position, stream, element) alone.

Key = the 64-bit seed (low word, high word). Counter = (i, position low, position high, stream) (Salmon et al. 2011, Parallel random
numbers: as easy as 1, 2, 3). A sample of n elements in NCHW order takes the counters i in [0, Q), Q = ceil(n / 4); lane l of counter i is
element l Q + i, whatever the memory format of the tensor. The words w0 .. w3 of a counter give, by Box-Muller,
  u = ((w0 >> 9) + 0.5) 2^-23, theta = 2 pi (w1 >> 8) 2^-24, z0 = sqrt(-2 ln u) cos(theta), z1 = the same with sin; z2, z3 from w2, w3.
These numbers are public: ONNX graphs and other languages reproduce them. Writes 4 bytes per element, reads nothing.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.launch import tl, triton
from fastcm.kernels.quarter_layout import quarter_counters, quarter_lanes, store_lane

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
# The CPU works in blocks of this many counters, whose temporaries fit a third-level cache.
_CPU_COUNTERS = 1 << 17
_NUMPY_COUNTERS = 1 << 13


def philox_words(seed: Tensor, position: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Returns the words [B, n, 4] int64, each in [0, 2^32), of the counters [n] int64 for every (seed, position).

    seed, position: int64 [B] or [1]; negative values are two's complement. ValueError for other dtypes and shapes.
    """
    _check("philox_words", seed, position, stream)
    launch.check_tensor("philox_words", "counters", counters, dtypes=(torch.int64,), shape=(None,), like=seed)
    return _words(*_rounds(seed[:, None], position[:, None], counters[None], stream), dim=-1) & _MASK


def normal(seed: Tensor, position: Tensor, shape: Sequence[int], *, stream: int) -> Tensor:
    """Returns standard normals [B, *shape] fp32 in the quarter layout of the stream.

    seed, position: int64 [B] or [1] on the device of the work. A sample depends on its own seed and position only, never on its batch.
    """
    _check("normal", seed, position, stream)
    if launch.chosen("philox", seed, elements=_batch(seed, position) * math.prod(shape)) == "triton":
        return launch.call(_normal_op, seed, position, shape, stream)
    return normal_reference(seed, position, shape, stream)


def uniform_field(seed: Tensor, position: Tensor, shape: Sequence[int], *, stream: int) -> Tensor:
    """Returns uniforms in (0, 1) [B, *shape] fp32: element l Q + i is u of word l of counter i (dropout masks)."""
    _check("uniform_field", seed, position, stream)
    if launch.chosen("philox", seed, elements=_batch(seed, position) * math.prod(shape)) == "triton":
        return launch.call(_uniform_field_op, seed, position, shape, stream)
    return uniform_field_reference(seed, position, shape, stream)


def uniform(seed: Tensor, position: Tensor, *, stream: int) -> Tensor:
    """Returns one uniform in (0, 1) per sample [B] fp32: u of word 0 of counter 0 (sigma, flip and label-drop draws)."""
    _check("uniform", seed, position, stream)
    if launch.chosen("philox", seed, elements=_batch(seed, position)) == "triton":
        # A sample of one element is word 0 of counter 0: one launch for what are some ninety operations of torch.
        return launch.call(_uniform_field_op, seed, position, (), stream)
    zero = torch.zeros(1, dtype=torch.int64, device=seed.device)
    even, _ = _rounds(seed, position, zero, stream)
    return _uniforms(even[0])


def normal_reference(seed: Tensor, position: Tensor, shape: Sequence[int], stream: int) -> Tensor:
    """The definition of `normal` in torch: int64 words, fp32 Box-Muller."""
    return _field(seed, position, shape, stream, _normals)


def uniform_field_reference(seed: Tensor, position: Tensor, shape: Sequence[int], stream: int) -> Tensor:
    """The definition of `uniform_field` in torch."""
    return _field(seed, position, shape, stream, _lane_uniforms)


def _rounds(seed: Tensor, position: Tensor, counter: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Ten Philox rounds on int64 tensors that broadcast. Returns words 0 and 2, masked to 32 bits, and words 1 and 3, with high garbage."""
    # A call of numpy costs less than one of torch, which for few counters is most of the time; torch has threads, and can be traced.
    few = seed.is_cpu and type(seed) is Tensor and seed.numel() * counter.numel() <= _NUMPY_COUNTERS
    if few and not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is None:
        even, odd = _mixed(np, seed.numpy(), position.numpy(), counter.numpy(), stream, np.arange(10))
        return torch.from_numpy(np.ascontiguousarray(even)), torch.from_numpy(np.ascontiguousarray(odd))
    return _mixed(torch, seed, position, counter, stream, torch.arange(10, dtype=torch.int64, device=seed.device))


def _mixed(xp, seed, position, counter, stream, rounds):
    """The rounds on arrays of xp, torch or numpy, two words in one: few calls, and in place, as fresh memory costs more than arithmetic."""
    zero = 0 * (seed + position + counter)
    even = xp.stack((zero + counter, zero + ((position >> 32) & _MASK)))
    odd = xp.stack((zero + (position & _MASK), zero + stream))
    pair = rounds[:2].reshape(2, *[1] * zero.ndim)
    factors, steps = _between(_ROUND_A, _ROUND_B, pair), _between(_KEY_A, _KEY_B, pair)
    keys = (xp.stack((seed & _MASK, (seed >> 32) & _MASK)) + rounds.reshape(10, *[1] * pair.ndim) * steps) & _MASK
    for key in keys:
        even *= factors
        products = even.flip(0) if xp is torch else even[::-1]  # a copy, or a view
        # The products overflow int64 into its sign; every bit is right, and the mask after the shift drops the copies of the sign.
        odd ^= products >> 32
        odd ^= key
        odd &= _MASK
        even, odd = odd, products
    return even, odd


def _words(even: Tensor, odd: Tensor, *, dim: int) -> Tensor:
    """Words 0 to 3 in order, along a new dimension."""
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=dim)


def _between(first: int, second: int, pair):
    """`first` where pair is 0, `second` where it is 1, with no copy from the host."""
    return first + (second - first) * pair


def _uniforms(word: Tensor) -> Tensor:
    return ((word >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def _lane_uniforms(even: Tensor, odd: Tensor) -> Tensor:
    """[2, B, q] words 0 and 2, 1 and 3 -> [B, 4, q] uniforms."""
    return _uniforms(_words(even, odd, dim=1))


def _normals(even: Tensor, odd: Tensor) -> Tensor:
    """[2, B, q] words 0 and 2, 1 and 3 -> [B, 4, q] normals."""
    u = _uniforms(even.transpose(0, 1))
    # The 24-bit angle taken as signed: theta - 2 pi in its upper half, where fp32 is finer.
    theta = odd.transpose(0, 1).bitwise_left_shift(32).bitwise_right_shift_(40).float().mul_(math.tau * 2.0**-24)
    # 1 - u is exact, so the series keeps the relative precision that a fast logarithm loses near 1. Both branches are positive.
    v = 1.0 - u
    series = v.mul(1 / 4).add_(1 / 3).mul_(v).add_(1 / 2).mul_(v).add_(1.0).mul_(v)
    radius = torch.where(u > 1.0 - 2.0**-6, series, u.log().neg_()).mul_(2.0).sqrt_()
    return torch.stack((theta.cos().mul_(radius), theta.sin().mul_(radius)), dim=2).flatten(1, 2)


def _field(seed: Tensor, position: Tensor, shape: Sequence[int], stream: int, transform: Callable[..., Tensor]) -> Tensor:
    elements = math.prod(shape)
    quarter = (elements + 3) // 4
    batch = _batch(seed, position)
    counters = torch.arange(quarter, dtype=torch.int64, device=seed.device)
    seed, position = seed[:, None], position[:, None].expand(batch, 1)
    if seed.is_cpu and not torch.compiler.is_compiling() and batch * quarter > _CPU_COUNTERS:
        field = torch.empty(batch, 4, quarter)
        samples = max(1, _CPU_COUNTERS // quarter)
        for b in range(0, batch, samples):
            rows = slice(b, b + samples)
            for i in range(0, quarter, _CPU_COUNTERS):
                part = slice(i, i + _CPU_COUNTERS)
                field[rows, :, part] = transform(
                    *_rounds(seed if seed.shape[0] == 1 else seed[rows], position[rows], counters[part][None], stream)
                )
    else:
        field = transform(*_rounds(seed, position, counters[None], stream))
    return field.view(batch, 4 * quarter)[:, :elements].contiguous().view(batch, *shape)


@triton.jit(do_not_specialize=["stream", "batch"])
def _philox_kernel(
    p_out,
    p_seed,
    seed_stride: tl.constexpr,
    p_position,
    position_stride: tl.constexpr,
    stream,
    batch,
    N: tl.constexpr,
    NORMAL: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr,
    MATH: tl.constexpr,
):
    i_sample, o_i, i_first, o_first = quarter_counters(batch, N, BLOCK, SAMPLES)
    b0, b1, b2, b3 = quarter_lanes(p_seed, seed_stride, p_position, position_stride, i_first, o_first, stream, NORMAL, MATH)
    p_sample = p_out + i_sample * N
    store_lane(p_sample, o_i, b0, 0, N, BLOCK)
    store_lane(p_sample, o_i, b1, 1, N, BLOCK)
    store_lane(p_sample, o_i, b2, 2, N, BLOCK)
    store_lane(p_sample, o_i, b3, 3, N, BLOCK)


def _launch_field(seed: Tensor, position: Tensor, shape: Sequence[int], stream: int, is_normal: bool) -> Tensor:
    batch, elements = _batch(seed, position), math.prod(shape)
    field = torch.empty((batch, *shape), dtype=torch.float32, device=seed.device)
    if field.numel() == 0:
        return field
    grid = launch.quarter_grid("philox", batch, elements)
    keys = (*launch.strided(seed, batch), *launch.strided(position, batch))
    with launch.device_guard(seed):
        _philox_kernel[(grid.programs,)](field, *keys, stream, batch, N=elements, NORMAL=is_normal, **grid.constants)
    return field


def _launch_normal(seed: Tensor, position: Tensor, shape: Sequence[int], stream: int) -> Tensor:
    return _launch_field(seed, position, shape, stream, True)


def _launch_uniform_field(seed: Tensor, position: Tensor, shape: Sequence[int], stream: int) -> Tensor:
    return _launch_field(seed, position, shape, stream, False)


def _fake_field(seed: Tensor, position: Tensor, shape: Sequence[int], stream: int) -> Tensor:
    return seed.new_empty((_batch(seed, position), *shape), dtype=torch.float32)


_normal_op = torch.library.custom_op("fastcm::normal", normal_reference, mutates_args=())
_uniform_field_op = torch.library.custom_op("fastcm::uniform_field", uniform_field_reference, mutates_args=())
launch.register(_normal_op, _launch_normal)
launch.register(_uniform_field_op, _launch_uniform_field)
_normal_op.register_fake(_fake_field)
_uniform_field_op.register_fake(_fake_field)


def _batch(seed: Tensor, position: Tensor) -> int:
    return position.shape[0] if seed.shape[0] == 1 else seed.shape[0]


def _check(op: str, seed: Tensor, position: Tensor, stream: int) -> None:
    launch.check_tensor(op, "seed", seed, dtypes=(torch.int64,), shape=(None,))
    launch.check_tensor(op, "position", position, dtypes=(torch.int64,), shape=(None,), like=seed)
    if seed.shape[0] != 1 and position.shape[0] != 1 and seed.shape[0] != position.shape[0]:
        raise ValueError(f"wrong shape in {op}(position): {list(position.shape)}. Use [{seed.shape[0]}] like seed, or [1].")
    if not 0 <= stream <= _MASK:
        raise ValueError(f"illegal value in {op}(stream): {stream}. Use 0 to 2^32 - 1.")
