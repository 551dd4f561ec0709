"""The DDPM++ and NCSN++ U-Nets (Song et al. 2021) as EDM has them (Karras et al. 2022, Table 7): configuration and network."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastcm.errors import InputError
from fastcm.networks import dropout, patches
from fastcm.networks.blocks import Addend, GroupNorm, GuidanceEmbedding, SecondTime, noise_angles, one_hot, runner, self_attention
from fastcm.networks.checks import (
    is_number,
    require,
    require_choice,
    require_classes,
    require_counts,
    require_dropout,
    require_flags,
    require_guidance,
    require_levels,
    require_second_time,
    require_tuples,
    takes_end,
)
from fastcm.networks.resample import Resample, ResampleConv

NORM_EPS = 1e-6
RESIDUAL_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two branches


@dataclass(frozen=True, kw_only=True)
class SongUNetConfig(patches.Levels):
    """Options of `SongUNet`; the defaults are EDM's DDPM++ for CIFAR-10, unconditional, without augmentation labels.

    NCSN++ is embedding="fourier", channel_mult_noise=2, encoder="residual", resample_filter=(1, 3, 3, 1).
    """

    resolution: int = 32
    in_channels: int = 3
    out_channels: int = 3
    patch: int = 1  # patch x patch pixels are one place of the first level; resolutions below count its places
    channels: int = 128  # width of the first convolution, times channel_mult at each level
    channel_mult: tuple[int, ...] = (2, 2, 2)
    channel_mult_emb: int = 4  # embedding width over `channels`
    channel_mult_noise: int = 1  # noise embedding width over `channels`
    blocks: int = 4  # residual blocks per level on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (16,)  # the middle block always attends
    dropout: float = 0.0
    num_classes: int | None = None  # None: unconditional
    second_time: str | None = None  # "gap" or "end" of an average velocity (blocks.SecondTime); None: there is none
    default_guidance: float | None = None  # a student that is told its teacher's guidance weight: this one unless another is given
    augment_channels: int | None = None  # width of augmentation labels; None: not accepted
    embedding: str = "positional"  # or "fourier"
    fourier_scale: float = 16.0  # standard deviation of the random frequencies
    encoder: str = "standard"  # or "skip", "residual": the input reaches every level
    decoder: str = "standard"  # or "skip": every level adds to the output
    resample_filter: tuple[float, ...] = (1, 1)  # taps; (1, 1) is the mean of 2x2 pixels
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self):
        require_tuples(self, ("channel_mult", "attention_resolutions", "resample_filter"))
        require_flags(self, ("checkpoint",))
        require_counts(self, ("resolution", "in_channels", "out_channels", "channels", "channel_mult_emb", "channel_mult_noise", "blocks"))
        require_counts(self, ("augment_channels",), optional=True)
        require_classes(self)
        require_second_time(self)
        require_guidance(self)
        require_dropout(self)
        require_choice(self, "embedding", ("positional", "fourier"))
        require_choice(self, "encoder", ("standard", "skip", "residual"))
        require_choice(self, "decoder", ("standard", "skip"))
        require(is_number(self.fourier_scale) and self.fourier_scale > 0, "fourier_scale", self.fourier_scale, "Give a positive number.")
        require(self.channels % 4 == 0, "channels", self.channels, "Give a multiple of 4.")
        taps = self.resample_filter
        even = len(taps) >= 2 and len(taps) % 2 == 0 and sum(taps) != 0
        require(even, "resample_filter", taps, "Give an even number of taps, e.g. 1,1 or 1,3,3,1.")
        require_levels(self)


def linear(in_features: int, out_features: int, *, bias: bool = True, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A linear layer with Glorot-uniform weights and zero bias."""
    layer = kind(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class SongBlock(nn.Module):
    """norm, SiLU, conv0; plus affine(emb), norm, SiLU, dropout, conv1; plus skip(x), over sqrt 2; then one-head attention where asked for.

    x [B, in_channels, H, W], emb [B, emb_channels] with its SiLU applied -> [B, out_channels, H', W'].
    """

    EMBEDDED = ("conv0", "affine", "norm1")  # as ResBlock's

    def __init__(self, in_channels: int, out_channels: int, config: SongUNetConfig, *, direction=None, attention=False):
        super().__init__()
        taps = config.resample_filter
        self.norm0 = GroupNorm(in_channels, eps=NORM_EPS)
        self.conv0 = ResampleConv(in_channels, out_channels, 3, direction=direction, taps=taps)
        self.affine = linear(config.channels * config.channel_mult_emb, out_channels, kind=Addend)
        self.norm1 = GroupNorm(out_channels, eps=NORM_EPS)
        self.dropout = dropout.Dropout(config.dropout)
        self.conv1 = ResampleConv(out_channels, out_channels, 3, gain=1e-5)
        same = in_channels == out_channels and direction is None
        self.skip = None if same else ResampleConv(in_channels, out_channels, 1, direction=direction, taps=taps)
        self.attention = attention
        if attention:
            self.norm2 = GroupNorm(out_channels, eps=NORM_EPS, silu=False)
            self.qkv = ResampleConv(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = ResampleConv(out_channels, out_channels, 1, gain=1e-5)

    def forward(self, x, emb):
        h = self.affine(self.conv0(self.norm0(x)), emb, self.norm1)
        h = self.conv1(self.dropout(h))
        x = (h + (x if self.skip is None else self.skip(x))) * RESIDUAL_SCALE
        if self.attention:
            x = (x + self_attention(self.norm2(x), self.qkv, self.proj, 1)) * RESIDUAL_SCALE
        return x


class NoiseEmbedding(nn.Module):
    """Sines, then cosines, of c_noise [B] times fixed frequencies, fp32 [B, channels]; `freqs` are random with embedding="fourier"."""

    def __init__(self, channels: int, *, fourier_scale: float | None):
        super().__init__()
        self.channels = channels
        self.register_buffer("freqs", None if fourier_scale is None else torch.randn(channels // 2) * fourier_scale)

    def _apply(self, fn, recurse=True):
        # Frequencies reach 300 radians per unit: .to(torch.bfloat16) of the network must move them, not round them.
        exact = self.freqs
        super()._apply(fn, recurse)
        if exact is not None and self.freqs.dtype != exact.dtype:
            self.freqs = exact.to(self.freqs.device)
        return self

    def forward(self, c_noise):
        if self.freqs is None:
            angles = noise_angles(c_noise, self.channels, endpoint=True)
        else:
            angles = c_noise.to(torch.float32)[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class SongUNet(nn.Module):
    """F(x, c_noise, labels, augment_labels) for x float [B, in_channels, R, R], c_noise fp32 [B], labels int64 [B] or None.

    augment_labels: float [B, augment_channels] or None (nothing augmented). end: with `second_time`, the end r fp32 [B] of an average
    velocity, 0 where left out. guidance: fp32 [B], with default_guidance.
    Returns [B, out_channels, R, R]. Works and returns in the dtype of its parameters.
    State-dict keys are those of EDM's networks; the 3C channels of qkv are (3, C) here, where EDM's are (C, 3).
    A label of -1, or labels=None, is no class.
    """

    kind = "song"

    def __init__(self, config: SongUNetConfig):
        super().__init__()
        self.config = config
        noise_channels, emb_channels = config.channels * config.channel_mult_noise, config.channels * config.channel_mult_emb
        self.map_noise = NoiseEmbedding(noise_channels, fourier_scale=config.fourier_scale if config.embedding == "fourier" else None)
        if config.num_classes is not None:
            self.map_label = linear(config.num_classes, noise_channels)
        if config.augment_channels is not None:
            self.map_augment = linear(config.augment_channels, noise_channels, bias=False)
        if config.default_guidance is not None:
            self.guidance_embed = GuidanceEmbedding(noise_channels, config.default_guidance)
        self.map_layer0 = linear(noise_channels, emb_channels)
        self.map_layer1 = linear(emb_channels, emb_channels)
        if config.second_time is not None:
            self.second_embed = SecondTime(config.second_time, noise_channels, emb_channels)
        skips = self._build_encoder()
        self._build_decoder(skips)
        dropout.number_layers(self)

    def _build_encoder(self) -> list[int]:
        """Fills `enc` and returns the widths of the outputs that the decoder takes back."""
        config = self.config
        self.enc = nn.ModuleDict()
        width, aux_width, skips = config.channels, config.in_channels * config.patch**2, [config.channels]
        for level, level_width in enumerate(config.widths):
            pixels = config.pixels(level)
            size = f"{pixels}x{pixels}"
            if level == 0:
                self.enc[f"{size}_conv"] = ResampleConv(aux_width, width, 3)
            else:
                self.enc[f"{size}_down"] = SongBlock(width, width, config, direction="down")
                skips.append(width)
                if config.encoder == "skip":
                    self.enc[f"{size}_aux_down"] = Resample("down", config.resample_filter)
                    self.enc[f"{size}_aux_skip"] = ResampleConv(aux_width, width, 1)
                elif config.encoder == "residual":
                    options = {"direction": "down", "taps": config.resample_filter, "filter_last": True}
                    self.enc[f"{size}_aux_residual"] = ResampleConv(aux_width, width, 3, **options)
                    aux_width = width
            for index in range(config.blocks):
                self.enc[f"{size}_block{index}"] = SongBlock(width, level_width, config, attention=pixels in config.attention_resolutions)
                width = level_width
                skips.append(width)
        return skips

    def _build_decoder(self, skips: list[int]) -> None:
        config = self.config
        self.dec = nn.ModuleDict()
        width = config.widths[-1]
        for level in reversed(range(len(config.widths))):
            pixels = config.pixels(level)
            size = f"{pixels}x{pixels}"
            if level == len(config.widths) - 1:
                self.dec[f"{size}_in0"] = SongBlock(width, width, config, attention=True)
                self.dec[f"{size}_in1"] = SongBlock(width, width, config)
            else:
                self.dec[f"{size}_up"] = SongBlock(width, width, config, direction="up")
            for index in range(config.blocks + 1):
                attention = index == config.blocks and pixels in config.attention_resolutions
                self.dec[f"{size}_block{index}"] = SongBlock(width + skips.pop(), config.widths[level], config, attention=attention)
                width = config.widths[level]
            if config.decoder == "skip" or level == 0:
                if config.decoder == "skip" and level < len(config.widths) - 1:
                    self.dec[f"{size}_aux_up"] = Resample("up", config.resample_filter)
                self.dec[f"{size}_aux_norm"] = GroupNorm(width, eps=NORM_EPS)
                self.dec[f"{size}_aux_conv"] = ResampleConv(width, config.out_channels * config.patch**2, 3, gain=1e-5)

    @property
    def dtype(self) -> torch.dtype:
        return self.map_layer0.weight.dtype

    def set_stream(self, seed: torch.Tensor, positions: torch.Tensor) -> None:
        """Fixes the dropout masks of the next passes: seed int64 [1], positions int64 [B]."""
        dropout.set_stream(self, seed, positions)

    def embed(self, c_noise, labels=None, augment_labels=None, *, guidance=None, end=None):
        """The embedding that every residual block starts from, [B, channels * channel_mult_emb]."""
        config = self.config
        emb = self.map_noise(c_noise).to(self.dtype)
        if config.num_classes is not None:
            labels = c_noise.new_full(c_noise.shape, -1, dtype=torch.int64) if labels is None else labels
            emb = emb + self.map_label(one_hot(labels, config.num_classes, self.dtype) * math.sqrt(config.num_classes))
        elif labels is not None:
            raise InputError("labels given to an unconditional network, network.num_classes: None. Pass labels=None.")
        if augment_labels is not None:
            if config.augment_channels is None:
                raise InputError("augmentation labels given to a network with network.augment_channels: None. Leave them out.")
            emb = emb + self.map_augment(augment_labels.to(self.dtype))
        if config.default_guidance is not None:
            emb = emb + self.guidance_embed(c_noise, guidance)
        emb = self.map_layer0(emb)
        if takes_end(config, end):
            emb = emb + self.second_embed(c_noise, end, self.map_noise)
        return F.silu(self.map_layer1(F.silu(emb)))

    def forward(self, x, c_noise, labels=None, augment_labels=None, **conditions):
        # Two arguments for the common case: a folded network's embed takes no more.
        labels = (labels,) if augment_labels is None else (labels, augment_labels)
        emb = self.embed(c_noise, *labels, **conditions)
        run = runner(self.config.checkpoint)
        x = patches.to_patches(x.to(self.dtype), self.config)
        return patches.to_pixels(self._decode(*self._encode(x, emb, run), emb, run), self.config)

    def _encode(self, x, emb, run):
        aux, skips = x, []
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + layer(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) * RESIDUAL_SCALE
            else:
                x = run(layer, x, emb) if isinstance(layer, SongBlock) else layer(x)
                skips.append(x)
        return x, skips

    def _decode(self, x, skips, emb, run):
        out, last = None, None
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                out = layer(out)
            elif name.endswith("aux_norm"):
                last = layer(x)
            elif name.endswith("aux_conv"):
                out = layer(last) if out is None else out + layer(last)
            else:
                x = run(layer, torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return out
