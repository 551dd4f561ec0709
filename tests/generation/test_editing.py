"""Zero-shot editing: the equations, and what stays untouched."""

import math

import numpy as np
import pytest
import torch
from analytic import gaussian_consistency
from test_generator import SMALL, randomised

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.generation import editing
from fastcm.generation.generator import Generator
from fastcm.generation.sampler import GivenNoise, SeedNoise

# The orthogonal matrix of the Consistency Models code for colourisation; its first column is the luminance direction.
Q = torch.tensor([[0.4471, -0.8204, 0.3563], [0.8780, 0.4785, 0.0], [0.1705, -0.3129, -0.9343]])
FEW = (80.0, 5.0, 0.5)


def colour_denoiser(seed=0, **options):
    options = {**SMALL, "in_channels": 3, "out_channels": 3, "num_classes": 3, **options}
    return Denoiser(randomised(networks.build("adm", options), seed), Preconditioning())


@pytest.fixture(scope="module")
def colour():
    return Generator(colour_denoiser(), {"classes": ["ant", "bee", "cat"]}, device="cpu")


def picture(channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, channels), dtype=np.uint8)


def fields(steps, batch=2, channels=3):
    return torch.randn(steps, batch, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("project", [editing.luminance, editing.patch_means(4), editing.outside(torch.eye(8).bool()[None, None])])
def test_projections_are_orthogonal_projections(project):
    x, y = fields(2)
    torch.testing.assert_close(project(project(x)), project(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((project(x) * (y - project(y))).sum(), torch.tensor(0.0), rtol=0, atol=1e-4)
    assert 0.02 < project(x).square().sum() / x.square().sum() < 0.98  # neither nothing nor everything


def test_luminance_is_the_first_column_of_the_published_basis():
    image = fields(1)[0]
    coefficients = torch.einsum("cd,bchw->bdhw", Q, image)  # Q^T in the basis of the paper
    coefficients[:, 1:] = 0
    expected = torch.einsum("cd,bdhw->bchw", Q, coefficients)
    torch.testing.assert_close(editing.luminance(image), expected, rtol=0, atol=1e-3)  # Q has four decimals


def test_the_published_basis_is_orthogonal_and_begins_with_the_luminance():
    """Its first column is the luminance direction, the rest what a QR decomposition of [luminance, e2, e3] makes of it (2303.01469, D)."""
    torch.testing.assert_close(Q @ Q.T, torch.eye(3), rtol=0, atol=2e-4)  # Q has four decimals
    columns = torch.eye(3, dtype=torch.float64)
    columns[:, 0] = torch.tensor(editing.LUMINANCE, dtype=torch.float64)
    exact, _ = torch.linalg.qr(columns)
    exact = exact * torch.sign(exact[0] * Q[0].double()).where(Q[0] != 0, torch.sign(exact[2] * Q[2].double()))
    torch.testing.assert_close(exact.float(), Q, rtol=0, atol=1e-4)
    image = fields(1)[0]
    first = exact[:, 0].float()
    expected = torch.einsum("c,d,bdhw->bchw", first, first, image)
    torch.testing.assert_close(editing.luminance(image), expected, rtol=1e-5, atol=1e-6)


def test_patch_means_are_means_of_patches():
    image = fields(1)[0]
    means = editing.patch_means(4)(image)
    torch.testing.assert_close(means[0, 1, 4:, :4], image[0, 1, 4:, :4].mean().expand(4, 4))


def test_edit_follows_algorithm_4():
    """The published form of the inpainting mix, y (1 - Omega) + x Omega, replayed step by step."""
    denoiser, noise = gaussian_consistency(data_std=0.3), fields(3)
    mask = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    image = fields(1)[0][:1].clamp(-1, 1)
    known = image * ~mask
    result = editing.edit(denoiser, GivenNoise(noise), known, project=editing.outside(mask), sigmas=FEW, sigma_min=0.002)
    x = known + 80 * noise[0]
    for step, sigma in enumerate(FEW):
        if step:
            x = x + math.sqrt(sigma**2 - 0.002**2) * noise[step]
        D_x = denoiser(x, torch.full((2,), sigma)).clamp(-1, 1)
        x = image * ~mask + D_x * mask
    torch.testing.assert_close(result, x, rtol=1e-5, atol=1e-6)


def test_known_coefficients_are_kept():
    denoiser, noise, image = colour_denoiser(), SeedNoise(torch.arange(2), (3, 8, 8)), fields(1)[0][:1].clamp(-0.9, 0.9)
    labels = torch.tensor([0, 1])
    for project in (editing.luminance, editing.patch_means(4)):
        result = editing.edit(denoiser, noise, project(image), project=project, sigmas=FEW, sigma_min=0.002, labels=labels)
        torch.testing.assert_close(project(result), project(image).expand(2, -1, -1, -1), rtol=0, atol=1e-5)
        assert (result - image).abs().max() > 0.1 and (result[0] - result[1]).abs().max() > 0.05


def test_the_default_levels_are_the_grid_of_forty():
    sigmas = editing.edit_sigmas(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    assert len(sigmas) == 39 and sigmas[0] == pytest.approx(80) and sigmas[-1] > 0.002


def test_inpainting_leaves_known_pixels_untouched(colour):
    image = np.arange(256, dtype=np.uint8)[:192].reshape(8, 8, 3)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:7] = 128
    results = colour.inpaint(image, mask, seeds=[0, 1], labels=2, sigmas=FEW)
    assert results.shape == (2, 8, 8, 3) and results.dtype == np.uint8
    assert np.array_equal(results[:, mask < 128], np.stack([image[mask < 128]] * 2))
    assert (results[0][mask >= 128] != image[mask >= 128]).mean() > 0.5 and not np.array_equal(results[0], results[1])


def test_every_byte_comes_back(colour):
    for base in (0, 64, 128):
        image = (base + np.arange(192)).clip(0, 255).astype(np.uint8).reshape(8, 8, 3)
        mask = np.zeros((8, 8), bool)
        mask[0, 0] = True
        assert np.array_equal(colour.inpaint(image, mask, sigmas=(80.0,))[0][~mask], image[~mask])


def test_colorize_takes_grey_and_keeps_luminance(colour):
    grey = picture(1)[..., 0] // 2 + 64
    results = colour.colorize(grey, seeds=[0, 1], labels=0, sigmas=FEW, output="float")
    assert results.shape == (2, 8, 8, 3)
    known = editing.luminance(torch.from_numpy(grey / 127.5 - 1).float().expand(3, 8, 8)[None])
    kept = editing.luminance(torch.from_numpy(results).permute(0, 3, 1, 2))
    torch.testing.assert_close(kept, known.expand(2, -1, -1, -1), rtol=0, atol=1e-5)
    assert np.ptp(results, axis=-1).max() > 0.05  # there is colour


def test_superres_takes_small_and_full_size(colour):
    small = picture()[:2, :2]
    full = small.repeat(4, axis=0).repeat(4, axis=1)
    a, b = (colour.superres(image, 4, seeds=[3], labels=1, sigmas=FEW, output="float") for image in (small, full))
    assert np.array_equal(a, b) and a.shape == (1, 8, 8, 3)
    means = a.reshape(1, 2, 4, 2, 4, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(means[0], small / 127.5 - 1, atol=1e-5)


def test_progress_counts_the_calls(colour):
    seen = []
    colour.superres(picture()[:2, :2], 4, seeds=[0, 1, 2], sigmas=FEW, progress=seen.append)
    assert seen == [3, 3, 3]


def test_stroke_keeps_more_from_a_lower_level(colour):
    image = picture()
    generator = Generator(gaussian_consistency(data_std=0.5), {"resolution": 8, "channels": 3, "classes": None}, device="cpu")
    distance = [
        np.abs(generator.stroke(image, seeds=range(8), sigmas=(sigma,), output="float") - (image / 127.5 - 1)).mean()
        for sigma in (0.1, 1.0, 20.0)
    ]
    assert distance[0] < 0.2 < distance[1] < distance[2]


def test_denoise_is_one_call(colour):
    noisy = (fields(1)[0][0] * 2).permute(1, 2, 0).numpy()
    result = colour.denoise(noisy, 2.0, labels="bee", output="float")
    expected = colour.denoiser(torch.from_numpy(noisy).permute(2, 0, 1)[None], torch.tensor([2.0]), torch.tensor([1])).clamp(-1, 1)
    np.testing.assert_allclose(result, expected.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_slerp_stays_on_the_sphere():
    a, b = fields(2, batch=1)[:, 0]
    assert torch.allclose(editing.slerp(a, b, 0.0), a, atol=1e-5) and torch.allclose(editing.slerp(a, b, 1.0), b, atol=1e-5)
    cosine = (a * b).sum() / (a.norm() * b.norm())
    for fraction in (0.25, 0.5):
        middle = editing.slerp(a, b, fraction)
        angle = torch.arccos(((middle * a).sum() / (middle.norm() * a.norm())).clamp(-1, 1))
        assert angle.item() == pytest.approx(fraction * torch.arccos(cosine).item(), abs=0.05)
        assert middle.norm().item() == pytest.approx(a.norm().item(), rel=0.1)  # a straight line would give 0.71
    assert torch.allclose(editing.slerp(a, a, 0.5), a)


def test_interpolation_starts_and_ends_at_the_seeds(colour):
    frames = colour.interpolate([4, 9, -3], labels="cat", frames=5, output="float")
    np.testing.assert_allclose(frames[[0, 2, 4]], colour([4, 9, -3], "cat", output="float"), atol=1e-5)
    assert np.abs(frames[1] - frames[0]).max() > 0.01 and np.abs(frames[1] - frames[2]).max() > 0.01


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: g.inpaint(picture(), np.zeros((8, 8), np.uint8)), "an all-black mask"),
        (lambda g: g.inpaint(picture(), np.ones((4, 8), bool)), "wrong size in mask: 4x8"),
        (lambda g: g.inpaint(picture(1), np.ones((8, 8), bool)), "greyscale for a colour model in image: 8x8x1"),
        (lambda g: g.inpaint(picture()[:4], np.ones((8, 8), bool)), "wrong size in image: 4x8x3"),
        (lambda g: g.inpaint(picture().astype(int), np.ones((8, 8), bool)), "wrong type in image: int64"),
        (lambda g: g.stroke(np.full((8, 8, 3), np.nan)), "non-finite pixels in image"),
        (lambda g: g.denoise(picture(), 100.0), "noise level out of range in sigmas: 100"),
        (lambda g: g.stroke(picture(), sigmas=(0.001,)), "noise level out of range in sigmas: 0.001"),
        (lambda g: g.stroke(picture(), labels=7), "class out of range in labels: 7"),
        (lambda g: g.superres(picture(), 3), "illegal value in factor: 3"),
        (lambda g: g.interpolate([1]), "too few seeds"),
        (lambda g: g.interpolate([1, 2], frames=1), "illegal value in frames: 1"),
    ],
)
def test_bad_requests_are_named(colour, call, words):
    with pytest.raises(InputError, match=words):
        call(colour)


def test_a_grey_model_cannot_colour():
    generator = Generator(gaussian_consistency(), {"resolution": 8, "channels": 1, "classes": None}, device="cpu")
    with pytest.raises(InputError, match="a model without colours"):
        generator.colorize(picture(1))
