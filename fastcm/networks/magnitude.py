"""Magnitude-preserving layers: inputs of unit variance give outputs of unit variance, whatever the weights (Karras et al. 2024, EDM2).

Equation and section numbers are those of arXiv 2312.02696. The magnitude of a vector is the root of the mean of its squares.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm.kernels import launch
from fastcm.kernels.optimizer_slices import UNIT_EPS
from fastcm.networks.blocks import attend

SILU_MAGNITUDE = 0.596  # of silu(x) for x from N(0, 1)


def wide_type(tensor: Tensor) -> torch.dtype:
    """What magnitudes of it are taken in: fp32, float64 of float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def normalized(x: Tensor, *dims: int, eps: float = UNIT_EPS) -> Tensor:
    """x / (eps + magnitude over `dims`), in the dtype of x."""
    if launch.is_exporting():  # in operators that every runtime has
        wide = x.to(wide_type(x))
        return x / (eps + (wide * wide).mean(dims, keepdim=True).sqrt()).to(x.dtype)
    length = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide_type(x))  # whose derivative at zero is zero
    return x / (eps + length / math.sqrt(math.prod([x.shape[dim] for dim in dims]))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) over its magnitude (equation 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """(1 - t) a + t b over the magnitude of that sum, for independent a and b of unit variance (equation 88)."""
    length = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / length), b, alpha=t / length)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Channels of a, then of b, weighted so that a layer sees 1 - t of a and t of b, however many channels each has (equation 103)."""
    both = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    return torch.cat([a * ((1 - t) * both / math.sqrt(a.shape[1])), b * (t * both / math.sqrt(b.shape[1]))], dim=1)


class MPSiLU(nn.Module):
    def forward(self, x):
        return mp_silu(x)


class MPFourier(nn.Module):
    """sqrt(2) cos(2 pi (f x + phase)) of x [B] for random frequencies N(0, scale^2) and phases, fp32 [B, channels] (equation 75)."""

    def __init__(self, channels: int, scale: float = 1.0):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * scale * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def _apply(self, fn, recurse=True):
        # .to(torch.bfloat16) of the network must move the frequencies, not round them.
        exact = self.freqs, self.phases
        super()._apply(fn, recurse)
        if self.freqs.dtype != torch.float32:
            self.freqs, self.phases = (tensor.to(self.freqs.device) for tensor in exact)
        return self

    def forward(self, x):
        return math.sqrt(2) * torch.cos(x.to(torch.float32)[:, None] * self.freqs + self.phases)


class MPConv(nn.Module):
    """A convolution, or a linear layer where `size` is None, without bias, whose every output has a weight vector of unit length.

    The weight is normalised in the forward pass (equation 47), with what the gradient owes to it, and training sets it back to unit
    magnitude after each step (appendix B.5, `unit_rows`). learned_gain: a factor that begins at zero; without it the factor is one.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int | None = None, *, learned_gain: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *([] if size is None else [size, size])))
        self.gain = nn.Parameter(torch.zeros([])) if learned_gain else None
        self.is_plain = False

    def effective_weight(self) -> Tensor:
        """What the input is multiplied by, in fp32 at least: rows of length one, times the gain."""
        weight = self.weight.to(wide_type(self.weight))
        weight = normalized(weight, *range(1, weight.ndim)) / math.sqrt(weight[0].numel())
        return weight if self.gain is None else weight * self.gain.to(weight.dtype)

    @torch.no_grad()
    def make_plain(self) -> None:
        """Keeps the effective weight in the place of the weight, for drawing: the layer can be trained no more."""
        if not self.is_plain:
            weight = self.effective_weight().to(self.weight.dtype)
            self.weight, self.gain, self.is_plain = nn.Parameter(weight, requires_grad=False), None, True

    def working_weight(self, dtype: torch.dtype) -> Tensor:
        return (self.weight if self.is_plain else self.effective_weight()).to(dtype)

    def forward(self, x):
        weight = self.working_weight(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Modulation(MPConv):
    """The embedding as factors of channels. h [B, C, H, W], emb [B, in] -> act(h (1 + gain linear(emb))), of h's shape (appendix B.7)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, learned_gain=True)

    def factors(self, emb):
        return 1 + super().forward(emb)

    def forward(self, h, emb, act: nn.Module):
        return act(h * self.factors(emb)[:, :, None, None])


def cosine_attention(x: Tensor, qkv: MPConv, proj: MPConv, heads: int) -> Tensor:
    """proj of softmax(q k / sqrt(d)) v over the pixels of x [B, C, H, W], with q, k and v of each head at unit magnitude (equation 30).

    The 3C channels of qkv are (3, heads, d).
    """
    batch, channels, height, width = x.shape
    each = channels // heads
    if launch.is_exporting():  # channels stay before pixels, so that runtimes find nothing to transpose outside of their products
        parts = normalized(qkv(x).view(batch, 3 * heads, each, height * width), 2)
        q, k, v = (parts[:, start : start + heads] for start in (0, heads, 2 * heads))
        h = v @ torch.softmax((each**-0.5 * q).transpose(-2, -1) @ k, dim=-1).transpose(-2, -1)
        return proj(h.reshape(batch, channels, height, width))
    # Pixels before channels, as blocks.self_attention has them.
    pixels = x.flatten(2).transpose(1, 2)
    parts = F.linear(pixels, qkv.working_weight(x.dtype).flatten(1)).view(batch, height * width, 3, heads, each)
    h = attend(*normalized(parts, 4).transpose(1, 3).unbind(2)).transpose(1, 2).reshape(batch, height * width, channels)
    h = F.linear(h, proj.working_weight(x.dtype).flatten(1))
    return h.transpose(1, 2).view(batch, channels, height, width)


def unit_rows(network: nn.Module) -> list[str]:
    """Names of the weights whose rows training sets back to unit magnitude after each step (equation 66)."""
    return [f"{name}.weight" for name, module in network.named_modules() if isinstance(module, MPConv)]
