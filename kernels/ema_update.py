"""An exponential moving average alone, over flat buffers: average <- decay average + (1 - decay) source.

For those who bring their own optimizer; `optimizer_step` updates its averages in the same pass as the weights. 12 bytes per parameter.
"""

import torch


def ema_update(average, source, decay):
    """Update `average` in place. average, source: fp32 [n], contiguous, one device; decay: float or fp32 [1] on that device."""
    return ema_update_reference(average, source, decay)


@torch.no_grad()
def ema_update_reference(average, source, decay):
    """The definition, in torch."""
    average.lerp_(source, 1 - decay)
