"""The cases of precondition and distance."""

import math

import torch
from torch import Tensor

from fastcm import kernels
from fastcm.benchmarks.kernels.cases import AotCase, BenchCase, Budget, kernel_module

_BATCH = 2
_precondition, _distance = (kernel_module(stem) for stem in ("precondition", "distance"))
_SMALL, _LARGE, _BEYOND = (3, 32, 32), (3, 64, 64), (3, 256, 256)


def _images(shape, dtype=torch.float32, last: bool = False) -> Tensor:
    return torch.empty((_BATCH, *shape), dtype=dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _coefficient() -> Tensor:
    return torch.ones(_BATCH)


def _precondition_case(variant: str, budget: Budget, *, dtype=torch.bfloat16, last=False, shape=_LARGE) -> AotCase:
    def call():
        return _precondition._launch_fwd(_images(shape), _images(shape, dtype, last), _coefficient(), _coefficient())

    elements, budgets = _BATCH * math.prod(shape), {"precondition_fwd": budget}
    return AotCase(op="precondition", variant=variant, shape=shape, launch=call, elements=elements, budgets=budgets)


def _precondition_backward_case(variant: str, budget: Budget, *, needs_x: bool, dtype=torch.bfloat16, last=False) -> AotCase:
    def call():
        x_dtype = torch.float32 if needs_x else None
        return _precondition._launch_bwd(_images(_LARGE), _coefficient(), _coefficient(), x_dtype, dtype, last)

    elements, budgets = _BATCH * math.prod(_LARGE), {"precondition_bwd": budget}
    return AotCase(op="precondition", variant=variant, shape=_LARGE, launch=call, elements=elements, budgets=budgets)


def _distance_case(shape, kind: str, variant: str, budgets: dict[str, Budget], *, dtype=torch.float32, last=False) -> AotCase:
    def call():
        side = (_images(shape), _images(shape, dtype, last), _coefficient(), _coefficient())
        return _distance._launch_fwd(*side, *side, _coefficient(), kind, 0.1, True)

    return AotCase(
        op="distance", variant=f"{kind}, {variant}", shape=shape, launch=call, elements=_BATCH * math.prod(shape), budgets=budgets
    )


def _distance_backward_case(dtype, budget: Budget) -> AotCase:
    def call():
        return _distance._launch_bwd(_images(_LARGE, dtype), _coefficient())

    elements, variant = _BATCH * math.prod(_LARGE), f"scaled by what comes from above, {str(dtype).removeprefix('torch.')}"
    return AotCase(op="distance", variant=variant, shape=_LARGE, launch=call, elements=elements, budgets={"distance_bwd": budget})


# A thread owns eight elements, twelve or sixteen in the one pass of `distance`: two or more 128-bit accesses to an fp32 image, one or more
# to a 16-bit one. The value of a sample is one 32-bit store. A second layout is read by elements, through the first-level cache, and never
# written so, but where x and F both get gradients.
def _one_pass(instructions: float, floor: float, loads: int, stores: int) -> dict[str, Budget]:
    return {
        "distance_fwd": Budget(
            instructions=instructions, bytes_per_element=floor, load_bits={128: loads}, store_bits={128: stores, 32: stores + 1}
        )
    }


def _two_launches(first_floor: float, loads: int, stores: int, second: Budget) -> dict[str, Budget]:
    partial = Budget(instructions=29, bytes_per_element=first_floor, load_bits={128: loads}, store_bits={128: stores, 32: stores + 1})
    return {"distance_fwd": partial, "distance_finish": second}


_SUMS = Budget(instructions=0.1, bytes_per_element=0.01)
_RESCALE = Budget(instructions=13, bytes_per_element=8, load_bits={128: 2}, store_bits={128: 2, 32: 3})
_CAST = Budget(instructions=14, bytes_per_element=6, load_bits={128: 2}, store_bits={128: 1, 32: 2})

AOT_CASES = [
    _precondition_case("fp32", Budget(instructions=7, bytes_per_element=12, load_bits={128: 4}, store_bits={128: 2}), dtype=torch.float32),
    _precondition_case("bf16 F", Budget(instructions=11, bytes_per_element=10, load_bits={128: 3}, store_bits={128: 2})),
    _precondition_case(
        "bf16 F channels-last", Budget(instructions=8, bytes_per_element=10, load_bits={128: 3}, store_bits={128: 3}), last=True
    ),
    _precondition_backward_case(
        "gradient to bf16 F", Budget(instructions=6, bytes_per_element=6, load_bits={128: 2}, store_bits={128: 1}), needs_x=False
    ),
    _precondition_backward_case(
        "gradient to bf16 F channels-last", Budget(instructions=14, bytes_per_element=6, store_bits={128: 1}), needs_x=False, last=True
    ),
    _precondition_backward_case(
        "gradients to x and F, fp32",
        Budget(instructions=7, bytes_per_element=12, load_bits={128: 2}, store_bits={128: 4}),
        needs_x=True,
        dtype=torch.float32,
    ),
    _distance_case(_SMALL, "pseudo_huber", "fp32", _one_pass(34, 20, 8, 2)),
    *(_distance_case(_LARGE, kind, "fp32", _one_pass(23, 20, 12, 3)) for kind in ("pseudo_huber", "l2", "l1")),
    _distance_case(_LARGE, "pseudo_huber", "bf16 F", _one_pass(29, 14, 6, 1), dtype=torch.bfloat16),
    _distance_case(
        _LARGE,
        "pseudo_huber",
        "bf16 F channels-last",
        {"distance_fwd": Budget(instructions=44, bytes_per_element=14, load_bits={128: 4}, store_bits={128: 2, 32: 3})},
        dtype=torch.bfloat16,
        last=True,
    ),
    _distance_case(_BEYOND, "pseudo_huber", "fp32", _two_launches(20, 8, 2, _RESCALE)),
    _distance_case(_BEYOND, "pseudo_huber", "bf16 F", _two_launches(16, 6, 2, _CAST), dtype=torch.bfloat16),
    _distance_case(
        _BEYOND,
        "l2",
        "bf16 F channels-last",
        {
            "distance_fwd": Budget(instructions=40, bytes_per_element=14, load_bits={128: 2}, store_bits={128: 1, 32: 2}),
            "distance_finish": _SUMS,
        },
        dtype=torch.bfloat16,
        last=True,
    ),
    _distance_case(_BEYOND, "l2", "fp32", _two_launches(20, 8, 2, _SUMS)),
    _distance_backward_case(
        torch.float32, Budget(instructions=6, bytes_per_element=8, load_bits={128: 2}, store_bits={128: 2}, counted={"gradient": 2})
    ),
    _distance_backward_case(
        torch.bfloat16, Budget(instructions=7, bytes_per_element=4, load_bits={128: 1}, store_bits={128: 1}, counted={"gradient": 2})
    ),
]


def _random(shape, device, seed: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _random_coefficients(batch: int, device, first_seed: int, count: int) -> list[Tensor]:
    return [torch.rand(batch, generator=torch.Generator().manual_seed(first_seed + i)).add_(0.1).to(device) for i in range(count)]


def _precondition_bench(shape: tuple[int, ...], quick: bool) -> BenchCase:
    def inputs(device):
        return _random(shape, device, 0), _random(shape, device, 1, torch.bfloat16), *_random_coefficients(shape[0], device, 2, 2)

    return BenchCase(
        op="precondition",
        variant="bf16 F",
        shape=shape,
        inputs=inputs,
        fastcm=kernels.precondition,
        reference=_precondition.precondition_reference,
        bytes=10 * math.prod(shape),
        quick=quick,
    )


def _distance_bench(shape: tuple[int, ...], quick: bool) -> BenchCase:
    """Value and gradient of a training step's loss, whose incoming gradient is 1."""

    def inputs(device):
        x, x_target, F_x, F_target = (_random(shape, device, seed) for seed in range(4))
        c_skip, c_out, c_skip_target, c_out_target, weight = _random_coefficients(shape[0], device, 4, 5)
        return x, F_x, c_skip, c_out, x_target, F_target, c_skip_target, c_out_target, weight

    def both(function):
        def value_and_gradient(x, F_x, *rest):
            with torch.enable_grad():
                F_x = F_x.detach().requires_grad_()
                value = function(x, F_x, *rest, kind="pseudo_huber", c=0.1)
                return value.detach(), torch.autograd.grad(value.sum(), F_x)[0]

        return value_and_gradient

    return BenchCase(
        op="distance",
        variant="pseudo_huber, value and gradient",
        shape=shape,
        inputs=inputs,
        fastcm=both(kernels.distance),
        reference=both(_distance.distance_reference),
        bytes=20 * math.prod(shape),
        quick=quick,
    )


BENCH_CASES = [
    make(shape, quick)
    for make in (_precondition_bench, _distance_bench)
    for shape, quick in (((512, 3, 32, 32), True), ((256, 3, 64, 64), False), ((8192, 3, 64, 64), True))
] + [_distance_bench((512, 3, 256, 256), False)]
