"""The U-Net of EDM2, configuration G (Karras et al. 2024, 2312.02696, Figure 22): configuration and network."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from fastcm.errors import InputError
from fastcm.networks import dropout, patches
from fastcm.networks.blocks import downsample, one_hot, runner, upsample
from fastcm.networks.checks import (
    is_number,
    require,
    require_classes,
    require_counts,
    require_dropout,
    require_flags,
    require_levels,
    require_tuples,
)
from fastcm.networks.magnitude import Modulation, MPConv, MPFourier, MPSiLU, cosine_attention, mp_cat, mp_silu, mp_sum, normalized

RESIDUAL_BALANCE, ATTENTION_BALANCE = 0.3, 0.3  # the branch's part in the sum (appendix B.7)
LABEL_BALANCE, SKIP_BALANCE = 0.5, 0.5
CLIP = 256.0  # of activations, for fp16 (appendix D.2)


@dataclass(frozen=True, kw_only=True)
class EDM2UNetConfig(patches.Levels):
    """Options of `EDM2UNet`; the defaults are size S for ImageNet-64, unconditional. Sizes in pixels, widths in channels.

    channels: XS 128, S 192, M 256, L 320, XL 384, XXL 448.
    """

    resolution: int = 64
    in_channels: int = 3
    out_channels: int = 3
    patch: int = 1  # patch x patch pixels are one place of the first level; resolutions below count its places
    channels: int = 192  # width at the first level, times channel_mult at each level
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    blocks: int = 3  # residual blocks per level on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (16, 8)  # the middle block always attends
    head_channels: int = 64
    dropout: float = 0.0
    dropout_resolution: int | None = None  # dropout in blocks of at most this many places a side; None: in all
    num_classes: int | None = None  # None: unconditional
    fourier_scale: float = 1.0  # standard deviation of the random frequencies
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self):
        require_tuples(self, ("channel_mult", "attention_resolutions"))
        require_flags(self, ("checkpoint",))
        require_counts(self, ("resolution", "in_channels", "out_channels", "channels", "blocks", "head_channels"))
        require_counts(self, ("dropout_resolution",), optional=True)
        require_classes(self)
        require_dropout(self)
        require(is_number(self.fourier_scale) and self.fourier_scale > 0, "fourier_scale", self.fourier_scale, "Give a positive number.")
        require_levels(self)
        for level, width in enumerate(self.widths):
            if level == len(self.widths) - 1 or self.pixels(level) in self.attention_resolutions:
                remedy = f"It must divide an attention layer's {width} channels."
                require(width % self.head_channels == 0, "head_channels", self.head_channels, remedy)

    def dropout_at(self, pixels: int) -> float:
        """Dropout of a block whose output has `pixels` a side."""
        return self.dropout if self.dropout_resolution is None or pixels <= self.dropout_resolution else 0.0


class EDM2Block(nn.Module):
    """Resampling; on the way down skip and pixel norm; SiLU, conv, times factors of emb, SiLU, dropout, conv; sum; attention; clip.

    x [B, in_channels, H, W], emb [B, emb_channels] with its SiLU applied -> [B, out_channels, H', W'].
    """

    EMBEDDED = ("conv_res0", "emb_linear", "act")  # as ResBlock's

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        encodes: bool,
        heads: int = 0,
        resample=None,
        dropout_p: float = 0.0,
    ):
        super().__init__()
        self.encodes, self.heads, self.resample, self.out_channels = encodes, heads, resample, out_channels
        self.conv_res0 = MPConv(out_channels if encodes else in_channels, out_channels, 3)
        self.emb_linear = Modulation(emb_channels, out_channels)
        self.act = MPSiLU()
        self.dropout = dropout.Dropout(dropout_p)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if heads else None

    def forward(self, x, emb):
        x = x if self.resample is None else self.resample(x)
        if self.encodes:
            x = normalized(x if self.conv_skip is None else self.conv_skip(x), 1)
        h = self.emb_linear(self.conv_res0(self.act(x)), emb, self.act)
        h = self.conv_res1(self.dropout(h))
        if not self.encodes and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, h, RESIDUAL_BALANCE)
        if self.heads:
            x = mp_sum(x, cosine_attention(x, self.attn_qkv, self.attn_proj, self.heads), ATTENTION_BALANCE)
        return x.clamp(-CLIP, CLIP)


class EDM2UNet(nn.Module):
    """F(x, c_noise, labels): x float [B, in_channels, R, R], c_noise fp32 [B], labels int64 [B] or None -> [B, out_channels, R, R].

    Works and returns in the dtype of its parameters. State-dict keys are those of EDM2's networks, with `emb_linear.gain` for emb_gain and
    `out_conv.gain` for out_gain; the 3C channels of attn_qkv are (3, C) here, where EDM2's are (C, 3).
    A label of -1, or labels=None, is no class.
    """

    kind = "edm2"

    def __init__(self, config: EDM2UNetConfig):
        super().__init__()
        self.config = config
        self.emb_channels = max(config.widths)
        self.emb_fourier = MPFourier(config.widths[0], config.fourier_scale)
        self.emb_noise = MPConv(config.widths[0], self.emb_channels)
        if config.num_classes is not None:
            self.emb_label = MPConv(config.num_classes, self.emb_channels)
        skips = self._build_encoder()
        width = self._build_decoder(skips)
        self.out_conv = MPConv(width, config.out_channels * config.patch**2, 3, learned_gain=True)
        dropout.number_layers(self)

    def _block(self, in_channels: int, level: int, *, encodes: bool, attends: bool | None = None, resample=None) -> EDM2Block:
        """attends: by the level's resolution where None. A block that resamples keeps its number of channels."""
        config, pixels = self.config, self.config.pixels(level)
        out_channels = in_channels if resample is not None else config.widths[level]
        attends = pixels in config.attention_resolutions if attends is None else attends
        heads = out_channels // config.head_channels if attends else 0
        options = {"encodes": encodes, "heads": heads, "resample": resample, "dropout_p": config.dropout_at(pixels)}
        return EDM2Block(in_channels, out_channels, self.emb_channels, **options)

    def _build_encoder(self) -> list[int]:
        """Fills `enc` and returns the widths of its outputs, which the decoder takes back."""
        config, self.enc, skips = self.config, nn.ModuleDict(), []
        for level, width in enumerate(config.widths):
            size = f"{config.pixels(level)}x{config.pixels(level)}"
            if level == 0:
                # One channel more, of ones: there is no bias (appendix B.3).
                self.enc[f"{size}_conv"] = MPConv(config.in_channels * config.patch**2 + 1, width, 3)
                skips.append(width)
            else:
                self.enc[f"{size}_down"] = self._block(skips[-1], level, encodes=True, attends=False, resample=downsample)
                skips.append(skips[-1])
            for index in range(config.blocks):
                self.enc[f"{size}_block{index}"] = self._block(skips[-1], level, encodes=True)
                skips.append(width)
        return skips

    def _build_decoder(self, skips: list[int]) -> int:
        config, self.dec, width = self.config, nn.ModuleDict(), self.config.widths[-1]
        for level in reversed(range(len(config.widths))):
            size = f"{config.pixels(level)}x{config.pixels(level)}"
            if level == len(config.widths) - 1:
                self.dec[f"{size}_in0"] = self._block(width, level, encodes=False, attends=True)
                self.dec[f"{size}_in1"] = self._block(width, level, encodes=False, attends=False)
            else:
                self.dec[f"{size}_up"] = self._block(width, level, encodes=False, attends=False, resample=upsample)
            for index in range(config.blocks + 1):
                self.dec[f"{size}_block{index}"] = self._block(width + skips.pop(), level, encodes=False)
                width = config.widths[level]
        return width

    @property
    def dtype(self) -> torch.dtype:
        return self.emb_noise.weight.dtype

    def set_stream(self, seed: torch.Tensor, positions: torch.Tensor) -> None:
        """Fixes the dropout masks of the next passes: seed int64 [1], positions int64 [B]."""
        dropout.set_stream(self, seed, positions)

    def embed(self, c_noise, labels=None):
        """The embedding that every block's factors are made of, [B, widest level]."""
        config = self.config
        emb = self.emb_noise(self.emb_fourier(c_noise).to(self.dtype))
        if config.num_classes is not None:
            labels = c_noise.new_full(c_noise.shape, -1, dtype=torch.int64) if labels is None else labels
            one = one_hot(labels, config.num_classes, self.dtype) * math.sqrt(config.num_classes)
            emb = mp_sum(emb, self.emb_label(one), LABEL_BALANCE)
        elif labels is not None:
            raise InputError("labels given to an unconditional network, network.num_classes: None. Pass labels=None.")
        return mp_silu(emb)

    def forward(self, x, c_noise, labels=None):
        emb = self.embed(c_noise, labels)
        run = runner(self.config.checkpoint)
        x = patches.to_patches(x.to(self.dtype), self.config)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for layer in self.enc.values():
            x = run(layer, x, emb) if isinstance(layer, EDM2Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = run(layer, mp_cat(x, skips.pop(), SKIP_BALANCE) if "_block" in name else x, emb)
        return patches.to_pixels(self.out_conv(x), self.config)
