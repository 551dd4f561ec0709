"""Dropout whose masks are a function of (seed, image position, layer): the same for student and target, for any split of the batch."""

import torch
from torch import nn

from fastcm import kernels

FIRST_STREAM = 1 << 16  # stream of layer i is FIRST_STREAM + i: the noise stream's public numbering


class Dropout(nn.Module):
    """Zeroes each element with probability p and divides the others by 1 - p. In eval mode, or at p = 0, returns its input itself.

    Element e of image b is kept where u >= p, u = uniform_field(seed, positions[b]) of this layer's stream. Reads no global RNG.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = p
        self.stream = FIRST_STREAM
        self.seed: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None

    def forward(self, x):
        if self.p == 0 or not self.training:
            return x
        if self.seed is None:
            raise RuntimeError("dropout has no noise stream: call network.set_stream(seed, positions) before a training pass.")
        u = kernels.uniform_field(self.seed, self.positions, tuple(x.shape[1:]), stream=self.stream)
        return x * ((u >= self.p).to(x.dtype) / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def number_layers(network: nn.Module) -> None:
    """Gives the dropout layers of `network` their streams, in the order of network.modules()."""
    for index, layer in enumerate(module for module in network.modules() if isinstance(module, Dropout)):
        layer.stream = FIRST_STREAM + index


def set_stream(network: nn.Module, seed: torch.Tensor, positions: torch.Tensor) -> None:
    """Fixes the masks of the next passes: seed int64 [1], positions int64 [B] (index of each image in the run), on the network's device."""
    for module in network.modules():
        if isinstance(module, Dropout):
            module.seed, module.positions = seed, positions
