"""The cases of group_norm and group_statistics."""

import math

import torch
from torch import Tensor

from fastcm import kernels
from fastcm.benchmarks.kernels.cases import AotCase, BenchCase, Budget, kernel_module

_group_norm, _statistics = (kernel_module(stem) for stem in ("group_norm", "group_statistics"))
LAST = torch.channels_last
# What belongs to channels and samples is no part of the floor.
_COUNTED = {name: 0 for name in ("weight", "bias", "scale", "shift", "mean", "rstd", "sums", "partial", "means")}


def _groups(channels: int) -> int:
    return min(32, channels // 4)


def _image(shape, dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=LAST)


def _arguments(shape, dtype):
    """(x, weight, bias, scale, shift) as ADM's blocks have them: scale and shift are halves of one matrix. They take no memory."""
    batch, channels = shape[:2]
    affine = [torch.empty(channels, dtype=dtype, device="meta") for _ in range(2)]
    return _image(shape, dtype), *affine, *torch.empty(batch, 2 * channels, dtype=dtype, device="meta").chunk(2, 1)


def _trips(shape) -> int:
    """Iterations of the loops over a program's chunk of pixels."""
    grid = _statistics.split_grid(torch.empty(shape, device="meta"), _groups(shape[1]))
    return grid.chunk_pixels // grid.tile["BLOCK_P"]


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _forward_case(shape, dtype, budgets: dict[str, Budget]) -> AotCase:
    def call():
        x, weight, bias, scale, shift = _arguments(shape, dtype)
        return _group_norm._launch_fwd(x, _groups(shape[1]), weight, bias, 1e-5, scale, shift, True)

    variant = f"{_name(dtype)}, scale, shift, SiLU"
    return AotCase(op="group_norm", variant=variant, shape=shape, launch=call, elements=math.prod(shape), budgets=budgets)


def _backward_case(shape, dtype, budgets: dict[str, Budget]) -> AotCase:
    def call():
        x, weight, bias, scale, shift = _arguments(shape, dtype)
        statistics = torch.empty(shape[0], _groups(shape[1]), device="meta")
        return _group_norm._launch_bwd(x, x, _groups(shape[1]), weight, bias, scale, shift, True, statistics, statistics)

    variant = f"backward, {_name(dtype)}, scale, shift, SiLU"
    return AotCase(op="group_norm", variant=variant, shape=shape, launch=call, elements=math.prod(shape), budgets=budgets)


def _one_pass(dtype, instructions: float, *, backward: bool) -> dict[str, Budget]:
    # Four 128-bit accesses of a thread to each image; mean and rstd, or S1 and S2, are narrow stores.
    name, tensors = ("group_norm_bwd", 3) if backward else ("group_norm_fwd", 2)
    return {
        name: Budget(
            instructions=instructions,
            registers=128 if backward else 96,
            bytes_per_element=tensors * dtype.itemsize,
            counted=_COUNTED,
            load_bits={128: 4 * (tensors - 1)},
            store_bits={128: 4, 32: 6},
        )
    }


def _split_forward(dtype, trips: int) -> dict[str, Budget]:
    # The sums of a program's threads weigh most where it has few pixels: at batch one and at 16x16.
    accesses = dtype.itemsize
    return {
        "group_statistics_partial": Budget(
            instructions=32 if trips < 3 else 15,
            registers=72,
            bytes_per_element=dtype.itemsize,
            counted=_COUNTED,
            load_bits={128: accesses},
            trips=trips,
        ),
        "group_statistics_merge": Budget(instructions=4, bytes_per_element=0.1, counted=_COUNTED),
        "split_output": Budget(
            instructions=28, bytes_per_element=2 * dtype.itemsize, counted=_COUNTED, load_bits={128: accesses}, store_bits={128: accesses}
        ),
    }


def _split_backward(dtype, trips: int) -> dict[str, Budget]:
    accesses = dtype.itemsize
    return {
        "split_sums": Budget(
            instructions=52 if trips < 3 else 33,
            registers=112,
            bytes_per_element=2 * dtype.itemsize,
            counted=_COUNTED,
            load_bits={128: 2 * accesses},
            trips=trips,
        ),
        "split_reduce": Budget(instructions=5, bytes_per_element=0.1, counted=_COUNTED),
        "split_gradient": Budget(
            instructions=38,
            registers=80,
            bytes_per_element=3 * dtype.itemsize,
            counted=_COUNTED,
            load_bits={128: 2 * accesses},
            store_bits={128: accesses},
        ),
    }


_BF16, _FP32 = torch.bfloat16, torch.float32
# Of the digits network, CIFAR-10's, ImageNet 64x64's and LSUN 256x256's: (shape, dtype, instructions forward, backward). A group of 24 or
# 36 channels leaves lanes of a power of two idle. An H200 feeds its memory with 31 instructions per element of bf16 forward, 46 backward.
_SLABS = [
    ((128, 32, 8, 8), _FP32, 25, 34),
    ((128, 64, 8, 8), _BF16, 29, 38),
    ((1, 128, 32, 32), _BF16, 29, 38),
    ((512, 128, 32, 32), _BF16, 29, 38),
    ((128, 256, 16, 16), _BF16, 29, 38),
    ((128, 256, 16, 16), _FP32, 28, 36),
    ((128, 512, 16, 16), _BF16, 29, 38),
    ((64, 768, 8, 8), _BF16, 38, 50),
    ((64, 1152, 8, 8), _BF16, 53, 70),
]
_SPLIT = [
    (64, 192, 64, 64),
    (64, 384, 32, 32),
    (64, 576, 16, 16),
    (64, 1152, 16, 16),
    (1, 192, 64, 64),
    (1, 256, 256, 256),
    (8, 256, 256, 256),
]

AOT_CASES = [
    *(_forward_case(shape, dtype, _one_pass(dtype, instructions, backward=False)) for shape, dtype, instructions, _ in _SLABS),
    *(_backward_case(shape, dtype, _one_pass(dtype, instructions, backward=True)) for shape, dtype, _, instructions in _SLABS),
    *(_forward_case(shape, _BF16, _split_forward(_BF16, _trips(shape))) for shape in _SPLIT),
    *(_backward_case(shape, _BF16, _split_backward(_BF16, _trips(shape))) for shape in _SPLIT),
    _forward_case((1, 192, 64, 64), _FP32, _split_forward(_FP32, 1)),
    _backward_case((1, 192, 64, 64), _FP32, _split_backward(_FP32, 1)),
]


def _bench(shape: tuple[int, ...], quick: bool, *, backward: bool) -> BenchCase:
    batch, channels = shape[:2]
    groups = _groups(channels)

    def inputs(device):
        generator = torch.Generator().manual_seed(0)
        x, upstream = (torch.randn(shape, generator=generator).to(device, _BF16).contiguous(memory_format=LAST) for _ in range(2))
        weight, bias = (torch.randn(channels, generator=generator).to(device, _BF16) for _ in range(2))
        scale, shift = torch.randn(batch, 2 * channels, generator=generator).to(device, _BF16).chunk(2, 1)
        return x, weight, bias, scale, shift, upstream

    def forward(function):
        def norm(x, weight, bias, scale, shift, upstream):
            return function(x, groups, weight, bias, scale=scale, shift=shift)

        return norm

    def both(function):
        def norm_and_gradients(x, weight, bias, scale, shift, upstream):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (x, weight, bias, scale, shift)]
                out = function(leaves[0], groups, *leaves[1:3], scale=leaves[3], shift=leaves[4])
                return out.detach(), *torch.autograd.grad(out, leaves, upstream)

        return norm_and_gradients

    of, variant, passes = (both, "bf16, forward and backward", 5) if backward else (forward, "bf16, forward", 2)
    return BenchCase(
        op="group_norm",
        variant=variant,
        shape=shape,
        inputs=inputs,
        fastcm=of(kernels.group_norm),
        reference=of(_group_norm.group_norm_reference),
        bytes=passes * 2 * math.prod(shape),
        rtol=2e-2,
        quick=quick,
    )


# Norms of the networks for digits, CIFAR-10, ImageNet 64x64 and LSUN 256x256, batch 1 to 512.
_BENCH_SHAPES = [
    ((128, 32, 8, 8), True),
    ((1, 128, 32, 32), True),
    ((512, 128, 32, 32), True),
    ((512, 256, 16, 16), False),
    ((1, 192, 64, 64), True),
    ((64, 192, 64, 64), True),
    ((64, 384, 32, 32), False),
    ((64, 576, 16, 16), False),
    ((64, 1152, 8, 8), False),
    ((1, 256, 256, 256), False),
    ((8, 256, 256, 256), False),
]
BENCH_CASES = [_bench(shape, quick, backward=backward) for shape, quick in _BENCH_SHAPES for backward in (False, True)]
