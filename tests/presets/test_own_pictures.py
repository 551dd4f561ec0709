"""What `fastcm train --data` chooses for pictures of any size: a small lowest level, in a step that fits a small machine."""

import numpy as np
import pytest
import torch

from fastcm import networks, presets
from fastcm.data.dataset import Dataset
from fastcm.training.memory import estimate

SIZES = (8, 16, 28, 32, 48, 50, 64, 96, 100, 128, 256, 300)


def config_of(resolution, count=1):
    pictures = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (count, 3, resolution, resolution))
    return presets.folder(dataset=Dataset(pictures, None, None, "pictures", ""), data="pictures")


@pytest.mark.parametrize("resolution", SIZES)
def test_every_size_has_a_small_lowest_level(resolution):
    """4 to 8 places a side, where the network attends; shapes come back as they went in, 50 and 100 pixels too."""
    config = config_of(resolution)
    with torch.device("meta"):
        network = networks.build("adm", {name: value for name, value in config.network.items() if name != "kind"})
        x, c_noise = torch.empty(2, 3, resolution, resolution), torch.empty(2)
        assert network(x, c_noise).shape == x.shape
    lowest = network.config.pixels(len(network.config.widths) - 1)
    assert 4 <= lowest <= 8 and network.config.attention_resolutions == (lowest,)
    assert network.config.pixels(0) <= 64


def test_many_pictures_have_a_wider_network():
    assert [config_of(size, count).network["channels"] for size in (32, 64) for count in (49_999, 50_000)] == [32, 64, 64, 96]


@pytest.mark.slow
@pytest.mark.parametrize(("resolution", "most_gb"), [(64, 1.0), (256, 4.0)])
def test_a_step_fits(resolution, most_gb):
    """Of the widest network that is chosen."""
    assert estimate(config_of(resolution, 50_000))["total"] < most_gb * 1e9
