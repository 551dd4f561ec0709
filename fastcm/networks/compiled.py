"""How training compiles: for each batch size of its own where that is the faster code."""

from collections.abc import Callable

import torch
from torch import nn


def compiled(function: Callable, network: nn.Module) -> Callable:
    """`function`, or the network itself, under torch.compile. On CUDA every batch size has its own code.

    By itself torch compiles the second size that it meets for any size, and all later ones run that slower code.
    """
    on_cuda = any(parameter.is_cuda for parameter in network.parameters())
    return torch.compile(function, dynamic=False if on_cuda else None)
