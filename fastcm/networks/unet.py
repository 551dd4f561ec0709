"""The ADM U-Net (Dhariwal and Nichol 2021, as used by Consistency Models): configuration and network."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fastcm.errors import InputError
from fastcm.networks import dropout, patches
from fastcm.networks.blocks import (
    Attention,
    ClassEmbedding,
    Downsample,
    GroupNorm,
    GuidanceEmbedding,
    ResBlock,
    SecondTime,
    Upsample,
    downsample,
    norm_groups,
    runner,
    sinusoidal_embedding,
    upsample,
    zero_init,
)
from fastcm.networks.checks import (
    require,
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


@dataclass(frozen=True, kw_only=True)
class UNetConfig(patches.Levels):
    """Options of `UNet`; the defaults are the published ImageNet-64 model's, unconditional. Sizes in pixels, widths in channels."""

    resolution: int = 64
    in_channels: int = 3
    out_channels: int = 3
    patch: int = 1  # patch x patch pixels are one place of the first level; resolutions below count its places
    channels: int = 192  # width at the first level, times channel_mult at each level
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    blocks: int = 3  # residual blocks per level on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (32, 16, 8)  # the middle block always attends
    head_channels: int = 64
    num_heads: int | None = None  # None: channels / head_channels
    dropout: float = 0.0
    dropout_resolution: int | None = None  # dropout in blocks of at most this many places a side; None: in all
    num_classes: int | None = None  # None: unconditional
    second_time: str | None = None  # "gap" or "end" of an average velocity (blocks.SecondTime); None: there is none
    default_guidance: float | None = None  # a student that is told its teacher's guidance weight: this one unless another is given
    scale_shift_norm: bool = True  # False: the embedding is added before the second norm
    resblock_updown: bool = True  # False: plain resampling layers between the levels
    conv_resample: bool = True  # those layers with a convolution; no effect with resblock_updown
    norm_groups: int | None = None  # the same in every layer; None: blocks.norm_groups of the widths
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self):
        require_tuples(self, ("channel_mult", "attention_resolutions"))
        require_flags(self, ("scale_shift_norm", "resblock_updown", "conv_resample", "checkpoint"))
        require_counts(self, ("resolution", "in_channels", "out_channels", "channels", "blocks", "head_channels"))
        require_counts(self, ("num_heads", "norm_groups", "dropout_resolution"), optional=True)
        require_classes(self)
        require_second_time(self)
        require_guidance(self)
        require_dropout(self)
        require(self.channels % 2 == 0, "channels", self.channels, "Give an even number: half of the noise embedding are cosines.")
        require_levels(self)
        for level, width in enumerate(self.widths):
            require(width % self.groups == 0, "norm_groups", self.groups, f"It must divide a layer's {width} channels.")
            if level == len(self.widths) - 1 or self.pixels(level) in self.attention_resolutions:
                name = "num_heads" if self.num_heads else "head_channels"
                require(
                    width % getattr(self, name) == 0, name, getattr(self, name), f"It must divide an attention layer's {width} channels."
                )

    @property
    def groups(self) -> int:
        """Groups of every GroupNorm."""
        return self.norm_groups or norm_groups(*self.widths)

    def heads(self, width: int) -> int:
        """Attention heads of a layer with `width` channels."""
        return self.num_heads or width // self.head_channels

    def dropout_at(self, pixels: int) -> float:
        """Dropout of a block whose output has `pixels` a side."""
        return self.dropout if self.dropout_resolution is None or pixels <= self.dropout_resolution else 0.0


class Stage(nn.Sequential):
    """Layers run in order; residual blocks get the embedding too."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """F(x, c_noise, labels): x float [B, in_channels, R, R], c_noise fp32 [B], labels int64 [B] or None -> [B, out_channels, R, R].

    end: with `second_time`, the end r fp32 [B] of an average velocity, 0 where left out.

    Works and returns in the dtype of its parameters. State-dict keys and weight layouts are those of openai/consistency_models.
    A label of -1, or labels=None, adds no class embedding. guidance: fp32 [B], with default_guidance.
    """

    kind = "adm"

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        emb_channels = 4 * config.channels
        self.time_embed = nn.Sequential(nn.Linear(config.channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        if config.second_time is not None:
            self.second_embed = SecondTime(config.second_time, config.channels, emb_channels)
        if config.num_classes is not None:
            self.label_emb = ClassEmbedding(config.num_classes, emb_channels)
        if config.default_guidance is not None:
            self.guidance_embed = GuidanceEmbedding(config.channels, config.default_guidance)
        skips = self._build_down()
        width = config.widths[-1]
        pixels = config.pixels(len(config.widths) - 1)
        self.middle_block = Stage(self._block(width, width, pixels), self._attention(width), self._block(width, width, pixels))
        width = self._build_up(width, skips)
        last = zero_init(nn.Conv2d(width, config.out_channels * config.patch**2, 3, padding=1))
        self.out = nn.Sequential(GroupNorm(width, groups=config.groups), nn.Identity(), last)
        dropout.number_layers(self)

    def _block(self, in_channels: int, out_channels: int, pixels: int, resample=None) -> ResBlock:
        config = self.config
        return ResBlock(
            in_channels,
            out_channels,
            emb_channels=4 * config.channels,
            dropout=config.dropout_at(pixels),
            scale_shift_norm=config.scale_shift_norm,
            resample=resample,
            groups=config.groups,
        )

    def _attention(self, width: int) -> Attention:
        return Attention(width, heads=self.config.heads(width), groups=self.config.groups)

    def _build_down(self) -> list[int]:
        """Fills input_blocks and returns the widths of their outputs, which the way up takes back."""
        config = self.config
        width = config.widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels * config.patch**2, width, 3, padding=1))])
        skips = [width]
        for level, level_width in enumerate(config.widths):
            pixels = config.pixels(level)
            if level > 0:
                if config.resblock_updown:
                    down = self._block(width, width, pixels, downsample)
                else:
                    down = Downsample(width, conv=config.conv_resample)
                self.input_blocks.append(Stage(down))
                skips.append(width)
            for _ in range(config.blocks):
                layers = [self._block(width, level_width, pixels)]
                width = level_width
                if pixels in config.attention_resolutions:
                    layers.append(self._attention(width))
                self.input_blocks.append(Stage(*layers))
                skips.append(width)
        return skips

    def _build_up(self, width: int, skips: list[int]) -> int:
        config = self.config
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(config.widths))):
            pixels = config.pixels(level)
            for index in range(config.blocks + 1):
                layers = [self._block(width + skips.pop(), config.widths[level], pixels)]
                width = config.widths[level]
                if pixels in config.attention_resolutions:
                    layers.append(self._attention(width))
                if level > 0 and index == config.blocks:
                    if config.resblock_updown:
                        layers.append(self._block(width, width, 2 * pixels, upsample))
                    else:
                        layers.append(Upsample(width, conv=config.conv_resample))
                self.output_blocks.append(Stage(*layers))
        return width

    @property
    def dtype(self) -> torch.dtype:
        return self.time_embed[0].weight.dtype

    def set_stream(self, seed: torch.Tensor, positions: torch.Tensor) -> None:
        """Fixes the dropout masks of the next passes: seed int64 [1], positions int64 [B]."""
        dropout.set_stream(self, seed, positions)

    def embed(self, c_noise, labels=None, *, guidance=None, end=None):
        """SiLU of the noise (and class) embedding, [B, 4 * channels]: every residual block starts from it."""
        embed = partial(sinusoidal_embedding, channels=self.config.channels)
        first, silu, last = self.time_embed
        features = embed(c_noise).to(self.dtype)
        if self.config.default_guidance is not None:
            features = features + self.guidance_embed(c_noise, guidance)
        emb = first(features)
        if takes_end(self.config, end):
            emb = emb + self.second_embed(c_noise, end, embed)
        emb = last(silu(emb))
        if labels is not None:
            if self.config.num_classes is None:
                raise InputError("labels given to an unconditional network, network.num_classes: None. Pass labels=None.")
            emb = emb + self.label_emb(labels)
        return nn.functional.silu(emb)

    def forward(self, x, c_noise, labels=None, **conditions):
        emb = self.embed(c_noise, labels, **conditions)
        run = runner(self.config.checkpoint)
        x = patches.to_patches(x.to(self.dtype), self.config)
        skips = []
        for stage in self.input_blocks:
            x = run(stage, x, emb)
            skips.append(x)
        x = run(self.middle_block, x, emb)
        for stage in self.output_blocks:
            x = run(stage, torch.cat([x, skips.pop()], dim=1), emb)
        return patches.to_pixels(self.out(x), self.config)
