"""Self-consistency against the Gaussian world, where both the teacher's ODE and the consistency function are exact."""

import pytest
import torch
from analytic import consistency_gain, gaussian_consistency, gaussian_teacher

from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.consistency.noise_schedule import karras_grid
from fastcm.errors import InputError
from fastcm.evaluation.self_consistency import distances_along_paths, self_consistency
from fastcm.generation.sampler import SeedNoise

IMAGES = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5


def test_the_exact_function_does_not_move_along_the_exact_ode():
    """What is left is Heun's error, which falls with its square, and a diffusion denoiser, which is no consistency function, moves."""
    exact, teacher = gaussian_consistency(), gaussian_teacher("edm")
    errors = [self_consistency(exact, IMAGES, labels=None, seed=3, levels=levels, teacher=teacher) * (levels - 1) for levels in (8, 15, 29)]
    assert errors[0] < 0.02 and errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5
    moved = self_consistency(gaussian_teacher("edm"), IMAGES, labels=None, seed=3, teacher=teacher)
    assert moved * 7 > 30 * errors[0]


def test_along_data_paths_it_is_the_closed_form():
    denoiser, levels = gaussian_consistency(), 5
    found = distances_along_paths(denoiser, IMAGES, labels=None, seed=11, levels=levels)
    z = SeedNoise(torch.arange(11, 17), (1, 4, 4)).normal(0)
    sigmas = karras_grid(levels, sigma_min=0.002, sigma_max=80.0, rho=7.0)
    f = [consistency_gain(sigma, 0.5, 0.002) * (IMAGES.double() + sigma * z) for sigma in sigmas]
    expected = torch.stack([(a - b).square().mean((1, 2, 3)).sqrt() for a, b in zip(f, f[1:], strict=False)], dim=1)
    assert found.shape == (6, 4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert self_consistency(denoiser, IMAGES, labels=None, seed=11, levels=levels) == pytest.approx(expected.mean().item(), rel=1e-3)


def test_bytes_are_images_and_the_seed_and_the_labels_matter():
    denoiser = gaussian_consistency(class_shift=0.1)
    images = (torch.arange(32).view(2, 1, 4, 4) * 8).to(torch.uint8)
    labels = torch.tensor([0, 3])
    one = self_consistency(denoiser, images, labels=labels, seed=0)
    assert one == self_consistency(denoiser, images.float() / 127.5 - 1, labels=labels, seed=0)
    assert one != self_consistency(denoiser, images, labels=labels, seed=1)
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, c_noise, labels=None):
            seen.append(labels)
            return x

    self_consistency(Denoiser(Spy(), Preconditioning()), images, labels=labels, seed=0)
    assert len(seen) == 8 and all(torch.equal(given, labels) for given in seen)


def test_dropout_is_off_and_the_mode_comes_back():
    class Dropping(torch.nn.Module):
        def forward(self, x, c_noise, labels=None):
            return torch.nn.functional.dropout(x, 0.9, self.training)

    denoiser = Denoiser(Dropping(), Preconditioning()).train()
    values = {self_consistency(denoiser, IMAGES, labels=None, seed=0) for _ in range(3)}
    assert len(values) == 1 and denoiser.training and denoiser.network.training


def test_one_level_is_no_path():
    with pytest.raises(InputError, match="too few noise levels in levels: 1"):
        self_consistency(gaussian_consistency(), IMAGES, labels=None, seed=0, levels=1)
