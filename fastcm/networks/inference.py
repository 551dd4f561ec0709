"""A network for drawing alone: the same function of the same weights in fewer operations. It cannot be trained."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm.networks.blocks import Attention, GroupNorm, ResBlock, Upsample, upsample
from fastcm.networks.magnitude import MPConv
from fastcm.networks.song_unet import SongBlock


def share(network: nn.Module) -> nn.Module:
    """A copy of the module tree that holds the same parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def with_guidance(network: nn.Module, weight: float) -> nn.Module:
    """A copy that shares the weights of a network with `default_guidance`, and has `weight` in its place."""
    network = share(network)
    network.config = replace(network.config, default_guidance=weight)
    network.guidance_embed.default = weight
    return network


def constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


class UpsampledConv(nn.Module):
    """conv(upsample(x)) of a 3x3 convolution, [B, C, H, W] -> [B, out, 2 H, 2 W], with 4/9 of its products.

    Of the three rows that an output row sees after each pixel was doubled, two are one: each parity of row and column is a 2x2
    convolution of x itself, and the four are one convolution whose channels are then woven into the doubled image.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        rows = _pairs(weight, 2, parity=1)  # [out, row's parity, C, 2, 3]
        self.weight = constant(_pairs(rows, 4, parity=2).flatten(0, 2))  # [out (row's parity, column's parity), C, 2, 2]
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[:, None].expand(-1, 4).flatten()
        return F.pixel_shuffle(F.conv2d(x, self.weight, bias, padding=1), 2)[:, :, 1:-1, 1:-1]


def _pairs(weight: Tensor, dim: int, *, parity: int) -> Tensor:
    """The three taps along `dim` as two for each parity of the output, a new dimension at `parity`.

    Parity 1 comes first: its window starts a pixel later, so that the woven image has one pixel too many on each side.
    """
    w0, w1, w2 = weight.unbind(dim)
    return torch.stack([torch.stack([w0 + w1, w2], dim), torch.stack([w0, w1 + w2], dim)], parity)


def settled(network: nn.Module) -> nn.Module:
    """A copy with the effective weights of magnitude-preserving layers, which are then not normalised at every call; without such layers
    the network itself."""
    if not any(isinstance(module, MPConv) for module in network.modules()):
        return network
    network = share(network)
    for module in network.modules():
        if isinstance(module, MPConv):
            module.make_plain()
    return network


@torch.no_grad()
def for_inference(network: nn.Module) -> nn.Module:
    """A copy of a network of this package that shares its weights, but for those that it replaces; other networks come back as they are.

    An attention's product takes in the affine map of the norm before it; a convolution after a doubling works before it; weights that are
    normalised in the forward pass are so already.
    """
    network = share(settled(network))
    for module in list(network.modules()):
        if isinstance(module, Attention) and isinstance(module.norm, GroupNorm):
            absorb(module.norm, module.qkv)
        elif isinstance(module, SongBlock) and module.attention:
            absorb(module.norm2, module.qkv)
        if isinstance(module, ResBlock) and module.resample is upsample:
            conv = module.in_layers[2]
            module.in_layers[1], module.in_layers[2] = nn.Identity(), UpsampledConv(conv.weight, conv.bias)
        elif isinstance(module, SongBlock) and module.conv0.direction == "up" and module.conv0.resample_filter is None:
            module.conv0 = UpsampledConv(module.conv0.weight, module.conv0.bias)
        for name, child in list(module.named_children()):
            if isinstance(child, Upsample) and child.conv is not None:
                setattr(module, name, UpsampledConv(child.conv.weight, child.conv.bias))
    return network


def absorb(norm: GroupNorm, qkv: nn.Module) -> None:
    """Moves the norm's weight and bias into the 1x1 convolution that reads it: W (w y + b) = (W w) y + W b."""
    weight = qkv.weight
    qkv.bias = constant(qkv.bias + weight.flatten(1) @ norm.bias)
    qkv.weight = constant(weight * norm.weight[:, None, None])
    norm.weight = norm.bias = None
