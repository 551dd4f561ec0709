"""Networks and denoisers as plain PyTorch has them: what fastcm is compared with uses none of its kernels or streams."""

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm.consistency.denoiser import Denoiser, expand, working_dtype
from fastcm.kernels.precondition import precondition_reference
from fastcm.networks.blocks import GroupNorm
from fastcm.networks.dropout import Dropout


class PlainGroupNorm(GroupNorm):
    """The same layer by torch's own group_norm on every device."""

    def forward(self, x, scale=None, shift=None):
        x = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        if scale is not None:
            x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(x) if self.silu else x


def plain_network(network: nn.Module) -> nn.Module:
    """A copy of the network whose norms are torch's own and whose dropout draws from torch's generator."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, GroupNorm):
            module.__class__ = PlainGroupNorm
        elif isinstance(module, Dropout):
            network.set_submodule(name, nn.Dropout(module.p).train(module.training))
    return network


class PlainDenoiser(Denoiser):
    """D(x, sigma, labels) of a plain network in torch operations; with `autocast`, a dtype, the network runs under torch.autocast."""

    def __init__(self, network: nn.Module, preconditioning, *, autocast: torch.dtype | None = None):
        super().__init__(network, preconditioning)
        self.autocast = autocast

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        casts = contextlib.nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast)
        with casts:
            F_x = self.network((expand(c_in, x) * x).to(working_dtype(self.network)), c_noise, labels)
        return precondition_reference(x, F_x, c_skip, c_out)
