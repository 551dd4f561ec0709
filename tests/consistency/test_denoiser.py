"""Preconditioning: EDM Table 1, the boundary form's identity at sigma_min, and settings that cannot be meant."""

import pytest
import torch
from torch import nn

from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError


class Scaled(nn.Module):
    """F whose output is far from zero, so that an identity cannot come from a silent network."""

    def forward(self, x, c_noise, labels=None):
        return 3 * x + torch.sin(c_noise).view(-1, 1, 1, 1) + 1


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 7.0, 80.0])
def test_edm_form_is_table_1(sigma):
    c = Preconditioning(form="edm").coefficients(torch.tensor([sigma]))
    s, d = torch.tensor(sigma, dtype=torch.float64), 0.5
    expected = (d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt(), 1 / (s**2 + d**2).sqrt(), 1000 * s.log() / 4)
    for got, want in zip(c, expected, strict=True):
        assert got.double().item() == pytest.approx(want.item(), rel=2e-6)


def test_boundary_form_shifts_sigma_in_skip_and_out_alone():
    p, e = Preconditioning(), Preconditioning(form="edm")
    sigma = torch.tensor([0.002, 0.05, 2.0, 80.0])
    boundary, edm, shifted = p.coefficients(sigma), e.coefficients(sigma), e.coefficients(sigma - 0.002 + 1e-12)
    assert torch.equal(boundary.c_in, edm.c_in) and torch.equal(boundary.c_noise, edm.c_noise)
    torch.testing.assert_close(boundary.c_skip, shifted.c_skip)
    torch.testing.assert_close(boundary.c_out[1:], ((sigma - 0.002) * 0.5 / (sigma**2 + 0.25).sqrt())[1:])


def test_denoiser_is_the_identity_at_sigma_min():
    x = torch.randn(4, 3, 5, 5) * 2
    sigma_min = torch.full((4,), 0.002)
    assert torch.equal(Denoiser(Scaled(), Preconditioning())(x, sigma_min), x)
    assert not torch.allclose(Denoiser(Scaled(), Preconditioning(form="edm"))(x, sigma_min), x, atol=1e-4)


def test_denoiser_mixes_skip_and_network():
    p = Preconditioning()
    x, sigma = torch.randn(3, 1, 4, 4), torch.tensor([0.3, 1.0, 40.0])
    c = p.coefficients(sigma)
    F_x = Scaled()(c.c_in.view(-1, 1, 1, 1) * x, c.c_noise)
    expected = c.c_skip.view(-1, 1, 1, 1) * x + c.c_out.view(-1, 1, 1, 1) * F_x
    torch.testing.assert_close(Denoiser(Scaled(), p)(x, sigma), expected)


def test_song_networks_see_a_quarter_of_ln_sigma():
    sigma = torch.tensor([0.5, 80.0])
    torch.testing.assert_close(Preconditioning(c_noise="ln sigma / 4").coefficients(sigma).c_noise, sigma.log() / 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sigma_min": 80.0}, "noise.sigma_min: 80.0"),
        ({"sigma_min": 0.0}, "noise.sigma_min: 0.0"),
        ({"sigma_max": float("nan")}, "noise.sigma_max: nan"),
        ({"form": "edn"}, "Did you mean 'edm'"),
        ({"c_noise": "ln sigma"}, "noise.c_noise"),
    ],
)
def test_settings_that_cannot_be_meant(fields, words):
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        Preconditioning(**fields)


def test_trigflow_is_the_edm_form_with_the_sign_of_F_changed():
    p = Preconditioning(form="edm", c_noise="arctan(sigma / sigma_data)")
    sigma, x = torch.tensor([0.01, 0.5, 80.0]), torch.randn(3, 1, 4, 4)
    t = torch.atan(sigma.double() / 0.5)
    cos, sin = (f(t).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    x_t = cos * x.double()
    expected = cos * x_t - sin * 0.5 * -Scaled()(x_t / 0.5, t)
    torch.testing.assert_close(Denoiser(Scaled(), p)(x, sigma).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("c_noise", ["250 ln sigma", "ln sigma / 4", "arctan(sigma / sigma_data)"])
def test_the_rate_of_c_noise_is_its_derivative_in_ln_sigma(c_noise):
    p = Preconditioning(form="edm", c_noise=c_noise)
    sigma = torch.tensor([0.01, 0.5, 80.0])
    above, below = (p.coefficients(sigma * factor).c_noise.double() for factor in (1.01, 1 / 1.01))
    expected = (above - below) / (2 * torch.tensor(1.01).double().log())
    torch.testing.assert_close(p.c_noise_rate(sigma).double(), expected, rtol=1e-3, atol=1e-6)


def test_the_edm_form_is_the_identity_at_zero():
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(Denoiser(Scaled(), Preconditioning(form="edm"))(x, torch.zeros(2)), x)
