"""The cases of optimizer_step and ema_update."""

import functools

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.radam import radam

from fastcm import kernels
from fastcm.benchmarks.kernels.cases import AotCase, BenchCase, Budget, kernel_module

_optimizer, _ema = (kernel_module(stem) for stem in ("optimizer_step", "ema_update"))
_BETAS, _EPS = (0.9, 0.999), 1e-8
# Elements of the flat buffers of the networks for digits, CIFAR-10, ImageNet 64x64 and LSUN 256x256, and their parameters' tensors.
NETWORKS = {"digits": (427_104, 129), "cifar10": (55_732_752, 416), "imagenet64": (295_899_280, 541), "lsun256": (526_304_784, 566)}
_DIGITS, _CIFAR, _IMAGENET, _LSUN = (elements for elements, _ in NETWORKS.values())


def _step_case(kind: str, averages: int, low: torch.dtype | None = None, n: int = 1 << 20, *, row: int | None = None) -> AotCase:
    """`averages` evaluation averages beside the target, and with `low` 16-bit gradients and copies of weights and target. row: the length
    of rows that are set back to unit magnitude."""

    def empty(size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device="meta")

    def call():
        one, grad = empty(1), empty(n, low or torch.float32)
        copies = [None if low is None else empty(n, low) for _ in range(2)]
        buffers = [empty(n) for _ in range(4 + averages)]
        return _optimizer._launch_fwd(
            kind,
            buffers[0],
            grad,
            *buffers[1:3],
            empty(1, torch.int64),
            one,
            one,
            _EPS,
            0.01,
            1.0,
            *_BETAS,
            buffers[4:],
            buffers[3],
            one,
            empty(averages),
            *copies,
            *(() if row is None else ([0, n // row, row], empty((n // row, 3), torch.int64))),
        )

    copies = f", {str(low).removeprefix('torch.')} gradient and copies" if low else ""
    copies += "" if row is None else ", rows set back"
    variant = f"{kind}, target, {averages} average{'s' * (averages != 1)}{copies}"
    budget = (_step_budget if row is None else _row_budget)(1 + averages, low=low is not None, n=n)
    return AotCase(op="optimizer_step", variant=variant, shape=(n,), launch=call, elements=n, budgets={"optimizer_step_fwd": budget})


def _step_budget(followers: int, *, low: bool, n: int) -> Budget:
    # Whole blocks and the masked rest are two branches with the same accesses: two for eight fp32 elements, one for 16-bit ones.
    loads = 2 * (6 + 2 * followers + (1 if low else 2))
    stores = 2 * (6 + 2 * followers + (2 if low else 0))
    return Budget(
        instructions=26 + 4 * followers + (11 if low else 0),
        bytes_per_element=28 + 8 * followers + (-2 + 4 if low else 0),
        load_bits={128: loads},
        store_bits={128: stores},
        trips=n // _optimizer.BLOCK // _optimizer.PROGRAMS_PER_PROCESSOR,  # of a GPU of one processor
        counted={"param": 2, "exp_avg": 2, "exp_avg_sq": 2, "target": 2, "averages": 2},
    )


def _row_budget(followers: int, *, low: bool, n: int) -> Budget:
    """Rows of one block, so that both loops of a row are counted once. What is loaded again is in the cache, and no part of the floor."""
    return Budget(
        instructions=46 + 8 * followers + (14 if low else 0),  # Triton 3.6 takes four more than 3.7
        registers=120 if low else 80,
        bytes_per_element=28 + 8 * followers + (-2 + 4 if low else 0),
        load_bits={128: 10 + 2 * followers - (1 if low else 0)},
        store_bits={128: 8 + 2 * followers + (2 if low else 0)},
        trips=n // _optimizer.BLOCK // _optimizer.PROGRAMS_PER_PROCESSOR,
        counted={"param": 2, "exp_avg": 2, "exp_avg_sq": 2, "target": 2, "averages": 2, "tiles": 0},
    )


def _ema_case(n: int) -> AotCase:
    def call():
        return _ema._launch_fwd(torch.empty(n), torch.empty(n), torch.empty(1), 0.0)

    # The block of the rest is a second branch, by scalars where n does not divide by 16; whole blocks are read and written wide.
    even, common = n % 16 == 0, {"bytes_per_element": 12, "counted": {"average": 2}}
    wide, narrow = ({128: 8}, {128: 4}) if even else ({128: 4, 32: 21}, {128: 2, 32: 10})
    budget = Budget(instructions=15 if even else 22, load_bits=wide, store_bits=narrow, **common)
    return AotCase(op="ema_update", variant="decay on the device", shape=(n,), launch=call, elements=n, budgets={"ema_update_fwd": budget})


AOT_CASES = [
    *(_step_case("radam", k) for k in (0, 1, 3)),
    _step_case("adamw", 1),
    _step_case("radam", 1, torch.bfloat16),
    *(_step_case("radam", 1, torch.bfloat16, n) for n in (_DIGITS, _CIFAR, _IMAGENET, _LSUN)),
    _step_case("adamw", 1, row=1024),
    _step_case("adamw", 1, torch.bfloat16, row=1024),
    _ema_case(1 << 20),
    _ema_case((1 << 20) + 4),
]


def _buffers(n: int, device: torch.device, count: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(n, generator=generator, device=device) for _ in range(count)]


def _step_inputs(n: int, device: torch.device):
    """(weights, gradient, moments, target, average) and (step, lr, norm, mu, decay), the norm that of the gradient."""
    param, grad, exp_avg, exp_avg_sq, target, average = _buffers(n, device, 6)
    lr, mu, decay = (torch.tensor([value], device=device) for value in (1e-4, 0.999, 0.9999))
    step, norm = torch.full((1,), 1000, device=device), torch.linalg.vector_norm(grad).reshape(1)
    return param, grad, exp_avg.mul_(0.01), exp_avg_sq.square_(), target, average, step, lr, norm, mu, decay


def _whole_step(function):
    def step(param, grad, exp_avg, exp_avg_sq, target, average, step, lr, norm, mu, decay):
        function(
            "radam",
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            step=step,
            lr=lr,
            grad_norm=norm,
            betas=_BETAS,
            eps=_EPS,
            weight_decay=0.01,
            clip=1.0,
            target=target,
            mu=mu,
            averages=(average,),
            decays=decay,
        )

    return step


def _tensors(n: int) -> int:
    """Elements of one tensor of a network of n: foreach and fused optimizers take lists, here of tensors of one size."""
    return -(-n // dict(NETWORKS.values())[n])


@functools.lru_cache(maxsize=8)
def _as_network(pointers: tuple[int, ...], n: int, flat: "_Flat") -> list[list[Tensor]]:
    parts = [list(buffer.split(_tensors(n))) for buffer in flat.buffers]
    return [*parts, [torch.full((), 1000.0, device=flat.buffers[0].device) for _ in parts[0]]]


class _Flat:
    """Buffers that are the same where their memory is the same, so that they are split into tensors once and not in what is measured."""

    def __init__(self, buffers):
        self.buffers = buffers

    def __hash__(self):
        return 0

    def __eq__(self, other):
        return True


def _foreach(update):
    def step(param, grad, exp_avg, exp_avg_sq, target, average, step, lr, norm, mu, decay):
        buffers = (param, grad, exp_avg, exp_avg_sq, target, average)
        params, grads, firsts, seconds, targets, averages, steps = _as_network(
            tuple(b.data_ptr() for b in buffers), param.numel(), _Flat(buffers)
        )
        torch._foreach_mul_(grads, (1.0 / (norm[0] + 1e-6)).clamp(max=1.0))
        update(params, grads, firsts, seconds, steps)
        for followers, rate in ((targets, 1e-3), (averages, 1e-4)):
            torch._foreach_lerp_(followers, params, rate)

    return step


def _radam(params, grads, firsts, seconds, steps):
    options = {"lr": 1e-4, "weight_decay": 0.01, "eps": _EPS, "beta1": _BETAS[0], "beta2": _BETAS[1]}
    radam(params, grads, firsts, seconds, steps, decoupled_weight_decay=True, foreach=True, capturable=params[0].is_cuda, **options)


def _fused_adamw(params, grads, firsts, seconds, steps):
    options = {"lr": 1e-4, "weight_decay": 0.01, "eps": _EPS, "beta1": _BETAS[0], "beta2": _BETAS[1], "amsgrad": False, "maximize": False}
    adamw(params, grads, firsts, seconds, [], steps, fused=True, **options)


def _step_bench(n: int, quick: bool) -> BenchCase:
    """RAdam with a target and one average: 44 bytes for each parameter. `fused` is torch's Adam, which has no fused RAdam."""
    return BenchCase(
        op="optimizer_step",
        variant="radam, target, 1 average",
        shape=(n,),
        inputs=functools.partial(_step_inputs, n),
        fastcm=_whole_step(kernels.optimizer_step),
        reference=_whole_step(_optimizer.optimizer_step_reference),
        variants={"foreach": _foreach(_radam), "fused": _foreach(_fused_adamw)},
        bytes=44 * n,
        in_place=True,
        quick=quick,
    )


def _ema_bench(n: int, quick: bool) -> BenchCase:
    def inputs(device):
        return *_buffers(n, device, 2), torch.tensor([0.999], device=device)

    def foreach(average, source, decay):
        averages, sources = (b.split(_tensors(n)) for b in (average, source))
        torch._foreach_lerp_(averages, sources, 1e-3)

    return BenchCase(
        op="ema_update",
        variant="decay on the device",
        shape=(n,),
        inputs=inputs,
        fastcm=kernels.ema_update,
        reference=_ema.ema_update_reference,
        variants={"foreach": foreach},
        bytes=12 * n,
        in_place=True,
        quick=quick,
    )


BENCH_CASES = [
    *(_step_bench(n, quick) for n, quick in ((_DIGITS, True), (_CIFAR, True), (_IMAGENET, False), (_LSUN, False))),
    *(_ema_bench(n, quick) for n, quick in ((_DIGITS, True), (_CIFAR, True), (_IMAGENET, False))),
]
