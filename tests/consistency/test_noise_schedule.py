"""The Karras grid against published values; the distributions of noise levels against their formulas."""

import math

import numpy as np
import pytest
import torch

from fastcm.consistency import noise_schedule
from fastcm.errors import InputError

GRID = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}


@pytest.mark.parametrize("steps", [2, 18, 40, 151])
def test_grid_runs_down_from_sigma_max_to_sigma_min(steps):
    grid = noise_schedule.karras_grid(steps, **GRID)
    assert grid.dtype == torch.float64 and len(grid) == steps
    assert grid[0].item() == 80.0 and grid[-1].item() == pytest.approx(0.002, rel=1e-12)
    assert bool((grid.diff() < 0).all())


@pytest.mark.parametrize(
    ("steps", "index", "sigma"),  # the published two-step and search results
    [(40, 22, 1.382), (201, 106, 1.913), (40, 17, 4.366), (40, 18, 3.520), (151, 67, 3.991), (151, 62, 5.249), (18, 11, 0.585)],
)
def test_published_levels(steps, index, sigma):
    assert noise_schedule.karras_grid(steps, **GRID)[index].item() == pytest.approx(sigma, abs=6e-4)


def test_index_inverts_sigma():
    index = torch.linspace(0, 39, 200, dtype=torch.float64)
    sigma = noise_schedule.karras_sigma(index, 40, **GRID)
    torch.testing.assert_close(noise_schedule.karras_index(sigma, 40, **GRID), index, atol=1e-8, rtol=0)


def test_steps_may_be_a_tensor():
    index = torch.arange(5, dtype=torch.float64)
    a, b = (noise_schedule.karras_sigma(index, n, **GRID) for n in (11, torch.tensor(11)))
    assert torch.equal(a, b)


def quantiles(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_uniform_pair_is_adjacent_and_uniform():
    hi, lo = noise_schedule.uniform_pair(quantiles(9000), 10, **GRID)
    grid = noise_schedule.karras_grid(10, **GRID).float()
    for index in range(9):
        here = hi == grid[index]
        assert int(here.sum()) == 1000 and bool((lo[here] == grid[index + 1]).all())


@pytest.mark.parametrize("steps", [2, 11, 161, 1281])
def test_log_normal_pair_has_the_papers_probabilities(steps):
    P_mean, P_std, count = -1.1, 2.0, 200_000
    hi, lo = noise_schedule.log_normal_pair(quantiles(count), steps, **GRID, P_mean=P_mean, P_std=P_std)
    grid = noise_schedule.karras_grid(steps, **GRID)
    edges = np.array([math.erf((math.log(s) - P_mean) / (math.sqrt(2) * P_std)) for s in grid.tolist()])
    p = (edges[:-1] - edges[1:]) / (edges[0] - edges[-1])
    index = noise_schedule.karras_index(hi.double(), steps, **GRID).round().long()
    measured = np.bincount(index.numpy(), minlength=steps - 1) / count
    np.testing.assert_allclose(measured, p, atol=3 / count)
    torch.testing.assert_close(lo, grid.float()[index + 1], rtol=1e-6, atol=0)


def test_log_normal_pair_stays_on_the_grid_at_the_ends():
    u = torch.tensor([0.0, 1e-12, 0.5, 1 - 1e-7, 1.0], dtype=torch.float64)
    hi, lo = noise_schedule.log_normal_pair(u, 40, **GRID, P_mean=-1.1, P_std=2.0)
    assert lo.min().item() == pytest.approx(0.002) and hi.max().item() == 80.0 and bool((hi > lo).all())


def test_log_normal_moments():
    sigma = noise_schedule.log_normal(quantiles(100_000), P_mean=-1.2, P_std=1.2)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=1e-3) and sigma.log().std().item() == pytest.approx(1.2, abs=2e-3)


def test_sampling_sigmas_start_at_sigma_max_and_leave_sigma_min_out():
    assert noise_schedule.sampling_sigmas(1, **GRID) == (80.0,)
    two = noise_schedule.sampling_sigmas(2, **GRID)
    assert two[0] == 80.0 and two[1] == pytest.approx(noise_schedule.karras_grid(3, **GRID)[1].item())
    with pytest.raises(InputError, match="--steps: 0"):
        noise_schedule.sampling_sigmas(0, **GRID)


@pytest.mark.parametrize(
    ("t", "stage", "ratio"),  # r / t with q = 2, k = 8, b = 1: 1 - (1 + 8 / (1 + e^t)) / 2^(stage + 1), not below 0
    [(0.01, 0, 0.0), (0.01, 2, 0.3775), (0.01, 7, 0.98055), (1.0, 0, 0.0), (1.0, 3, 0.80303), (20.0, 0, 0.5), (80.0, 7, 0.99609)],
)
def test_ect_pairs_close_as_the_stage_grows(t, stage, ratio):
    settings = {"P_mean": math.log(t), "P_std": 1e-6, "q": 2.0, "k": 8.0, "b": 1.0}
    hi, lo = noise_schedule.ect_pair(torch.tensor([0.3]), stage, **settings)
    assert hi.item() == pytest.approx(t, rel=1e-4) and hi.dtype == lo.dtype == torch.float32
    assert (lo / hi).item() == pytest.approx(ratio, abs=2e-5)


def test_a_limit_ends_the_closing_of_ects_pairs():
    """FastGen's and Lee's: min(1 - 1 / q^(stage + 1), ratio_limit) in the place of 1 - 1 / q^(stage + 1); stages are numbers or tensors."""
    t = torch.tensor([0.5, 1.0, 40.0])
    for stage in (3, 8, 9, 27):
        ratio = min(1 - 1 / 2 ** (stage + 1), 0.999)
        expected = t - t * (1 - ratio) * (1 + 8 / (1 + t.exp()))
        for given in (stage, torch.tensor(stage, dtype=torch.float64)):
            r = noise_schedule.ect_lower(t, given, q=2.0, k=8.0, b=1.0, limit=1000.0)
            torch.testing.assert_close(r.float(), expected, rtol=1e-6, atol=0)
