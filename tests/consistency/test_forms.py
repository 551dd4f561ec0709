"""What other people's diffusion networks predict: each form's scalings, its boundary, and the Gaussian world in every form."""

import pytest
import torch
from analytic import GaussianNetwork, consistency_gain, exact_scalings, gaussian_consistency, gaussian_teacher
from test_denoiser import Scaled
from test_objective import gaussian_batch

from fastcm.consistency.betas import Betas
from fastcm.consistency.denoiser import BASES, BOUNDARY_FORMS, FORMS, Denoiser, Preconditioning, expand
from fastcm.consistency.objective import consistency_loss, continuous_loss, edm_loss
from fastcm.consistency.solver import euler_step, heun_step
from fastcm.consistency.tangent import network_tangent
from fastcm.errors import InputError
from fastcm.training.method_loss import bind_teacher

CHAIN = Betas()
DATA_STD = 0.4


def noise_of(form: str) -> dict:
    """The fields of a form's usual preconditioning."""
    base = next(base for base in BASES if form in (base, BOUNDARY_FORMS[base]))
    if base == "edm":
        return {"form": form, "c_noise": "ln sigma / 4"}
    if base == "flow":
        return {"form": form, "c_noise": "sigma / (1 + sigma)"}
    if base == "ve":
        return {"form": form, "c_noise": "ln(sigma / 2)", "sigma_min": 0.02, "sigma_max": 100.0}
    low, high = CHAIN.sigma_range
    return {"form": form, "c_noise": "interpolated step", "betas": CHAIN, "sigma_min": low, "sigma_max": high}


@pytest.mark.parametrize("form", FORMS)
def test_the_scalings_undo_the_chain(form):
    p = Preconditioning(**noise_of(form))
    sigma = torch.tensor([p.sigma_min, 0.05, 0.7, 5.0, p.sigma_max])
    got = p.coefficients(sigma)
    for name, have, want in zip(("c_skip", "c_out", "c_in"), got, exact_scalings(p, sigma.double()), strict=False):
        torch.testing.assert_close(have.double(), want, rtol=2e-5, atol=1e-6, msg=name)


def test_what_each_form_predicts_gives_the_image_back():
    # from the definitions: x = image + sigma noise, the chain's own x is x / sqrt(1 + sigma^2).
    image, noise = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    sigma = torch.tensor([0.02, 0.5, 3.0, 90.0])
    a = expand((1 + sigma.square()).rsqrt(), image)
    b = expand(sigma, image) * a
    predictions = {"epsilon": noise, "v": a * noise - b * image, "sample": image, "ve": -noise, "flow": noise - image}
    for form, prediction in predictions.items():
        seen = {}

        class Told(torch.nn.Module):
            def forward(self, x, c_noise, labels=None, prediction=prediction, seen=seen):
                seen["x"] = x
                return prediction

        x = image + expand(sigma, image) * noise
        D = Denoiser(Told(), Preconditioning(**noise_of(form)))(x, sigma)
        torch.testing.assert_close(D, image, rtol=0, atol=3e-5, msg=form)
        own = {"ve": x, "flow": x / expand(1 + sigma, x)}.get(form, a * image + b * noise)
        torch.testing.assert_close(seen["x"], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [form for form in FORMS if form in BOUNDARY_FORMS.values()])
def test_boundary_forms_are_the_identity_at_sigma_min_and_below(form):
    p = Preconditioning(**noise_of(form))
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(Denoiser(Scaled(), p)(x, torch.full((2,), p.sigma_min)), x)
    assert torch.equal(Denoiser(Scaled(), p)(x, torch.zeros(2)), x)
    assert not torch.allclose(Denoiser(Scaled(), p)(x, torch.full((2,), 1.5 * p.sigma_min)), x, atol=1e-4)


@pytest.mark.parametrize("base", ["epsilon", "v", "sample", "ve", "flow"])
def test_the_boundary_mixes_x_with_the_denoised_image(base):
    inner, outer = (Preconditioning(**noise_of(form)) for form in (base, BOUNDARY_FORMS[base]))
    x, sigma = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 0.5, 20.0])
    s = sigma - outer.sigma_min
    m, n = 0.25 / (s.square() + 0.25), s / (sigma.square() + 0.25).sqrt()
    expected = expand(m, x) * x + expand(n, x) * Denoiser(Scaled(), inner)(x, sigma)
    torch.testing.assert_close(Denoiser(Scaled(), outer)(x, sigma), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_the_exact_consistency_function_is_the_fixed_point_of_distillation(base):
    noise = noise_of(base)
    teacher = gaussian_teacher(data_std=DATA_STD, **noise)
    exact = gaussian_consistency(data_std=DATA_STD, **{**noise, "form": BOUNDARY_FORMS[base]})
    sigma_hi, sigma_lo = torch.tensor([0.6, 2.0, 30.0, 0.1]), torch.tensor([0.59, 1.96, 27.0, 0.098])
    batch = gaussian_batch(4)
    options = {"weight": torch.ones(4), "distance": "l2"}
    losses = {}
    for name, student in (("exact", exact), ("denoiser", teacher_in(base, noise))):
        step = bind_teacher(teacher, "heun")
        losses[name] = consistency_loss(student, student, batch, sigma_hi, sigma_lo, teacher_step=step, **options)
    assert (losses["exact"] < 3e-3 * losses["denoiser"]).all(), losses


def teacher_in(base: str, noise: dict) -> Denoiser:
    """The denoiser in the place of the consistency function: what distillation starts from, and does not stop at."""
    p = Preconditioning(**{**noise, "form": BOUNDARY_FORMS[base]})
    return Denoiser(GaussianNetwork(p, "denoiser", data_std=DATA_STD), p)


@pytest.mark.parametrize("base", BASES)
def test_the_solver_follows_the_trajectory_in_every_form(base):
    teacher = gaussian_teacher(data_std=DATA_STD, **noise_of(base))
    x = torch.full((1, 1, 2, 2), 1.0)
    levels = torch.linspace(2.0, 1.0, 41)
    for hi, lo in zip(levels, levels[1:], strict=False):
        x = heun_step(teacher, x, hi[None], lo[None])
    expected = ((1 + DATA_STD**2) / (4 + DATA_STD**2)) ** 0.5
    assert x.mean().item() == pytest.approx(expected, rel=1e-4)
    assert euler_step(teacher, torch.ones(1, 1, 2, 2), levels[:1], levels[-1:]).mean().item() != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("base", ["epsilon", "v", "ve", "flow"])
def test_continuous_distillation_has_its_zero_there_too(base):
    noise = {**noise_of(base), "c_noise": "ln sigma / 4", "betas": None}  # smooth in sigma, so that the derivative is exact
    teacher, batch = gaussian_teacher(data_std=DATA_STD, **noise), gaussian_batch(3)
    sigma, losses = torch.tensor([0.1, 1.0, 20.0]), {}
    for answer in ("consistency", "denoiser"):
        network = GaussianNetwork(Preconditioning(**noise), answer, data_std=DATA_STD)
        if answer == "consistency":  # of the unshifted form: the identity at 0
            network.gain = lambda sigma: consistency_gain(sigma, DATA_STD, 0.0)
        tangent = network_tangent(network, "jvp")
        student = Denoiser(network, Preconditioning(**noise))
        losses[answer] = continuous_loss(student, batch, sigma, tangent=tangent, warmup=1.0, teacher=teacher)
    assert losses["consistency"].max() < 1e-3 * losses["denoiser"].min(), losses


def test_denoising_losses_are_those_of_the_papers():
    # 1 / c_out^2 makes the loss one of F itself: |F - noise|^2 for epsilon, |F - image|^2 for sample.
    batch, sigma = gaussian_batch(3), torch.tensor([0.1, 1.0, 30.0])
    for form in ("epsilon", "v", "sample", "ve", "flow"):
        p = Preconditioning(**noise_of(form))
        exact = Denoiser(GaussianNetwork(p, "denoiser", data_std=DATA_STD), p)
        noisy = Denoiser(Scaled(), p)
        assert (edm_loss(exact, batch, sigma) < edm_loss(noisy, batch, sigma)).all()


def test_the_edm_form_of_a_network_is_the_same_denoiser():
    for base in BASES:
        p = Preconditioning(**noise_of(base))
        sigma, x, F = torch.tensor([0.05, 1.0, 50.0]), torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
        A, B = p.in_form("edm", sigma)
        edm = Preconditioning(form="edm").coefficients(sigma)
        own = p.coefficients(sigma)
        want = expand(own.c_skip, x) * x + expand(own.c_out, x) * F
        got = expand(edm.c_skip, x) * x + expand(edm.c_out, x) * (expand(A, x) * x + expand(B, x) * F)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    A, B = Preconditioning(form="edm").in_form("edm", sigma)
    assert torch.equal(A, torch.zeros(3)) and torch.equal(B, torch.ones(3))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"c_noise": "interpolated step"}, "noise.c_noise: interpolated step"),
        ({"betas": CHAIN}, "noise.c_noise: 250 ln sigma"),
        ({"betas": {"schedule": "linaer"}, "c_noise": "nearest step"}, "Did you mean 'linear'"),
        ({"betas": {"width": 3}, "c_noise": "nearest step"}, "noise.betas"),
        ({"betas": 3, "c_noise": "nearest step"}, "noise.betas: 3"),
        ({"betas": {"steps": 1}, "c_noise": "nearest step"}, "noise.betas.steps: 1"),
        ({"betas": {"end": 1.5}, "c_noise": "nearest step"}, "outside 0 to 1"),
        ({"betas": {"schedule": "trained_betas", "trained": [0.1, 0.2], "steps": 3}, "c_noise": "nearest step"}, "noise.betas.steps: 3"),
        ({"betas": CHAIN, "c_noise": "nearest step", "sigma_max": 200.0}, "noise.sigma_max: 200.0"),
    ],
)
def test_chains_that_cannot_be_meant(fields, words):
    with pytest.raises(InputError) as error:
        Preconditioning(**{"form": "epsilon", **fields})
    assert words in str(error.value)
