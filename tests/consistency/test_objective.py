"""The losses in the Gaussian world, where their values and minimisers are known, and a tiny distillation that must converge."""

import pytest
import torch
from analytic import GainNetwork, consistency_gain, gaussian_consistency, gaussian_teacher

from fastcm import kernels
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.consistency.log_weight import LogWeight
from fastcm.consistency.noise_schedule import karras_sigma, uniform_pair
from fastcm.consistency.objective import Batch, consistency_loss, edm_loss, evened, loss_weight
from fastcm.consistency.solver import euler_step, heun_step
from fastcm.errors import InputError

NOISE = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
DATA_STD = 0.3


def gaussian_batch(count, *, nimg=0, seed=3, channels=1, size=4):
    images = DATA_STD * torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed + nimg))
    return Batch(images, None, torch.tensor([seed]), nimg + torch.arange(count))


def test_edm_loss_of_the_exact_denoiser_is_the_posterior_variance():
    # E ||D - x||^2 = s^2 d^2 / (s^2 + d^2) per pixel for data of deviation d, times lambda = (s^2 + sigma_data^2) / (s sigma_data)^2.
    teacher = gaussian_teacher("edm", data_std=DATA_STD)
    for sigma in (0.05, 0.5, 5.0):
        losses = edm_loss(teacher, gaussian_batch(4000), torch.full((4000,), sigma))
        expected = sigma**2 * DATA_STD**2 / (sigma**2 + DATA_STD**2) * (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        assert losses.shape == (4000,) and losses.dtype == torch.float32
        assert losses.mean().item() == pytest.approx(expected, rel=0.03)


def distillation_loss(student, step, steps, *, count=64):
    """The mean l2 consistency loss at adjacent levels of a grid of `steps`, weighted by 1 / gap^2 so that a solver's order shows."""
    teacher = gaussian_teacher("edm", data_std=DATA_STD)
    index = torch.full((count,), 0.7 * (steps - 1), dtype=torch.float64)
    hi, lo = (karras_sigma(i, steps, **NOISE).float() for i in (index, index + 1))

    def teacher_step(*arguments):
        return step(teacher, *arguments)

    one = torch.ones(count)
    batch = gaussian_batch(count)
    return consistency_loss(student, student, batch, hi, lo, weight=one, distance="l2", teacher_step=teacher_step).mean().sqrt().item()


def test_distillation_loss_of_the_exact_consistency_function_is_the_solvers_error():
    exact = gaussian_consistency(data_std=DATA_STD)
    for step, order in ((euler_step, 2), (heun_step, 3)):  # local errors are one order above the solver's
        coarse, fine = (distillation_loss(exact, step, steps) for steps in (33, 65))
        assert 2 ** (order - 0.6) < coarse / fine < 2 ** (order + 0.9), (step.__name__, coarse / fine)
    # ... and far below the loss of a function that is not consistent.
    other = gaussian_teacher("boundary", data_std=DATA_STD)
    assert distillation_loss(exact, heun_step, 33) < 0.05 * distillation_loss(other, heun_step, 33)


def test_training_pairs_share_image_and_noise():
    # f(x, sigma) = x / sigma on both sides: the difference is image / sigma_hi - image / sigma_lo, without any noise.
    class Ratio(Denoiser):
        def coefficients(self, sigma):
            c = super().coefficients(sigma)
            return c._replace(c_skip=1 / sigma, c_out=torch.zeros_like(sigma))

    student = Ratio(GainNetwork(Preconditioning()), Preconditioning())
    batch = gaussian_batch(16)
    hi, lo = torch.full((16,), 4.0), torch.full((16,), 2.0)
    loss = consistency_loss(student, student, batch, hi, lo, weight=torch.ones(16), distance="l2")
    torch.testing.assert_close(loss, (batch.images / 4 - batch.images / 2).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_gradient_reaches_the_student_alone():
    p = Preconditioning()
    student, target = Denoiser(GainNetwork(p), p), Denoiser(GainNetwork(p), p)
    hi, lo = uniform_pair(torch.rand(8), 18, **NOISE)
    loss = consistency_loss(student, target, gaussian_batch(8), hi, lo, weight=torch.ones(8), distance="pseudo_huber", huber_c=0.01)
    loss.mean().backward()
    assert all(q.grad is not None and q.grad.abs().sum() > 0 for q in student.parameters())
    assert all(q.grad is None for q in target.parameters())


def test_gradient_equals_finite_differences():
    p = Preconditioning()
    torch.manual_seed(1)
    student = Denoiser(GainNetwork(p, width=4), p)
    hi, lo = uniform_pair(torch.linspace(0.1, 0.9, 8), 18, **NOISE)
    target = Denoiser(GainNetwork(p, width=4), p)

    def value():
        return consistency_loss(student, target, gaussian_batch(8), hi, lo, weight=torch.ones(8), distance="l2").double().mean()

    parameter = student.network.layers[2].weight
    (gradient,) = torch.autograd.grad(value(), parameter)
    delta = 1e-2
    with torch.no_grad():
        parameter[1, 2] += delta
        above = value()
        parameter[1, 2] -= 2 * delta
        below = value()
    assert gradient[1, 2].item() == pytest.approx(((above - below) / (2 * delta)).item(), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cd", "ict"])
def test_a_tiny_model_converges_to_the_exact_consistency_function(method):
    torch.manual_seed(0)
    p = Preconditioning()
    student = Denoiser(GainNetwork(p), p)
    teacher = gaussian_teacher("edm", data_std=DATA_STD)
    optimizer = torch.optim.RAdam(student.parameters(), lr=1e-2)

    def teacher_step(*arguments):
        return heun_step(teacher, *arguments)

    steps, count, generator = 18, 256, torch.Generator().manual_seed(0)
    for k in range(800):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - k / 800)
        u = torch.rand(count, generator=generator)
        hi, lo = uniform_pair(u, steps, **NOISE)
        batch = gaussian_batch(count, nimg=k * count)
        distill = {"teacher_step": teacher_step} if method == "cd" else {}
        weight = torch.ones(count)
        loss = consistency_loss(student, student, batch, hi, lo, weight=weight, distance="l2", **distill).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sigma = torch.tensor([0.05, 0.5, 5.0, 80.0])
    gain = student(torch.ones(4, 1, 1, 1), sigma).flatten()
    # in units of the image: the gain's error times the noisy image's deviation, over the data's
    error = (gain - consistency_gain(sigma, DATA_STD, 0.002)).abs() * (sigma**2 + DATA_STD**2).sqrt() / DATA_STD
    assert error.max().item() < 0.25, error  # an untrained model is off by 0.98


def test_loss_weights():
    hi, lo = torch.tensor([0.5, 2.0]), torch.tensor([0.4, 1.0])
    expected = {"uniform": [1, 1], "snr": [4, 0.25], "snr+1": [5, 1.25], "karras": [8, 4.25], "truncated-snr": [4, 1], "1/gap": [10, 1]}
    for name, values in expected.items():
        torch.testing.assert_close(loss_weight(name, hi, lo, sigma_data=0.5), torch.tensor(values, dtype=torch.float32))
    with pytest.raises(InputError, match="Did you mean 'uniform'"):
        loss_weight("unifrom", hi, lo, sigma_data=0.5)


class Affine(torch.nn.Module):
    """F = (a + b c_noise) x, which float64 can repeat."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(0.7)), torch.nn.Parameter(torch.tensor(-0.4))

    def forward(self, x, c_noise, labels=None):
        return (self.a + self.b * c_noise).view(-1, 1, 1, 1) * x


@pytest.mark.parametrize(("form", "lo"), [("edm", (0.0, 0.0, 1.5)), ("boundary", (0.3, 0.002, 1.5))], ids=["ect", "ict"])
def test_value_and_gradient_of_tuning_and_training_in_float64(form, lo):
    """sqrt(||D(x_t, t) - D-(x_r, r)||^2 + c^2) - c, over t - r; where ECT's r is 0 the target is the image itself."""
    p = Preconditioning(form=form, c_noise="ln sigma / 4")
    student, batch = Denoiser(Affine(), p), gaussian_batch(3)
    hi, lo = torch.tensor([0.5, 0.1, 3.0]), torch.tensor(lo)
    weight = loss_weight("1/gap", hi, lo, sigma_data=0.5)
    loss = consistency_loss(student, student, batch, hi, lo, weight=weight, distance="pseudo_huber", huber_c=0.03)
    got = torch.autograd.grad(loss.sum(), [student.network.a, student.network.b])
    a, b = (torch.tensor(q.item(), dtype=torch.float64, requires_grad=True) for q in (student.network.a, student.network.b))
    z = kernels.normal(batch.seed, batch.position, batch.images.shape[1:], stream=0).double()

    def D(sigma, a, b):
        s = sigma.double().view(-1, 1, 1, 1)
        x, root = batch.images.double() + s * z, (s**2 + 0.25).sqrt()
        shifted = s - 0.002 if form == "boundary" else s
        F = (a + b * s.clamp(min=1e-12).log() / 4) * x / root
        return 0.25 / (shifted**2 + 0.25) * x + shifted * 0.5 / root * F

    squared = (D(hi, a, b) - D(lo, a, b).detach()).square().sum((1, 2, 3))
    expected = ((squared + 0.03**2).sqrt() - 0.03) / (hi - lo).double()
    if form == "edm":
        torch.testing.assert_close(D(lo, a, b)[0], batch.images[0].double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    for one, other in zip(got, torch.autograd.grad(expected.sum(), [a, b]), strict=True):
        assert abs(other) > 0.1
        assert one.item() == pytest.approx(other.item(), rel=1e-3)


def test_the_evened_loss_is_edm2s_and_trains_to_weigh_levels_alike():
    """Karras et al. 2024, equation 21: loss / exp(u) + u, least at u = ln(loss)."""
    torch.manual_seed(0)
    sigma, batch, teacher = torch.tensor([0.1, 5.0]).repeat(200), gaussian_batch(400), gaussian_teacher("edm", data_std=DATA_STD)
    plain, log_weight = edm_loss(teacher, batch, sigma), LogWeight()
    torch.testing.assert_close(edm_loss(teacher, batch, sigma, log_weight=log_weight), plain)
    optimizer = torch.optim.Adam(log_weight.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        evened(plain, sigma, log_weight, 1.0).mean().backward()
        optimizer.step()
    u = -log_weight(sigma).detach()
    torch.testing.assert_close(evened(0.5 * plain, sigma, log_weight, 0.5), 0.5 * (plain / u.exp() + u))
    least = [plain[level::2].mean().log() for level in (0, 1)]
    torch.testing.assert_close(u[:2], torch.stack(least), rtol=0, atol=0.05)
    assert (least[0] - least[1]).abs() > 0.3
