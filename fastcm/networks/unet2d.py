"""The U-Nets of diffusers' UNet2DModel: DDPM's and NCSN++'s with any mixture of its blocks, from our own layers."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from fastcm.errors import InputError
from fastcm.networks import dropout
from fastcm.networks.blocks import (
    Attention,
    ClassEmbedding,
    Downsample,
    GroupNorm,
    GuidanceEmbedding,
    ResBlock,
    Upsample,
    downsample,
    noise_angles,
    one_hot,
    runner,
    upsample,
    zero_init,
)
from fastcm.networks.checks import (
    MOST_BLOCKS,
    MOST_LEVELS,
    is_number,
    require,
    require_choice,
    require_counts,
    require_dropout,
    require_flags,
    require_guidance,
)
from fastcm.networks.resample import fir_downsample, fir_upsample
from fastcm.networks.song_unet import NoiseEmbedding

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")
SKIP_GAIN = math.sqrt(0.5)  # of the residual sums in the Skip blocks
MOST_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class UNet2DConfig:
    """Options of `UNet2D`, UNet2DModel's under the names that fastcm's networks share; the defaults are google/ddpm-cifar10-32's."""

    resolution: int = 32
    in_channels: int = 3
    out_channels: int = 3
    widths: tuple[int, ...] = (128, 256, 256, 256)  # channels of each level, from full resolution down
    blocks: int = 2  # residual blocks per level on the way down; one more on the way up
    down_blocks: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up_blocks: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    middle: bool = True
    middle_attention: bool = True
    middle_scale: float = 1.0  # its residual sums are divided by it
    middle_groups: int | None = None  # of the norm of its attention; None: norm_groups, or no norm at all with scale_shift_norm
    head_channels: int | None = None  # None: one head
    norm_groups: int | None = 32  # None, for Skip blocks alone: a quarter of the channels, at most 32
    norm_eps: float = 1e-6
    scale_shift_norm: bool = False
    resnet_downsample: bool = False  # of AttnDownBlock2D: a residual block that halves, in place of a convolution
    resnet_upsample: bool = False  # of AttnUpBlock2D
    downsample_padding: int = 0  # 0: the strided convolution sees a border on the right and below only
    embedding: str = "positional"  # or "fourier"
    freq_shift: int = 1  # 1: the slowest frequency is 1 / 10,000 exactly
    cosines_first: bool = False
    emb_channels: int | None = None  # None: 4 times the first width
    num_classes: int | None = None
    default_guidance: float | None = None  # a student that is told its teacher's guidance weight: this one unless another is given
    numbered_classes: bool = False  # classes are embedded as noise levels are, by their numbers
    input_gain: float = 1.0  # the network works on input_gain x + input_shift
    input_shift: float = 0.0
    dropout: float = 0.0
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self):
        for name in ("widths", "down_blocks", "up_blocks"):
            value = getattr(self, name)
            require(isinstance(value, (list, tuple)), name, value, "Give a list.")
            object.__setattr__(self, name, tuple(value))
        flags = ("middle", "middle_attention", "scale_shift_norm", "resnet_downsample", "resnet_upsample", "cosines_first")
        require_flags(self, (*flags, "numbered_classes", "checkpoint"))
        require_counts(self, ("resolution", "in_channels", "out_channels", "blocks"))
        require_counts(self, ("middle_groups", "head_channels", "norm_groups", "emb_channels", "num_classes"), optional=True)
        require_dropout(self)
        require_guidance(self)
        require_choice(self, "embedding", ("positional", "fourier"))
        for name in ("norm_eps", "middle_scale"):
            require(is_number(getattr(self, name)) and getattr(self, name) > 0, name, getattr(self, name), "Give a positive number.")
        for name in ("input_gain", "input_shift"):
            require(is_number(getattr(self, name)), name, getattr(self, name), "Give a number.")
        for name in ("downsample_padding", "freq_shift"):
            require(getattr(self, name) in (0, 1), name, getattr(self, name), "Give 0 or 1.")
        self._check_levels()

    def _check_levels(self) -> None:
        levels = len(self.widths)
        require(1 <= levels <= MOST_LEVELS, "widths", f"{levels} levels", f"Give 1 to {MOST_LEVELS}.")
        require(self.blocks <= MOST_BLOCKS, "blocks", self.blocks, f"Give {MOST_BLOCKS} at most.")
        for name, known in (("down_blocks", DOWN_BLOCKS), ("up_blocks", UP_BLOCKS)):
            kinds = getattr(self, name)
            require(len(kinds) == levels, name, kinds, f"Give one for each of the {levels} widths.")
            require(all(kind in known for kind in kinds), name, kinds, f"Choose among {', '.join(known)}.")
        whole = all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in self.widths)
        require(whole and self.widths[0] % 2 == 0, "widths", self.widths, "Give positive whole numbers, the first of them even.")
        factor = 2 ** (levels - 1)
        require(self.resolution % factor == 0, "resolution", self.resolution, f"Give a multiple of {factor}: there are {levels} levels.")
        kinds = (*self.down_blocks, *self.up_blocks)
        plain = [kind for kind in kinds if "Skip" not in kind]
        require(self.norm_groups is not None or not plain, "norm_groups", None, f"Give a number: {', '.join(plain[:1])} needs it.")

    def heads(self, width: int) -> int:
        """Attention heads of a layer with `width` channels."""
        size = self.head_channels or width
        require(width % size == 0, "head_channels", size, f"It must divide an attention layer's {width} channels.")
        return width // size

    def groups(self, width: int, *, skip: bool = False) -> int:
        """Groups of a norm over `width` channels."""
        groups = min(width // 4, MOST_GROUPS) if skip or self.norm_groups is None else self.norm_groups
        require(groups > 0 and width % groups == 0, "norm_groups", groups, f"It must divide a layer's {width} channels.")
        return groups

    @property
    def emb_width(self) -> int:
        return self.emb_channels or 4 * self.widths[0]


class Embedding(nn.Module):
    """linear_2(silu(linear_1(x)))."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_features, out_features), nn.Linear(out_features, out_features)

    def forward(self, x):
        return self.linear_2(nn.functional.silu(self.linear_1(x)))


class Level(nn.Module):
    """The residual blocks and attentions of one resolution, and what leads to the next: plain, or as NCSN++ has it ("Skip"), with an image
    that goes along beside the features."""

    def __init__(self, config: UNet2DConfig, kind: str):
        super().__init__()
        self.config, self.skip, self.gain = config, "Skip" in kind, SKIP_GAIN if "Skip" in kind else 1.0
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()

    def block(self, in_channels: int, out_channels: int, *, resample=None, groups: int | None = None) -> ResBlock:
        config = self.config
        return ResBlock(
            in_channels,
            out_channels,
            emb_channels=config.emb_width,
            dropout=config.dropout,
            scale_shift_norm=config.scale_shift_norm,
            resample=resample,
            groups=groups or config.groups(in_channels, skip=self.skip),
            out_groups=config.groups(out_channels, skip=self.skip),
            eps=config.norm_eps,
            gain=self.gain,
            project=True if self.skip and resample is not None else None,
        )

    def attention(self, width: int) -> Attention:
        config = self.config
        groups = MOST_GROUPS if self.skip else config.groups(width)
        require(width % groups == 0, "widths", width, f"An attention of {groups} groups needs a multiple of it.")
        return Attention(width, heads=config.heads(width), groups=groups, eps=config.norm_eps, gain=self.gain)


class DownLevel(Level):
    def __init__(self, config: UNet2DConfig, kind: str, in_channels: int, width: int, *, last: bool):
        super().__init__(config, kind)
        for index in range(config.blocks):
            self.resnets.append(self.block(in_channels if index == 0 else width, width))
            if kind.startswith("Attn"):
                self.attentions.append(self.attention(width))
        if not last and self.skip:
            self.resnet_down = self.block(width, width, resample=fir_downsample)
            self.skip_conv = nn.Conv2d(config.in_channels, width, 1)
        elif not last:
            resnet = kind == "ResnetDownsampleBlock2D" or (kind == "AttnDownBlock2D" and config.resnet_downsample)
            conv = {"conv": True, "padding": config.downsample_padding}
            self.downsamplers = nn.ModuleList([self.block(width, width, resample=downsample) if resnet else Downsample(width, **conv)])
        self.last = last

    def forward(self, x, image, emb, skips: list, run):
        """Appends what the way up takes back to `skips`; returns (x, image) at the next resolution."""
        for index, resnet in enumerate(self.resnets):
            x = run(resnet, x, emb)
            x = self.attentions[index](x) if self.attentions else x
            skips.append(x)
        if self.last:
            return x, image
        if self.skip:
            image = fir_downsample(image)
            x = run(self.resnet_down, x, emb) + self.skip_conv(image)
        else:
            down = self.downsamplers[0]
            x = run(down, x, emb) if isinstance(down, ResBlock) else down(x)
        skips.append(x)
        return x, image


class UpLevel(Level):
    def __init__(self, config: UNet2DConfig, kind: str, in_channels: int, width: int, skips: list[int], *, last: bool):
        super().__init__(config, kind)
        for index in range(config.blocks + 1):
            main, side = in_channels if index == 0 else width, skips.pop()
            # diffusers' AttnSkipUpBlock2D divides the second term alone by four.
            groups = min(main + side // 4, MOST_GROUPS) if kind == "AttnSkipUpBlock2D" else None
            self.resnets.append(self.block(main + side, width, groups=groups))
            if kind == "AttnUpBlock2D":
                self.attentions.append(self.attention(width))
        if kind == "AttnSkipUpBlock2D":
            self.attentions.append(self.attention(width))  # one, after all residual blocks
        if not last and self.skip:
            self.resnet_up = self.block(width, width, resample=fir_upsample)
            self.skip_norm = GroupNorm(width, groups=config.groups(width, skip=True), eps=config.norm_eps)
            self.skip_conv = nn.Conv2d(width, config.out_channels, 3, padding=1)
        elif not last:
            resnet = kind == "ResnetUpsampleBlock2D" or (kind == "AttnUpBlock2D" and config.resnet_upsample)
            up = self.block(width, width, resample=upsample) if resnet else Upsample(width, conv=True)
            self.upsamplers = nn.ModuleList([up])
        self.last = last

    def forward(self, x, image, emb, skips: list, run):
        """Takes its share of `skips`; returns (x, image) at the next resolution."""
        for index, resnet in enumerate(self.resnets):
            x = run(resnet, torch.cat([x, skips.pop()], dim=1), emb)
            x = self.attentions[index](x) if len(self.attentions) == len(self.resnets) else x
        if len(self.attentions) == 1 and len(self.resnets) > 1:
            x = self.attentions[0](x)
        if self.skip:
            image = None if image is None else fir_upsample(image)
            if not self.last:
                added = self.skip_conv(self.skip_norm(x))
                image = added if image is None else image + added
                x = run(self.resnet_up, x, emb)
        elif not self.last:
            up = self.upsamplers[0]
            x = run(up, x, emb) if isinstance(up, ResBlock) else up(x)
        return x, image


class Middle(Level):
    def __init__(self, config: UNet2DConfig, width: int):
        super().__init__(config, "")
        self.gain = 1 / config.middle_scale
        self.resnets.extend([self.block(width, width), self.block(width, width)])
        if config.middle_attention:
            groups = config.middle_groups or (None if config.scale_shift_norm else config.groups(width))
            options = {"heads": config.heads(width), "eps": config.norm_eps, "gain": self.gain}
            require(groups is None or width % groups == 0, "middle_groups", groups, f"It must divide the middle's {width} channels.")
            self.attentions.append(Attention(width, groups=groups, norm=groups is not None, **options))

    def forward(self, x, emb, run):
        x = run(self.resnets[0], x, emb)
        x = self.attentions[0](x) if self.attentions else x
        return run(self.resnets[1], x, emb)


class UNet2D(nn.Module):
    """F(x, c_noise, labels): x float [B, in_channels, R, R], c_noise fp32 [B], labels int64 [B] or None -> [B, out_channels, R, R].

    c_noise is diffusers' timestep, of a Fourier embedding its logarithm; there the model divides its output by the noise level, which
    the form "ve" has in c_out. Works and returns in the dtype of its parameters. Blocks and layers have diffusers' names, residual blocks
    and attentions ours inside. A label of -1, or labels=None, adds no class embedding.
    guidance: fp32 [B], with default_guidance.
    """

    kind = "unet2d"

    def __init__(self, config: UNet2DConfig):
        super().__init__()
        self.config = config
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        fourier = config.embedding == "fourier"
        if fourier:
            self.time_proj = NoiseEmbedding(2 * widths[0], fourier_scale=16.0)
        features = 2 * widths[0] if fourier else widths[0]
        self.time_embedding = Embedding(features, config.emb_width)
        if config.num_classes is not None:
            kind, size = (Embedding, features) if config.numbered_classes else (ClassEmbedding, config.num_classes)
            self.class_embedding = kind(size, config.emb_width)
        if config.default_guidance is not None:
            self.guidance_embed = GuidanceEmbedding(features, config.default_guidance)
        levels, width, skips = len(widths), widths[0], [widths[0]]
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, kind in enumerate(config.down_blocks):
            last = level == levels - 1
            self.down_blocks.append(DownLevel(config, kind, width, widths[level], last=last))
            width = widths[level]
            skips += [width] * (config.blocks + (not last))
        self.mid_block = Middle(config, width) if config.middle else None
        for place, kind in enumerate(config.up_blocks):
            level = levels - 1 - place
            self.up_blocks.append(UpLevel(config, kind, width, widths[level], skips, last=level == 0))
            width = widths[level]
        self.conv_norm_out = GroupNorm(width, groups=config.groups(width), eps=config.norm_eps)
        self.conv_out = zero_init(nn.Conv2d(width, config.out_channels, 3, padding=1))
        dropout.number_layers(self)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def set_stream(self, seed: torch.Tensor, positions: torch.Tensor) -> None:
        """Fixes the dropout masks of the next passes: seed int64 [1], positions int64 [B]."""
        dropout.set_stream(self, seed, positions)

    def _features(self, numbers):
        """The sines and cosines of c_noise, or of class numbers, fp32 [B] -> [B, features]."""
        if self.config.embedding == "fourier":
            return self.time_proj(numbers)
        angles = noise_angles(numbers, self.config.widths[0], endpoint=self.config.freq_shift == 1)
        parts = [angles.cos(), angles.sin()] if self.config.cosines_first else [angles.sin(), angles.cos()]
        return torch.cat(parts, dim=1)

    def embed(self, c_noise, labels=None, *, guidance=None):
        """SiLU of the noise (and class) embedding, [B, emb_width]: every residual block starts from it."""
        features = self._features(c_noise).to(self.dtype)
        if self.config.default_guidance is not None:
            features = features + self.guidance_embed(c_noise, guidance)
        emb = self.time_embedding(features)
        if labels is not None:
            if self.config.num_classes is None:
                raise InputError("labels given to an unconditional network, network.num_classes: None. Pass labels=None.")
            if self.config.numbered_classes:
                numbers = torch.arange(self.config.num_classes, device=emb.device, dtype=torch.float32)
                rows = self.class_embedding(self._features(numbers).to(self.dtype))
                emb = emb + one_hot(labels, self.config.num_classes, self.dtype) @ rows
            else:
                emb = emb + self.class_embedding(labels)
        return nn.functional.silu(emb)

    def forward(self, x, c_noise, labels=None, **conditions):
        config, emb, run = self.config, self.embed(c_noise, labels, **conditions), runner(self.config.checkpoint)
        image = x.to(self.dtype)
        if (config.input_gain, config.input_shift) != (1.0, 0.0):
            image = config.input_gain * image + config.input_shift
        x = self.conv_in(image)
        skips = [x]
        for level in self.down_blocks:
            x, image = level(x, image, emb, skips, run)
        x = x if self.mid_block is None else self.mid_block(x, emb, run)
        image = None
        for level in self.up_blocks:
            x, image = level(x, image, emb, skips, run)
        x = self.conv_out(self.conv_norm_out(x))
        return x if image is None else x + image
