"""Euler and Heun steps against the Gaussian world's exact ODE solution: values and orders of convergence."""

import math

import pytest
import torch
from analytic import gaussian_teacher, ode_gain

from fastcm.consistency.noise_schedule import karras_grid
from fastcm.consistency.solver import euler_step, heun_step, solver_step
from fastcm.errors import InputError


def solve(step, steps, data_std=0.3):
    """The relative error at sigma_min of `steps` intervals of the Karras grid, in float64."""
    teacher = gaussian_teacher("edm", data_std=data_std)
    grid = karras_grid(steps + 1, sigma_min=0.002, sigma_max=80.0, rho=7.0)

    def denoise(x, sigma, labels):
        return teacher.network.gain(sigma).view(-1, 1, 1, 1) * x

    x = torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    for hi, lo in zip(grid[:-1], grid[1:], strict=True):
        x = step(denoise, x, hi.view(1), lo.view(1))
    return abs(x.item() / (80.0 * ode_gain(80.0, 0.002, data_std)) - 1)


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2)])
def test_order_of_convergence(step, order):
    coarse, fine = solve(step, 64), solve(step, 128)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert fine < (0.1 if order == 1 else 0.003)


def test_steps_run_through_the_denoiser():
    teacher = gaussian_teacher("edm", data_std=0.3)
    x, hi, lo = torch.randn(6, 2, 3, 3), torch.full((6,), 1.0), torch.full((6,), 0.9)
    exact = x * ode_gain(1.0, 0.9, 0.3)
    assert (heun_step(teacher, x, hi, lo) - exact).abs().max() < 0.2 * (euler_step(teacher, x, hi, lo) - exact).abs().max()


def test_levels_differ_per_sample():
    teacher = gaussian_teacher("edm", data_std=0.3)
    x, hi, lo = torch.randn(2, 1, 2, 2), torch.tensor([5.0, 1.0]), torch.tensor([4.0, 0.5])
    both = heun_step(teacher, x, hi, lo)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], heun_step(teacher, x[i : i + 1], hi[i : i + 1], lo[i : i + 1]))


def test_unknown_solver():
    with pytest.raises(InputError, match="Did you mean 'heun'"):
        solver_step("huen")
