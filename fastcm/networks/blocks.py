"""The layers that the networks are made of: normalisation, resampling, attention, the residual block, the noise embedding."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastcm import kernels
from fastcm.kernels import launch
from fastcm.networks.dropout import Dropout


def norm_groups(*widths: int) -> int:
    """Groups of the GroupNorms over layers of these widths: their largest common divisor up to min(32, narrowest // 4).

    From 128 channels on this is ADM's 32 for every published width; narrow networks keep at least four channels to a group.
    """
    limit = max(1, min(32, min(widths) // 4))
    return next(groups for groups in range(limit, 0, -1) if math.gcd(*widths) % groups == 0)


def forward_mode_active() -> bool:
    """True inside torch.func.jvp or a forward-mode dual level, where native group_norm and the fused attentions cannot be used."""
    return forward_ad._current_level >= 0


class GroupNorm(nn.Module):
    """GroupNorm, then norm * (1 + scale) + shift where those are given, then SiLU unless `silu=False`; one kernel on CUDA.

    x [B, C, H, W] in the dtype of the parameters, scale and shift [B, C] or [1, C]; returns the shape, dtype and memory format of x.
    """

    def __init__(self, channels: int, *, groups: int | None = None, eps: float = 1e-5, silu: bool = True):
        super().__init__()
        self.groups = norm_groups(channels) if groups is None else groups
        self.eps = eps
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, scale=None, shift=None):
        if x.is_cuda or forward_mode_active():
            if scale is not None:  # one row for the whole batch where the noise level is a constant
                scale, shift = scale.expand(x.shape[0], -1), shift.expand(x.shape[0], -1)
            return kernels.group_norm(x, self.groups, self.weight, self.bias, eps=self.eps, scale=scale, shift=shift, silu=self.silu)
        x = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        if scale is not None:
            x = torch.addcmul(shift[:, :, None, None], x, (scale + 1)[:, :, None, None])
        return F.silu(x) if self.silu else x

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}, silu={self.silu}"


def noise_angles(c_noise: torch.Tensor, channels: int, *, endpoint: bool = False) -> torch.Tensor:
    """c_noise times 10000^(-i / half), i in range(half), half = channels / 2; with `endpoint` the last factor is 1/10000 exactly.

    c_noise fp32 [B] -> fp32 [B, half]. Always fp32: 250 ln sigma reaches 1,500, and half precision would round it to whole radians.
    """
    half = channels // 2
    steps = half - 1 if endpoint else half
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=c_noise.device) * (-math.log(10000.0) / steps))
    return c_noise.to(torch.float32)[:, None] * frequencies


def sinusoidal_embedding(c_noise: torch.Tensor, channels: int) -> torch.Tensor:
    """[cos, sin] of the noise angles, fp32 [B, channels]: ADM's order. SongUNet has the sines first."""
    angles = noise_angles(c_noise, channels)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def one_hot(labels: torch.Tensor, classes: int, dtype: torch.dtype) -> torch.Tensor:
    """int64 [B] -> [B, classes] of `dtype`; a label outside 0..classes-1 (-1 by convention) is a row of zeros: no class."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)


class GuidanceEmbedding(nn.Linear):
    """What a guidance weight, fp32 [B] or None for `default`, adds to the noise features [B, channels] of c_noise [B]: zero at first, so
    that a teacher's weights are a start (LCM, Luo et al. 2023, 2310.04378; the scale of 1000 is that of its published models)."""

    def __init__(self, channels: int, default: float):
        super().__init__(channels, channels, bias=False)
        self.default = default
        nn.init.zeros_(self.weight)

    def forward(self, c_noise, guidance=None):
        guidance = torch.full_like(c_noise, self.default) if guidance is None else guidance
        return super().forward(sinusoidal_embedding(1000 * guidance, self.in_features).to(self.weight.dtype))


class ScaleShift(nn.Linear):
    """The embedding as scale and shift of a norm. h [B, C, H, W], emb [B, in_features] -> norm(h), scaled and shifted, of h's shape."""

    def forward(self, h, emb, norm: "GroupNorm"):
        return norm(h, *super().forward(emb).chunk(2, dim=1))


class Addend(nn.Linear):
    """The embedding added to the input of a norm. h [B, C, H, W], emb [B, in_features] -> norm(h + addend), of h's shape."""

    def forward(self, h, emb, norm: "GroupNorm"):
        return norm(h + super().forward(emb)[:, :, None, None])


class ClassEmbedding(nn.Module):
    """one_hot(labels) @ weight. An index lookup has a backward that is not reproducible when compiled on CPU; a product has."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, channels))

    def forward(self, labels):
        return one_hot(labels, self.weight.shape[0], self.weight.dtype) @ self.weight


class SecondTime(nn.Linear):
    """What a second time adds to the first layer over the embedding of c_noise: a linear map of its own embedding, zero at first.

    kind: of the end r fp32 [B] in [0, 1) of an average velocity, or 0 where `end` is None, "gap" embeds c_noise - r, "end" r itself.
    embed: [B] -> [B, in_features]. Beside the first layer it is that layer over both embeddings joined (Geng et al. 2025, appendix).
    """

    def __init__(self, kind: str, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.kind = kind
        zero_init(self)

    def forward(self, c_noise, end, embed):
        end = torch.zeros_like(c_noise) if end is None else end
        return super().forward(embed(c_noise - end if self.kind == "gap" else end).to(self.weight.dtype))


def downsample(x):
    """Mean over 2x2 pixels."""
    return F.avg_pool2d(x, 2)


def upsample(x):
    """Each pixel twice in both directions."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Resampled(nn.Module):
    """`downsample`, `upsample` or None, which leaves x alone, as a layer."""

    def __init__(self, resample):
        super().__init__()
        self.resample = resample

    def forward(self, x):
        return x if self.resample is None else self.resample(x)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v over [B, heads, pixels, d]; written out under forward-mode AD, which fused attention lacks."""
    if not forward_mode_active():
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax(q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5), dim=-1) @ v


def self_attention(x, qkv: nn.Module, proj: nn.Module, heads: int):
    """proj(attend(qkv(x))) over all pixels of x [B, C, H, W]. The 3C channels of qkv are (3, heads, d)."""
    if launch.is_exporting():
        return _self_attention_of_planes(x, qkv, proj, heads)
    batch, channels, height, width = x.shape
    # Pixels before channels, and 1x1 convolutions as products: what the fused attentions want, and free for a channels-last x.
    pixels = x.flatten(2).transpose(1, 2)
    parts = F.linear(pixels, qkv.weight.flatten(1), qkv.bias).view(batch, height * width, 3, heads, channels // heads)
    h = attend(*parts.transpose(1, 3).unbind(2)).transpose(1, 2).reshape(batch, height * width, channels)
    h = F.linear(h, proj.weight.flatten(1), proj.bias)
    return h.transpose(1, 2).view(batch, channels, height, width)


def _self_attention_of_planes(x, qkv, proj, heads):
    """The same for graphs: channels stay before pixels, so that runtimes find nothing to transpose outside of their products.

    The bias of k moves all weights of a query alike, which softmax does not see; that of v passes through, the weights' sum being one.
    """
    batch, channels, height, width = x.shape
    planes = x.flatten(2)
    weight, bias = qkv.weight.flatten(1), qkv.bias[:, None]
    weights = [weight[i * channels : (i + 1) * channels] for i in range(3)]
    scale = (channels // heads) ** -0.5  # on q, so that half precision does not overflow
    products = (scale * weights[0]) @ planes + scale * bias[:channels], weights[1] @ planes, weights[2] @ planes
    q, k, v = (h.view(batch, heads, channels // heads, height * width) for h in products)
    h = (v @ torch.softmax(q.transpose(-2, -1) @ k, dim=-1).transpose(-2, -1)).view(batch, channels, height * width)
    weight = proj.weight.flatten(1)
    return (weight @ h + (proj.bias[:, None] + weight @ bias[-channels:])).view(batch, channels, height, width)


class Attention(nn.Module):
    """gain (x + self_attention(norm(x))), with ADM's keys. norm: False for none at all."""

    def __init__(self, channels: int, *, heads: int, groups: int | None = None, eps: float = 1e-5, gain: float = 1.0, norm: bool = True):
        super().__init__()
        self.heads, self.gain = heads, gain
        self.norm = GroupNorm(channels, groups=groups, eps=eps, silu=False) if norm else nn.Identity()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        return scaled(x + self_attention(self.norm(x), self.qkv, self.proj_out, self.heads), self.gain)


class ResBlock(nn.Module):
    """ADM's residual block: norm, SiLU, (resample), conv; embedding as scale and shift or as an addend; norm, SiLU, dropout, conv; skip.

    x [B, in_channels, H, W], emb [B, emb_channels] with its SiLU already applied (once for all blocks) -> [B, out_channels, H', W'].
    `resample` is None, downsample, upsample or another function, applied on both branches. out_groups: of the second norm, as the first
    where not given. gain: of the sum. project: whether the skip is a 1x1 convolution; None: where the number of channels changes.
    """

    # The layer that reads the embedding, between the convolution that makes its h and the norm that it changes.
    EMBEDDED = ("in_layers.2", "emb_layers.1", "out_layers.0")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        resample=None,
        groups: int | None = None,
        out_groups: int | None = None,
        eps: float = 1e-5,
        gain: float = 1.0,
        project: bool | None = None,
    ):
        super().__init__()
        self.resample, self.gain = resample, gain
        # The places of parameterless layers are kept so that state-dict keys are ADM's: in_layers.{0,2}, emb_layers.1, out_layers.{0,3}.
        self.in_layers = nn.Sequential(
            GroupNorm(in_channels, groups=groups, eps=eps), Resampled(resample), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        layer = ScaleShift(emb_channels, 2 * out_channels) if scale_shift_norm else Addend(emb_channels, out_channels)
        self.emb_layers = nn.Sequential(nn.Identity(), layer)
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels, groups=groups if out_groups is None else out_groups, eps=eps),
            nn.Identity(),
            Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        project = in_channels != out_channels if project is None else project
        self.skip_connection = nn.Conv2d(in_channels, out_channels, 1) if project else nn.Identity()

    def forward(self, x, emb):
        norm, _, dropout, conv = self.out_layers
        h = self.emb_layers[1](self.in_layers(x), emb, norm)
        return scaled(self.skip_connection(x if self.resample is None else self.resample(x)) + conv(dropout(h)), self.gain)


def scaled(x, gain: float):
    """x times a number, x itself where that is one."""
    return x if gain == 1 else gain * x


class Downsample(nn.Module):
    """Half the resolution without a residual block: a strided convolution (key `op`), or a plain mean.

    padding: 1 on every side, or 0, which means one row below and one column on the right (DDPM's code).
    """

    def __init__(self, channels: int, *, conv: bool, padding: int = 1):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=padding) if conv else None

    def forward(self, x):
        if self.op is None:
            return downsample(x)
        return self.op(x if self.op.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution without a residual block: repeated pixels, then a convolution (key `conv`) where asked for."""

    def __init__(self, channels: int, *, conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x):
        x = upsample(x)
        return x if self.conv is None else self.conv(x)


def runner(recompute: bool):
    """How to call layer(x, emb): as it is, or keeping x and emb only and computing it again in the backward pass."""
    if recompute and torch.is_grad_enabled() and not forward_mode_active():
        # Dropout masks are a function of the stream, so there is no random state to save.
        return lambda layer, x, emb: checkpoint(layer, x, emb, use_reentrant=False, preserve_rng_state=False)
    return lambda layer, x, emb: layer(x, emb)


def zero_init(module: nn.Module) -> nn.Module:
    """The module with every parameter zero, so that a fresh residual branch adds nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
