"""group_statistics: mean and 1 / std of groups that many programs share, against float64."""

import pytest
import torch
from kernel_checks import each_implementation  # noqa: F401

from fastcm.kernels.group_statistics import group_statistics, split_grid

LAST = torch.channels_last


# Ragged tiles of pixels and of channels, groups across tiles, one group, chunks that end early, one pixel.
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 32, 5, 5), 8), ((1, 36, 16, 9), 3), ((2, 48, 13, 13), 48), ((1, 80, 40, 33), 1), ((3, 8, 1, 1), 2)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_float64(device, shape, groups, dtype):
    generator = torch.Generator().manual_seed(0)
    # A mean far from zero: squares that were summed around zero would lose the variance.
    x = (torch.randn(shape, generator=generator) + 50).to(dtype)
    mean, rstd = group_statistics(x.to(device).contiguous(memory_format=LAST), groups, eps=1e-5)
    variance, want = torch.var_mean(x.double().reshape(shape[0], groups, -1), 2, correction=0)
    assert mean.shape == rstd.shape == (shape[0], groups) and mean.dtype == rstd.dtype == torch.float32
    assert torch.allclose(mean.cpu().double(), want, rtol=1e-6)
    assert torch.allclose(rstd.cpu().double(), (variance + 1e-5).rsqrt(), rtol=2e-5)


def test_grid_covers_every_pixel_once():
    for shape in ((1, 192, 64, 64), (64, 1152, 16, 16), (512, 128, 32, 32), (1, 32, 1, 3)):
        grid = split_grid(torch.empty(shape, device="meta"), 32)
        pixels = shape[2] * shape[3]
        assert (grid.chunks - 1) * grid.chunk_pixels < pixels <= grid.chunks * grid.chunk_pixels
        assert grid.chunk_pixels % grid.tile["BLOCK_P"] == 0 and grid.columns * grid.tile["BLOCK_C"] >= shape[0] * shape[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 8, 4)}, r"group_statistics\(x\): \[2, 8, 4\]"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.int64)}, r"group_statistics\(x\): int64"),
        ({"groups": 3}, r"group_statistics\(groups\): 3\. Use a divisor of the 8 channels"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        group_statistics(**({"x": torch.zeros(2, 8, 4, 4), "groups": 4} | changes))


@pytest.mark.slow
def test_registered_op_keeps_its_contract(device):
    x = torch.randn(2, 8, 5, 3).to(device).contiguous(memory_format=LAST)
    group_statistics(x, 2)
    torch.library.opcheck(torch.ops.fastcm.group_statistics.default, (x, 2, 1e-5))
