"""An exponential moving average alone, over flat buffers: average <- decay average + (1 - decay) source.

For those who bring their own optimizer; `optimizer_step` updates its averages in the same pass as the weights. Buffers fp32 [n].
Bytes per parameter: 12.
"""

import torch
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.launch import tl, triton

BLOCK = 1024


def ema_update(average: Tensor, source: Tensor, decay: Tensor | float) -> None:
    """Update `average` in place. average, source: fp32 [n], contiguous; decay in [0, 1]: a float, or fp32 [1] on their device.

    Raises ValueError naming a bad argument.
    """
    launch.check_tensor("ema_update", "average", average, shape=(None,), contiguous=True)
    launch.check_tensor("ema_update", "source", source, shape=average.shape, like=average, contiguous=True)
    if isinstance(decay, Tensor):
        launch.check_tensor("ema_update", "decay", decay, shape=(1,), like=average)
    elif not 0 <= decay <= 1:
        raise ValueError(f"illegal value in ema_update(decay): {decay}. Use a number from 0 to 1.")
    if average.requires_grad and torch.is_grad_enabled():
        raise ValueError("argument with requires_grad in ema_update(average). It is updated in place: detach it.")
    if launch.chosen("ema_update", average) == "triton":
        _ema_update_op(average, source.detach(), *((decay, 0.0) if isinstance(decay, Tensor) else (None, 1 - decay)))
    else:
        ema_update_reference(average, source, decay)


@torch.no_grad()
def ema_update_reference(average: Tensor, source: Tensor, decay: Tensor | float) -> None:
    """The definition, in torch."""
    average.lerp_(source, 1 - decay)


@triton.jit
def _follow(average, source, o, m, b_rate):
    b_average = tl.load(average + o, m)
    tl.store(average + o, b_average + b_rate * (tl.load(source + o, m) - b_average), m)


@triton.jit
def _ema_update_fwd_kernel(average, source, decay, rate, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_rate = rate if decay is None else 1 - tl.load(decay)
    # Whole blocks go without a mask: one whose bound may not divide by 16 makes every access of the program a scalar one.
    if (tl.program_id(0) + 1).to(tl.int64) * BLOCK <= n:
        _follow(average, source, o, None, b_rate)
    else:
        _follow(average, source, o, o < n, b_rate)


def _launch_fwd(average: Tensor, source: Tensor, decay: Tensor | None, rate: float) -> None:
    n = average.numel()
    if n:
        with launch.device_guard(average):
            _ema_update_fwd_kernel[(triton.cdiv(n, BLOCK),)](average, source, decay, rate, n, BLOCK=BLOCK, num_warps=4)


@torch.library.custom_op("fastcm::ema_update", mutates_args={"average"})
def _ema_update_op(average: Tensor, source: Tensor, decay: Tensor | None, rate: float) -> None:
    """rate = 1 - decay where decay is None: a number is not made a tensor, which would take a launch."""
    ema_update_reference(average, source, 1 - rate if decay is None else decay)


launch.register(_ema_update_op, _launch_fwd)
