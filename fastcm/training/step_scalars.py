"""The scalars of a step on the device, where compiled code and recorded steps see no new constants when they change."""

import torch

from fastcm.training.schedule import StepValues


class StepScalars:
    """The host's StepValues as tensors that keep their places.

    lr, mu: fp32 [1]; ema_decays: fp32 [k]; steps: fp64 []; tangent_warmup: fp32 []. Without a dimension a tensor leaves the dtype of what
    it is combined with alone, as a Python number does.
    """

    def __init__(self, averages: int, device: torch.device):
        self.lr, self.mu = torch.zeros(1, device=device), torch.zeros(1, device=device)
        self.ema_decays = torch.zeros(averages, device=device)
        self.steps = torch.zeros((), dtype=torch.float64, device=device)
        self.tangent_warmup = torch.zeros((), device=device)

    def set(self, values: StepValues) -> None:
        """Waits for nothing: each number travels as an argument of its fill."""
        self.lr.fill_(values.lr)
        self.mu.fill_(values.mu)
        for index, decay in enumerate(values.ema_decays):
            self.ema_decays[index].fill_(decay)  # assigning a number copies it from the host, which waits for the device
        self.steps.fill_(values.steps)
        self.tangent_warmup.fill_(values.tangent_warmup)
