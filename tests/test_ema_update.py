"""ema_update: the average of a constant is the constant, and any average matches float64."""

import pytest
import torch

from fastcm.kernels.ema_update import ema_update


@pytest.mark.parametrize("n", [1, 63, 1023])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_matches_float64(n, as_tensor):
    average, source = torch.randn(2, n)
    expected = 0.97 * average.double() + (1 - 0.97) * source.double()
    ema_update(average, source, torch.tensor([0.97]) if as_tensor else 0.97)
    assert torch.allclose(average.double(), expected, atol=1e-6)


def test_average_of_a_constant_is_the_constant():
    average = torch.full((100,), 0.3)
    for decay in (0.0, 0.5, 0.9999):
        ema_update(average, torch.full((100,), 0.3), decay)
    assert torch.equal(average, torch.full((100,), 0.3))
