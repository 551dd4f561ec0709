"""Patches: p x p pixels become channels before a network's first layer and pixels again after its last one.

An image that patches and levels do not divide is padded with zeros to one that they do, and its result is cropped.
"""

import torch.nn.functional as F
from torch import Tensor

PATCHES = (1, 2, 4, 8, 16)


def first_side(config) -> int:
    """Pixels a side of the first level: as many patches as cover the image and halve evenly from level to level."""
    halvings = 2 ** (len(config.channel_mult) - 1)
    return -(-config.resolution // (config.patch * halvings)) * halvings


class Levels:
    """The levels of a U-Net, each half the side of the one before: what its configuration, a dataclass, inherits."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the first down."""
        return tuple(int(self.channels * mult) for mult in self.channel_mult)

    def pixels(self, level: int) -> int:
        """Places a side of a level's feature maps: pixels where patch is 1."""
        return first_side(self) >> level


def is_plain(config) -> bool:
    """True where the layers see the image itself, as other people's formats have it."""
    return config.patch == 1 and first_side(config) == config.resolution


def _margins(config) -> tuple[int, int]:
    """Rows of zeros before and after the image, and columns."""
    margin = first_side(config) * config.patch - config.resolution
    return margin // 2, margin - margin // 2


def to_patches(x: Tensor, config) -> Tensor:
    """[B, C, R, R] -> [B, C * patch^2, S, S] with S = first_side; the patch's row and column vary fastest among the channels."""
    before, after = _margins(config)
    if after:
        x = F.pad(x, (before, after, before, after))
    return F.pixel_unshuffle(x, config.patch) if config.patch > 1 else x


def to_pixels(x: Tensor, config) -> Tensor:
    """[B, C * patch^2, S, S] -> [B, C, R, R], the inverse of `to_patches`."""
    before, after = _margins(config)
    if config.patch > 1:
        x = F.pixel_shuffle(x, config.patch)
    return x[:, :, before : before + config.resolution, before : before + config.resolution] if after else x
