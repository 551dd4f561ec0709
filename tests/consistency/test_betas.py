"""Chains of betas: diffusers' own products, EDM's formulas of the same chains, and the step of a noise level."""

import math

import pytest
import torch

from fastcm.consistency.betas import Betas

SCHEDULES = [
    {"schedule": "linear"},
    {"schedule": "linear", "start": 0.001, "end": 0.05, "steps": 400},
    {"schedule": "scaled_linear", "start": 0.00085, "end": 0.012},
    {"schedule": "squaredcos_cap_v2"},
    {"schedule": "trained_betas", "trained": tuple(0.001 * (i + 1) for i in range(50)), "steps": 50},
    {"schedule": "linear", "zero_snr": True},
]


@pytest.mark.parametrize("fields", SCHEDULES, ids=lambda fields: "-".join(str(v) for v in fields.values())[:40])
@pytest.mark.slow
def test_levels_are_those_of_diffusers(fields):
    from diffusers import DDIMScheduler

    betas = Betas(**fields)
    theirs = DDIMScheduler(
        num_train_timesteps=betas.steps,
        beta_start=betas.start,
        beta_end=betas.end,
        beta_schedule="linear" if betas.trained else betas.schedule,
        trained_betas=betas.trained and list(betas.trained),
        rescale_betas_zero_snr=betas.zero_snr,
    ).alphas_cumprod.double()
    levels = betas.levels()
    assert len(levels) == betas.steps - betas.zero_snr
    torch.testing.assert_close(1 / (1 + levels.square()), theirs[: len(levels)], rtol=3e-4, atol=1e-7)
    assert (levels.diff() > 0).all() and levels.isfinite().all()


def test_the_linear_chain_ends_at_157():
    assert Betas().sigma_range == pytest.approx((0.01, 157.4), rel=1e-2)


def test_the_cosine_chain_is_edms_table_of_iddpm():
    # Karras et al. 2022, Table 1: u_{j-1} = sqrt((u_j^2 + 1) / max(a_{j-1} / a_j, C_1) - 1), c_noise = M - 1 - j,
    # a_j = sin^2(pi/2 j / (M (C_2 + 1))).
    M, C_1, C_2 = 1000, 0.001, 0.008
    u = [0.0]
    for j in range(M, 0, -1):
        a = [math.sin(math.pi / 2 * i / (M * (C_2 + 1))) ** 2 for i in (j - 1, j)]
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(a[0] / a[1], C_1) - 1))
    betas = Betas(schedule="squaredcos_cap_v2")
    torch.testing.assert_close(betas.levels(), torch.tensor(u[:-1][::-1], dtype=torch.float64), rtol=1e-6, atol=0)
    for sigma in (0.3, 2.0, 71.0):
        j = min(range(M + 1), key=lambda j: abs(u[j] - sigma))
        assert betas.step(torch.tensor([sigma]), whole=True).item() == M - 1 - j


def test_the_continuous_chain_is_edms_vp():
    # Karras et al. 2022, Table 1, VP with beta_d = 19.9, beta_min = 0.1, M = 1000.
    betas = Betas(schedule="continuous", start=0.1, end=20.0)
    sigma = torch.tensor([0.01, 0.5, 9.0, 150.0], dtype=torch.float64)
    t = ((0.1**2 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
    torch.testing.assert_close(betas.step(sigma.float(), whole=False).double(), 999 * t, rtol=1e-5, atol=1e-4)
    assert betas.sigma_range[1] == pytest.approx(math.sqrt(math.exp(0.5 * 19.9 + 0.1) - 1))


@pytest.mark.parametrize("fields", [SCHEDULES[0], SCHEDULES[3], {"schedule": "linear", "steps": 4000, "end": 0.005, "scale": 0.25}])
def test_the_step_of_a_level_is_its_index(fields):
    betas = Betas(**fields)
    levels = betas.levels()
    index = torch.tensor([0, 1, 17, 500, len(levels) - 1])
    for whole in (False, True):
        step = betas.step(levels[index].float(), whole=whole)
        torch.testing.assert_close(step.double(), index.double() * betas.scale, rtol=1e-6, atol=2e-4)
    between = betas.step((levels[17] * levels[18]).sqrt().float()[None], whole=False)
    assert between.item() == pytest.approx(17.5 * betas.scale, abs=1e-3)
    near = betas.step((0.9 * levels[17] + 0.1 * levels[18]).float()[None], whole=True)
    assert near.item() == 17 * betas.scale
    ends = betas.step(torch.tensor([0.0, 1e6]), whole=False).tolist()
    assert ends == [0.0, pytest.approx((len(levels) - 1) * betas.scale)]


@pytest.mark.parametrize("fields", [{}, {"schedule": "continuous", "start": 0.1, "end": 20.0}])
def test_the_rate_of_the_step_is_its_derivative(fields):
    betas = Betas(**fields)
    sigma = torch.tensor([0.05, 1.0, 60.0])
    above, below = (betas.step(sigma * factor, whole=False).double() for factor in (1.0005, 1 / 1.0005))
    torch.testing.assert_close(betas.rate(sigma).double(), (above - below) / (2 * math.log(1.0005)), rtol=2e-2, atol=0)
