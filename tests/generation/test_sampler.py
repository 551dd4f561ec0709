"""Samplers against the Gaussian world, where every trajectory is known."""

import math

import pytest
import torch
from analytic import gaussian_consistency, gaussian_teacher, ode_gain

from fastcm.errors import InputError
from fastcm.generation.frozen import freeze
from fastcm.generation.sampler import (
    Churn,
    GivenNoise,
    SeedNoise,
    ancestral,
    dpm,
    euler,
    heun,
    multistep,
    onestep,
    teacher_grid,
    teacher_sampler,
)

SHAPE = (1, 4, 4)
SEEDS = torch.tensor([0, 1, -1, 2**63 - 1])
GRID = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}


class CountingNoise(GivenNoise):
    """Given noise that records which steps were asked for."""

    def __init__(self, fields):
        super().__init__(fields)
        self.asked = []

    def normal(self, step):
        self.asked.append(step)
        return super().normal(step)


def given(steps, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return CountingNoise(torch.randn(steps, batch, *SHAPE, generator=generator))


@pytest.mark.parametrize("form", ["boundary", "edm"])
def test_onestep_is_the_exact_consistency_function_of_the_noise(form):
    denoiser = gaussian_consistency(form, data_std=0.3)
    noise = given(1)
    image = onestep(freeze(denoiser, 80.0), noise, clip=False)
    torch.testing.assert_close(image, ode_gain(80.0, 0.002, 0.3) * 80 * noise.normal(0), rtol=1e-5, atol=1e-6)


def test_multistep_with_one_level_is_onestep():
    level = freeze(gaussian_consistency(), 80.0)
    assert torch.equal(multistep([level], given(1), sigma_min=0.002), onestep(level, given(1)))


def test_multistep_follows_algorithm_1():
    denoiser, noise = gaussian_consistency(data_std=0.3), given(3)
    sigmas = (80.0, 2.0, 0.5)
    image = multistep([freeze(denoiser, s) for s in sigmas], noise, sigma_min=0.002)
    x = 80 * noise.fields[0]
    for step, sigma in enumerate(sigmas):
        if step:
            x = D.clamp(-1, 1) + math.sqrt(sigma**2 - 0.002**2) * noise.fields[step]  # noqa: F821
        D = denoiser(x, torch.full((4,), sigma))
    torch.testing.assert_close(image, D.clamp(-1, 1), rtol=1e-5, atol=1e-6)
    assert noise.asked == [0, 1, 2]


def test_clipping_bounds_what_is_renoised_and_what_is_returned():
    levels = [freeze(gaussian_consistency(data_std=5.0), s) for s in (80.0, 2.0)]
    free, clipped = (multistep(levels, given(2), sigma_min=0.002, clip=clip) for clip in (False, True))
    assert free.abs().max() > 1.5 and clipped.abs().max() == 1
    assert not torch.allclose(free.clamp(-1, 1), clipped)  # the first image was clipped before the second step


def test_seed_noise_and_given_noise_are_the_same_sampler():
    levels = [freeze(gaussian_consistency(data_std=0.4), s) for s in (80.0, 3.0, 0.7)]
    seeds = SeedNoise(SEEDS, SHAPE)
    fields = [seeds.normal(step) for step in range(3)]
    assert len({image.sum().item() for field in fields for image in field}) == 12  # every step and seed has its own noise
    a, b = multistep(levels, seeds, sigma_min=0.002), multistep(levels, GivenNoise(fields), sigma_min=0.002)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_teacher_grid_ends_at_zero():
    grid = teacher_grid(18, **GRID)
    assert len(grid) == 19 and grid[-1] == 0.0 and grid[0] == pytest.approx(80) and grid[-2] == pytest.approx(0.002)
    assert teacher_grid(1, **GRID) == [80.0, 0.0]


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpm, 2)])
def test_order_of_convergence(sampler, order):
    """Halving the step divides the error by 2^order. The grid stops at 0.5: the last step to 0 is first order by design."""
    denoiser, noise = gaussian_teacher("edm", data_std=0.7), given(1)
    exact = ode_gain(80.0, 0.5, 0.7) * 80 * noise.normal(0)

    def error(steps):
        index = torch.arange(steps + 1, dtype=torch.float64) / steps
        grid = ((80 ** (1 / 7) + index * (0.5 ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist()
        return (sampler(denoiser, noise, grid, clip=False) - exact).abs().max().item()

    observed = math.log2(error(24) / error(48))
    assert observed == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("sampler", "bound"), [(euler, 0.08), (heun, 0.01), (dpm, 0.02)])
def test_solvers_reach_the_exact_sample(sampler, bound):
    denoiser, noise = gaussian_teacher("edm", data_std=0.4), given(1)
    exact = (ode_gain(80.0, 0.0, 0.4) * 80 * noise.normal(0)).clamp(-1, 1)
    image = sampler(denoiser, noise, teacher_grid(40, **GRID), clip=False).clamp(-1, 1)
    assert (image - exact).abs().max() < bound


@pytest.mark.parametrize("churn", [8.0, 20.0])  # below and above the bound of sqrt(2) - 1
def test_churn_follows_algorithm_2(churn):
    """Euler in heun's place would not do: the replay below is Heun's two slopes, in float64, from the closed-form denoiser."""
    denoiser, noise, churn_range = gaussian_teacher("edm", data_std=0.3), given(31, batch=64), (0.05, 50.0)
    grid = teacher_grid(30, **GRID)
    image = heun(denoiser, noise, grid, clip=False, churn=Churn(churn, *churn_range, 1.01))
    x, churned_steps = grid[0] * noise.fields[0].double(), []

    def slope(x, sigma):
        return (x - 0.09 / (sigma**2 + 0.09) * x) / sigma

    for step, (sigma, lo) in enumerate(zip(grid, grid[1:], strict=False)):
        hi = sigma
        if churn_range[0] <= sigma <= churn_range[1]:
            hi = sigma * (1 + min(churn / 29, math.sqrt(2) - 1))
            x = x + 1.01 * math.sqrt(hi**2 - sigma**2) * noise.fields[step + 1].double()
            churned_steps.append(step + 1)
        d = slope(x, hi)
        x_euler = x + (lo - hi) * d
        x = x_euler if lo == 0 else x + (lo - hi) * (d + slope(x_euler, lo)) / 2
    torch.testing.assert_close(image, x.float(), rtol=1e-4, atol=1e-4)
    assert len(churned_steps) > 5 and noise.asked == [0, *churned_steps]
    assert image.std().item() == pytest.approx(0.3, rel=0.15)


class OneAtATime:
    """Noise whose row k is a constant field of ones at step k and of zeros at all others."""

    def __init__(self, steps):
        self.steps = steps

    def normal(self, step):
        return (torch.arange(self.steps) == step).float().view(-1, 1, 1, 1)


def deviation(sampler, steps, *, end, **options):
    """The exact deviation of a sampler's image down to sigma = end: in the Gaussian world it is linear in the fields that it draws."""
    grid = ((80 ** (1 / 7) + torch.arange(steps + 1, dtype=torch.float64) / steps * (end ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist()
    return sampler(gaussian_teacher("edm", data_std=0.7), OneAtATime(steps + 2), grid, clip=False, **options).square().sum().sqrt().item()


@pytest.mark.parametrize(
    ("sampler", "order", "options"), [(ancestral, 1, {}), (heun, 2, {"churn": Churn(4)}), (dpm, 2, {"churn": Churn(4)})]
)
def test_order_of_convergence_with_noise_between_the_steps(sampler, order, options):
    """There is no exact sample then, but an exact deviation: that of data and noise at the level where the grid stops."""
    errors = [abs(deviation(sampler, steps, end=0.5, **options) - math.hypot(0.7, 0.5)) for steps in (48, 96)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_churn_moves_dpm_samples():
    grid, denoiser = teacher_grid(30, **GRID), gaussian_teacher("edm", data_std=0.3)
    churned, calm = (dpm(denoiser, given(31, batch=64), grid, clip=False, churn=Churn(amount)) for amount in (20.0, 0.0))
    assert (churned - calm).abs().mean() > 0.05
    assert churned.std().item() == pytest.approx(0.3, rel=0.15)


def test_churn_of_nothing_is_calm():
    grid, denoiser = teacher_grid(10, **GRID), gaussian_teacher("edm", data_std=0.3)
    for churn in (Churn(0), Churn(20, low=90), Churn(20, high=0.001)):
        assert torch.equal(heun(denoiser, given(1), grid, churn=churn), heun(denoiser, given(1), grid))


def test_ancestral_keeps_the_distribution():
    denoiser, noise = gaussian_teacher("edm", data_std=0.3), given(61, batch=256)
    grid = teacher_grid(60, **GRID)
    image = ancestral(denoiser, noise, grid, clip=False)
    assert image.std().item() == pytest.approx(0.3, rel=0.15)  # its Euler steps are first order
    assert noise.asked == list(range(60))  # the last step, to 0, adds none
    x = grid[0] * noise.fields[0].double()
    for step, (hi, lo) in enumerate(zip(grid, grid[1:], strict=False)):
        up = math.sqrt(lo**2 * (hi**2 - lo**2) / hi**2)
        x = x + (math.sqrt(lo**2 - up**2) - hi) * (x - 0.09 / (hi**2 + 0.09) * x) / hi
        x = x + up * noise.fields[min(step + 1, 60)].double()
    torch.testing.assert_close(image, x.float(), rtol=1e-4, atol=1e-4)


def test_calls_of_the_network_per_step():
    for sampler, nfe in ((euler, 5), (heun, 9), (dpm, 10), (ancestral, 5)):
        denoiser, calls = gaussian_teacher("edm"), []
        sampler(lambda x, s, labels, d=denoiser, c=calls: c.append(0) or d(x, s, labels), given(6), teacher_grid(5, **GRID))
        assert len(calls) == nfe, sampler.__name__


def test_unknown_sampler_is_named():
    with pytest.raises(InputError, match="--sampler: huen.*Did you mean 'heun'"):
        teacher_sampler("huen")
