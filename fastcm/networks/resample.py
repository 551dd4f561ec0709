"""Halving and doubling the resolution by a finite impulse response filter, alone or around a convolution."""

import torch
import torch.nn.functional as F
from torch import nn

from fastcm.networks.blocks import downsample, upsample


def fir_filter(taps: tuple[float, ...]) -> torch.Tensor:
    """The separable 2-D filter with these taps and sum one, fp32 [1, 1, k, k]."""
    row = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum().square())[None, None]


def fir_downsample(x):
    """Half the resolution by the taps (1, 3, 3, 1) with a border of zeros: three means of two neighbours, which have those taps."""
    return F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2, stride=1), 2, stride=1), 2)


def fir_upsample(x):
    """Twice the resolution by the taps (1, 3, 3, 1) with a border of zeros: each pixel twice, then two means of two neighbours."""
    return F.avg_pool2d(F.avg_pool2d(F.pad(upsample(x), (1, 1, 1, 1)), 2, stride=1), 2, stride=1)


class Resample(nn.Module):
    """Half ("down") or twice ("up") the resolution by a FIR filter; None leaves x alone. The filter is a buffer unless it is (1, 1)."""

    def __init__(self, direction: str | None, taps: tuple[float, ...]):
        super().__init__()
        self.direction = direction
        is_box = direction is None or taps[0] == taps[1] and len(taps) == 2
        self.register_buffer("resample_filter", None if is_box else fir_filter(taps))

    def resample(self, x, *, padded: bool = False):
        """`padded`: x already carries the border that the filter needs."""
        if self.direction is None:
            return x
        if self.resample_filter is None:
            return downsample(x) if self.direction == "down" else upsample(x)
        channels, size = x.shape[1], self.resample_filter.shape[-1]
        kernel = self.resample_filter.to(x.dtype).expand(channels, 1, size, size)
        padding = 0 if padded else (size - 1) // 2
        if self.direction == "down":
            return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)

    def forward(self, x):
        return self.resample(x)


class ResampleConv(Resample):
    """Resampling, then a convolution; with `filter_last` the convolution, on the large image, then the filter (halving only)."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, direction=None, taps=(1, 1), filter_last=False, gain=1.0):
        super().__init__(direction, taps)
        self.filter_last = filter_last
        self.weight = nn.Parameter(gain * nn.init.xavier_uniform_(torch.empty(out_channels, in_channels, size, size)))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        padding = self.weight.shape[-1] // 2
        if not self.filter_last:
            return F.conv2d(self.resample(x), self.weight, self.bias, padding=padding)
        border = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        return self.resample(F.conv2d(x, self.weight, self.bias, padding=padding + border), padded=True)
