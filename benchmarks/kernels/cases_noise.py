"""The cases of philox, perturb, renoise and to_uint8."""

import math

import torch
from torch import Tensor

from fastcm import kernels
from fastcm.benchmarks.kernels.cases import AotCase, BenchCase, Budget, kernel_module

_IMAGES = ((3, 32, 32), (3, 64, 64))
_DIGITS, _DIGITS_BATCH = (1, 8, 8), 128
# What the machine code of perturb may cost for an element, in any layout, from any dtype, with a flip or without.
_PERTURB_INSTRUCTIONS = 36
_BATCH = 2
_philox, _perturb, _renoise = (kernel_module(stem) for stem in ("philox", "perturb", "renoise"))


def _seed() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def _batch(shape) -> int:
    """Digits are small enough for several to share a program."""
    return _DIGITS_BATCH if shape == _DIGITS else _BATCH


def _positions(shape) -> Tensor:
    return torch.arange(_batch(shape))


def _per_sample(shape) -> Tensor:
    return torch.ones(_batch(shape))


def _images(shape, dtype, last: bool = False) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((_batch(shape), *shape), dtype=dtype).contiguous(memory_format=layout)


def _elements(shape) -> int:
    return _batch(shape) * math.prod(shape)


def _philox_case(shape, variant: str, launch, budget: Budget) -> AotCase:
    def call():
        return launch(_seed(), _positions(shape), shape, 0)

    return AotCase(op="philox", variant=variant, shape=shape, launch=call, elements=_elements(shape), budgets={"philox": budget})


def _perturb_case(shape, variant: str, budget: Budget, *, dtype=torch.uint8, pair=True, scaled=torch.bfloat16, flip=False, last=False):
    def call():
        hi = _per_sample(shape)
        lo, c_in, c_in_lo = hi if pair else None, hi if scaled else None, hi if pair and scaled else None
        flips = torch.zeros(_batch(shape), dtype=torch.bool) if flip else None
        images = _images(shape, dtype, last)
        return _perturb._launch_perturb(images, _seed(), _positions(shape), hi, lo, c_in, c_in_lo, flips, scaled or torch.float32)

    return AotCase(op="perturb", variant=variant, shape=shape, launch=call, elements=_elements(shape), budgets={"perturb": budget})


def _renoise_case(shape, variant: str, budget: Budget, *, last=False, known=False) -> AotCase:
    def call():
        pixels = torch.empty((_BATCH, *shape)) if known else None
        mask = torch.empty((_BATCH, 1, *shape[1:]), dtype=torch.bool) if known else None
        images = _images(shape, torch.float32, last)
        return _renoise._launch_renoise(images, _seed(), _seed(), _per_sample(shape), 1, 0.002, pixels, mask, True)

    return AotCase(op="renoise", variant=variant, shape=shape, launch=call, elements=_elements(shape), budgets={"renoise": budget})


def _to_uint8_case(shape, variant: str, layout: str, budget: Budget) -> AotCase:
    def call():
        return _renoise._launch_to_uint8(_images(shape, torch.float32), layout)

    return AotCase(op="to_uint8", variant=variant, shape=shape, launch=call, elements=_elements(shape), budgets={"to_uint8": budget})


# A thread owns 16 elements: four 128-bit stores of fp32, four of 64 bits for 16-bit copies, four 32-bit loads of bytes. Mirrored rows and
# channels-last memory are loaded by elements, but for mirrored bytes, which a permutation of their word reverses.
_NORMAL = Budget(instructions=25, bytes_per_element=4, store_bits={128: 4})
_UNIFORM = Budget(instructions=18, bytes_per_element=4, store_bits={128: 4})
# A program of several digits reads the coefficients of each, one for 64 elements.
_NORMAL_DIGITS = Budget(instructions=25, bytes_per_element=4.13, store_bits={128: 4})
_PAIR_DIGITS = Budget(instructions=_PERTURB_INSTRUCTIONS, bytes_per_element=13.5, load_bits={32: 4}, store_bits={128: 8, 64: 16})
_RENOISE_DIGITS = Budget(instructions=29, bytes_per_element=8.1, load_bits={128: 4}, store_bits={128: 4})


def _pair_budget(dtype=torch.uint8, scaled=torch.bfloat16, loads=None) -> Budget:
    stores = {128: 16} if scaled == torch.float32 else {128: 8, 64: 16}
    floor = dtype.itemsize + 8 + 2 * scaled.itemsize
    return Budget(instructions=_PERTURB_INSTRUCTIONS, bytes_per_element=floor, load_bits=loads or {}, store_bits=stores)


def _perturb_pair(shape, *, dtype=torch.uint8, scaled=torch.bfloat16, flip=False, last=False) -> AotCase:
    name = "uint8" if dtype == torch.uint8 else "float32"
    variant = f"{name}{' channels-last' * last}, pair, {'bf16' if scaled == torch.bfloat16 else 'fp32'} copies{', flip' * flip}"
    wide = None if last or (flip and dtype != torch.uint8) else {32: 4} if dtype == torch.uint8 else {128: 4}
    return _perturb_case(shape, variant, _pair_budget(dtype, scaled, wide), dtype=dtype, scaled=scaled, flip=flip, last=last)


AOT_CASES = [
    *(_philox_case(shape, "normal", _philox._launch_normal, _NORMAL) for shape in _IMAGES),
    _philox_case(_DIGITS, "normal", _philox._launch_normal, _NORMAL_DIGITS),
    _philox_case((192, 32, 32), "uniform field (dropout)", _philox._launch_uniform_field, _UNIFORM),
    _perturb_case(_DIGITS, "uint8, pair, bf16 copies", _PAIR_DIGITS),
    _perturb_pair((3, 32, 32)),
    *(
        _perturb_pair((3, 64, 64), dtype=dtype, flip=flip, last=last)
        for dtype in (torch.uint8, torch.float32)
        for last in (False, True)
        for flip in (False, True)
    ),
    _perturb_pair((3, 64, 64), scaled=torch.float32),
    _perturb_case((3, 64, 64), "uint8, one", Budget(instructions=28, bytes_per_element=5, store_bits={128: 4}), pair=False, scaled=None),
    _renoise_case(_DIGITS, "clip", _RENOISE_DIGITS),
    _renoise_case((3, 64, 64), "clip", Budget(instructions=28, bytes_per_element=8, load_bits={128: 4}, store_bits={128: 4})),
    _renoise_case((3, 64, 64), "clip, channels-last", Budget(instructions=30, bytes_per_element=8, store_bits={128: 4}), last=True),
    _renoise_case(
        (3, 64, 64),
        "clip, known pixels",
        Budget(instructions=33, bytes_per_element=12.34, load_bits={128: 8}, store_bits={128: 4}),
        known=True,
    ),
    _to_uint8_case((3, 64, 64), "to NHWC", "NHWC", Budget(instructions=22, bytes_per_element=5, store_bits={32: 1})),
    _to_uint8_case((3, 64, 64), "to NCHW", "NCHW", Budget(instructions=14, bytes_per_element=5, load_bits={128: 1}, store_bits={32: 1})),
]


def _positive(shape, device, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).add_(0.1).to(device)


def _normal_case(shape: tuple[int, ...], quick: bool) -> BenchCase:
    batch, sample = shape[0], shape[1:]

    def inputs(device):
        return torch.tensor([5], device=device), torch.arange(batch, device=device)

    def normal(seed, position):
        return kernels.normal(seed, position, sample, stream=0)

    def reference(seed, position):
        return _philox.normal_reference(seed, position, sample, 0)

    def idiom(seed, position):
        return torch.randn(shape, device=seed.device)

    return BenchCase(
        op="philox",
        variant="normal",
        shape=shape,
        inputs=inputs,
        fastcm=normal,
        reference=reference,
        idiom=idiom,
        bytes=4 * math.prod(shape),
        quick=quick,
    )


def _inject_case(shape: tuple[int, ...], quick: bool) -> BenchCase:
    """The pair of a consistency training step: uint8 images in, two fp32 inputs and their bf16 copies out."""
    batch, elements = shape[0], math.prod(shape)

    def inputs(device):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
        coefficients = [_positive(batch, device, seed) for seed in range(4)]
        return images, torch.tensor([5], device=device), torch.arange(batch, device=device), *coefficients

    def perturb(images, seed, position, hi, lo, c_hi, c_lo):
        return kernels.perturb(images, seed, position, hi, lo, c_in_hi=c_hi, c_in_lo=c_lo, dtype=torch.bfloat16)

    def reference(images, seed, position, hi, lo, c_hi, c_lo):
        return _perturb.perturb_reference(images, seed, position, hi, lo, c_hi, c_lo, None, torch.bfloat16)

    def idiom(images, seed, position, hi, lo, c_hi, c_lo):
        hi, lo, c_hi, c_lo = (c.view(-1, 1, 1, 1) for c in (hi, lo, c_hi, c_lo))
        clean = images.float() / 127.5 - 1
        z = torch.randn_like(clean)
        x_hi, x_lo = clean + hi * z, clean + lo * z
        return x_hi, x_lo, (c_hi * x_hi).bfloat16(), (c_lo * x_lo).bfloat16()

    return BenchCase(
        op="perturb",
        variant="uint8, pair, bf16 copies",
        shape=shape,
        inputs=inputs,
        fastcm=perturb,
        reference=reference,
        idiom=idiom,
        bytes=13 * elements,
        quick=quick,
    )


def _renoise_bench(shape: tuple[int, ...], quick: bool) -> BenchCase:
    batch = shape[0]

    def inputs(device):
        D_x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        return D_x, torch.arange(batch, device=device), torch.zeros(1, dtype=torch.int64, device=device), _positive(batch, device, 1)

    def renoise(D_x, seed, position, sigma):
        return kernels.renoise(D_x, seed, position, sigma, step=1, sigma_min=0.002)

    def reference(D_x, seed, position, sigma):
        return _renoise.renoise_reference(D_x, seed, position, sigma, 1, 0.002, None, None, True)

    def idiom(D_x, seed, position, sigma):
        scale = (sigma.square() - 0.002**2).clamp(min=0).sqrt().view(-1, 1, 1, 1)
        return D_x.clamp(-1, 1) + scale * torch.randn_like(D_x)

    return BenchCase(
        op="renoise",
        variant="clip",
        shape=shape,
        inputs=inputs,
        fastcm=renoise,
        reference=reference,
        idiom=idiom,
        bytes=8 * math.prod(shape),
        quick=quick,
    )


def _to_uint8_bench(shape: tuple[int, ...], quick: bool) -> BenchCase:
    def inputs(device):
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device),)

    def reference(D_x):
        return _renoise.to_uint8_reference(D_x, "NHWC")

    return BenchCase(
        op="to_uint8",
        variant="to NHWC",
        shape=shape,
        inputs=inputs,
        fastcm=kernels.to_uint8,
        reference=reference,
        bytes=5 * math.prod(shape),
        quick=quick,
    )


# A training batch per GPU, which stays in the second-level cache, and at least four times that cache.
BENCH_CASES = [
    make(shape, quick)
    for make in (_normal_case, _inject_case, _renoise_bench, _to_uint8_bench)
    for shape, quick in (((512, 3, 32, 32), True), ((256, 3, 64, 64), False), ((8192, 3, 64, 64), True))
]
