"""Truncated consistency training: levels, counts, value and gradient against scipy and float64; at sigma_min it is the plain loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic import GainNetwork, consistency_gain, gaussian_consistency
from test_noise_schedule import GRID, quantiles
from test_objective import DATA_STD, Affine, gaussian_batch

from fastcm import kernels, presets
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.consistency.noise_schedule import TruncatedStudentT, ect_pair, log_normal_pair, sampling_sigmas
from fastcm.consistency.objective import consistency_loss, loss_weight
from fastcm.errors import InputError
from fastcm.generation.request import noise_levels
from fastcm.training.schedule import truncated_pair

RANGE = {"low": 1.0, "high": 80.0}
TCM = Preconditioning(form="edm", c_noise="ln sigma / 4", transition=1.0)


@pytest.mark.parametrize(
    ("nu", "P_mean", "P_std"), [(0.01, 0.0, 0.2), (2.0, 0.3, 1.0), (1e4, 1.5, 0.8), (1e4, -40.0, 0.2)], ids=["paper", "2", "normal", "far"]
)
@pytest.mark.slow
def test_levels_are_students_truncated(nu, P_mean, P_std):
    u = quantiles(2000)
    sigma = TruncatedStudentT(nu=nu, P_mean=P_mean, P_std=P_std, **RANGE)(u)
    assert sigma.dtype == torch.float32 and sigma.min() >= 1 and sigma.max() <= 80 and bool((sigma.diff() >= 0).all())
    if P_mean > -1:  # where scipy's own differences of the distribution function are still numbers
        from scipy import stats

        ends = [stats.t.sf((math.log(s) - P_mean) / P_std, nu) for s in (1.0, 80.0)]
        expected = np.exp(P_mean + P_std * stats.t.isf(ends[0] + u.numpy() * (ends[1] - ends[0]), nu))
        np.testing.assert_allclose(sigma.numpy(), expected, rtol=2e-5)


def test_the_ends_are_reached_and_not_passed():
    levels = TruncatedStudentT(nu=0.01, P_mean=0.0, P_std=0.2, **RANGE)
    assert levels(torch.tensor([0.0, 1.0])).tolist() == [1.0, 80.0]


def config_of(**objective):
    config = presets.preset("digits", method="tcm")
    return replace(config, objective=replace(config.objective, **objective))


def test_a_share_of_the_pairs_begins_at_the_transition():
    """The mean of counts times a loss is the mean over the others and tcm_weight times that over the boundary."""
    config, u = config_of(tcm_share=0.25, tcm_weight=0.1, ect_q=256.0), quantiles(4000).float()
    levels = TruncatedStudentT(nu=0.01, P_mean=0.0, P_std=0.2, **RANGE)
    hi, lo, counts = truncated_pair(config, levels, u, 0)
    boundary = u < 0.25
    assert bool((hi[boundary] == 1).all()) and bool((hi[~boundary] >= 1).all()) and bool((lo < hi).all())
    torch.testing.assert_close(hi[~boundary], levels(quantiles(3000)), rtol=1e-4, atol=0)
    torch.testing.assert_close(lo, hi * (1 - (1 + 8 / (1 + hi.exp())) / 256), rtol=1e-6, atol=0)
    loss = torch.rand(4000)
    torch.testing.assert_close((counts * loss).mean(), loss[~boundary].mean() + 0.1 * loss[boundary].mean(), rtol=1e-5, atol=0)
    assert bool((truncated_pair(config_of(tcm_share=0.0), levels, u, 0)[2] == 1).all())


def test_value_and_gradient_in_float64_with_the_exact_first_stage():
    """Below the transition the target is f(x, r) = gain(r) x of the Gaussian world, above it the student's own D-."""
    student, batch = Denoiser(Affine(), TCM), gaussian_batch(4)
    first = gaussian_consistency("edm", data_std=DATA_STD).requires_grad_(False)
    hi, lo = torch.tensor([1.0, 1.3, 1.3, 5.0]), torch.tensor([0.9, 0.99, 1.0, 2.0])
    weight = loss_weight("1/gap", hi, lo, sigma_data=0.5)
    loss = consistency_loss(student, student, batch, hi, lo, weight=weight, distance="pseudo_huber", huber_c=0.03, first_stage=first)
    got = torch.autograd.grad(loss.sum(), [student.network.a, student.network.b])
    a, b = (torch.tensor(q.item(), dtype=torch.float64, requires_grad=True) for q in (student.network.a, student.network.b))
    z = kernels.normal(batch.seed, batch.position, batch.images.shape[1:], stream=0).double()

    def x(sigma):
        return batch.images.double() + sigma.double().view(-1, 1, 1, 1) * z

    def D(sigma):
        s = sigma.double().view(-1, 1, 1, 1)
        return 0.25 / (s**2 + 0.25) * x(sigma) + s * 0.5 / (s**2 + 0.25) * (a + b * s.log() / 4) * x(sigma)

    gain = ((0.002**2 + DATA_STD**2) / (lo.double() ** 2 + DATA_STD**2)).sqrt().view(-1, 1, 1, 1)
    target = torch.where((lo < 1).view(-1, 1, 1, 1), gain * x(lo), D(lo).detach())
    expected = (((D(hi) - target).square().sum((1, 2, 3)) + 0.03**2).sqrt() - 0.03) / (hi - lo).double()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    for one, other in zip(got, torch.autograd.grad(expected.sum(), [a, b]), strict=True):
        assert abs(other) > 0.1 and one.item() == pytest.approx(other.item(), rel=1e-3)


@pytest.mark.parametrize("pairs", ["ict", "ect"])
def test_with_its_transition_at_sigma_min_it_is_the_plain_loss_to_the_bit(pairs):
    noise = Preconditioning(form="edm" if pairs == "ect" else "boundary", c_noise="ln sigma / 4")
    P = {"P_mean": 0.6, "P_std": 2.0}
    u = quantiles(16)
    hi, lo = log_normal_pair(u, 18, **GRID, **P) if pairs == "ict" else ect_pair(u, 7, **P, q=2.0, k=8.0, b=1.0)
    assert lo.min() >= 0.002
    first, batch = gaussian_consistency("edm"), gaussian_batch(16)
    found = []
    for options in ({}, {"first_stage": first}):
        student = Denoiser(Affine(), replace(noise, transition=0.002) if options else noise)
        loss = consistency_loss(student, student, batch, hi, lo, weight=torch.ones(16), distance="pseudo_huber", huber_c=0.03, **options)
        found.append((loss, *torch.autograd.grad(loss.sum(), list(student.network.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_levels_below_the_transition_are_refused():
    assert sampling_sigmas(2, **GRID, transition=1.0) == noise_levels(2, None, TCM, {}) == (80.0, pytest.approx(1.0))
    assert noise_levels(1, None, TCM, {}) == (80.0,)
    with pytest.raises(InputError, match=r"noise level out of range in sigmas: 0\.8\. The model was trained from 1 to 80\."):
        noise_levels(None, (80.0, 0.8), TCM, {})
    with pytest.raises(InputError, match=r"noise\.transition: 80"):
        Preconditioning(transition=80.0)


@pytest.mark.slow
def test_a_tiny_second_stage_converges_to_the_exact_consistency_function():
    """From an exact first stage below sigma 1, on levels from 1 up alone: the gain of f at 1, 5 and 80, which is off by 1 at first."""
    torch.manual_seed(0)
    student = Denoiser(GainNetwork(TCM), TCM)
    first, config = gaussian_consistency("edm", data_std=DATA_STD, c_noise="ln sigma / 4"), config_of(ect_q=16.0)
    levels = TruncatedStudentT(nu=1e4, P_mean=1.5, P_std=1.5, **RANGE)
    optimizer, generator = torch.optim.RAdam(student.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for k in range(800):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / 800)
        hi, lo, counts = truncated_pair(config, levels, torch.rand(256, generator=generator), 0)
        loss = consistency_loss(
            student, student, gaussian_batch(256, nimg=k * 256), hi, lo, weight=counts, distance="l2", first_stage=first
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    sigma = torch.tensor([1.0, 5.0, 80.0])
    gain = student(torch.ones(3, 1, 1, 1), sigma).flatten()
    error = (gain - consistency_gain(sigma, DATA_STD, 0.002)).abs() * (sigma**2 + DATA_STD**2).sqrt() / DATA_STD
    assert error.max().item() < 0.25, error
