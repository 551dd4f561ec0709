"""The loss scale of fp16 training: a power that follows what the gradients bear, on the device, without a look from the host."""

import torch
from torch import Tensor

from fastcm.errors import RunError

# Song et al. 2023 (code): 2^20 at first; a step that fits adds 1e-3 to the exponent, one that does not is left out and takes 1 away.
FIRST_EXPONENT, RISE, FALL = 20.0, 1e-3, 1.0


class LossScale:
    """2^g. exponent: g, fp32 [1]."""

    def __init__(self, device: torch.device):
        self.exponent = torch.full((1,), FIRST_EXPONENT, device=device)

    @property
    def value(self) -> Tensor:
        """fp32 [1]."""
        return self.exponent.exp2()

    def update(self, grad_norm: Tensor) -> None:
        """Follows the step whose gradient had this norm [1]."""
        self.exponent += torch.where(torch.isfinite(grad_norm), RISE, -FALL)

    def check(self) -> None:
        """Reads the device. RunError where not even the unscaled gradients fit fp16."""
        exponent = float(self.exponent)
        if exponent < 0:
            raise RunError(
                f"loss scale of fp16 below 1 in --precision: fp16 (2^{exponent:.0f}): gradients are not finite at any scale. "
                "Use --precision bf16, or a lower --lr."
            )
