"""MeanFlow in float64: the paper's algorithm on a network that can be differentiated by hand, and the exact field of the Gaussian world."""

import pytest
import torch
from analytic import exact_scalings
from test_objective import DATA_STD, gaussian_batch
from test_tangent import ADM, SONG, filled, point, set_stream
from torch import nn

from fastcm import kernels
from fastcm.consistency.denoiser import FLOW_TIME, Denoiser, Preconditioning, expand
from fastcm.consistency.mean_flow import flow_time, mean_flow_loss
from fastcm.consistency.tangent import network_tangent

FLOW = Preconditioning(form="flow", c_noise=FLOW_TIME)
SIGMA, SIGMA_END = torch.tensor([0.01, 0.3, 2.0, 2.0, 60.0]), torch.tensor([0.004, 0.05, 2.0, 0.2, 0.01])
NO_CLASS = torch.tensor([0, 1, -1, 2, 0])


class Bilinear(nn.Module):
    """u = (a + b t + c r + d [labelled]) z: its derivative along a trajectory can be written down."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.7, -0.4, 0.3, 0.2]))

    def forward(self, x, c_noise, labels=None, *, end):
        return expand(self.gain(self.weights, c_noise, end, labels), x) * x

    @staticmethod
    def gain(weights, t, r, labels):
        a, b, c, d = weights
        return a + b * t + c * r + d * (0 if labels is None else labels >= 0)


def algorithm_1(weights, batch, sigma, sigma_end, *, power, c, omega=1.0, kappa=0.0, velocity="data"):
    """Geng et al. 2025, Algorithm 1 with the guidance of its appendix B.1, in its own notation and in float64; gradient through u alone."""
    e = kernels.normal(batch.seed, batch.position, batch.images.shape[1:], stream=0).double()
    x, t, r = batch.images.double(), *(flow_time(level.double()) for level in (sigma, sigma_end))
    z, v = expand(1 - t, x) * x + expand(t, x) * e, e - x

    def u(r, labels):
        return expand(Bilinear.gain(weights, t, r, labels), z) * z

    with torch.no_grad():
        if batch.labels is not None and (omega, kappa) != (1.0, 0.0):
            guided = omega * v + kappa * u(t, batch.labels) + (1 - omega - kappa) * u(t, None)
            v = torch.where(expand(batch.labels >= 0, v), guided, v)
        along = v if velocity == "data" else u(t, batch.labels)
        du = expand(Bilinear.gain(weights, t, r, batch.labels), z) * along + weights[1] * z
        goal = v - expand(t - r, z) * du
    squared = (u(r, batch.labels) - goal).square().sum((1, 2, 3))
    return squared / (squared.detach() + c) ** power


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (None, {}),
        (None, {"velocity": "network"}),
        (NO_CLASS, {"omega": 2.0}),
        (NO_CLASS, {"omega": 0.3, "kappa": 0.8}),
        (NO_CLASS, {"omega": 0.3, "kappa": 0.8, "velocity": "network"}),
    ],
)
@pytest.mark.parametrize(("power", "c"), [(1.0, 1e-3), (0.75, 0.1), (0.0, 1.0)])
def test_value_and_gradient_equal_the_papers_algorithm(labels, options, power, c):
    student = Denoiser(Bilinear(), FLOW)
    batch = gaussian_batch(5)._replace(labels=labels)
    tangent = network_tangent(student.network, "jvp")
    loss = mean_flow_loss(student, batch, SIGMA, SIGMA_END, tangent=tangent, power=power, weight_c=c, **options)
    weights = student.network.weights.detach().double().requires_grad_()
    expected = algorithm_1(weights, batch, SIGMA, SIGMA_END, power=power, c=c, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-6)
    got, want = (torch.autograd.grad(value.sum(), w)[0] for value, w in ((loss, student.network.weights), (expected, weights)))
    assert (want[:3].abs() > 1e-3).all()
    torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=1e-4)


class ExactVelocity(nn.Module):
    """F for which u is the average velocity of the Gaussian world's ODE, times a gain that is one; or its velocity at t, for any r."""

    def __init__(self, preconditioning, *, averaged=True):
        super().__init__()
        self.preconditioning, self.averaged = preconditioning, averaged
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, c_noise, labels=None, *, end):
        c, r = c_noise.double(), end.double()
        sigma = c / (1 - c) if self.preconditioning.c_noise == FLOW_TIME else self.preconditioning.sigma_data * torch.tan(c)
        c_skip, c_out, c_in = exact_scalings(self.preconditioning, sigma)
        t, sigma_end = flow_time(sigma), r / (1 - r)
        z = 1 / (1 + sigma)  # of an x of one
        z_end = ((sigma_end**2 + DATA_STD**2) / (sigma**2 + DATA_STD**2)).sqrt() / (1 + sigma_end)
        velocity = (z - DATA_STD**2 / (sigma**2 + DATA_STD**2)) / t
        together = (t - r).abs() < 1e-6
        u = torch.where(together, velocity, (z - z_end) / torch.where(together, 1.0, t - r)) if self.averaged else velocity
        F = (z - t * u - c_skip) / c_out / c_in  # of the network's own x
        return (expand(F, x) * x.double() * self.gain).to(x.dtype)


@pytest.mark.parametrize("form", ["flow", "edm", "v", "sample-boundary"])
def test_the_exact_average_velocity_fulfils_the_identity(form):
    # omega = 0 and kappa = 1 put the network's own velocity at t, here the exact one, in the place of the data's.
    p = Preconditioning(form=form, c_noise="arctan(sigma / sigma_data)" if form == "edm" else FLOW_TIME)
    batch = gaussian_batch(5)._replace(labels=torch.zeros(5, dtype=torch.int64))
    values, gradients = {}, {}
    for averaged in (True, False):
        student = Denoiser(ExactVelocity(p, averaged=averaged), p)
        options = {"tangent": network_tangent(student.network, "jvp"), "power": 0.0, "omega": 0.0, "kappa": 1.0}
        loss = mean_flow_loss(student, batch, SIGMA, SIGMA_END, **options)
        values[averaged], gradients[averaged] = loss.detach(), torch.autograd.grad(loss.sum(), student.network.gain)[0].abs()
    apart = SIGMA != SIGMA_END  # at r = t both are the velocity
    assert (values[True] < 1e-5 * values[False].max()).all() and (values[False][apart] > 1e-3 * values[False].max()).sum() >= 2, values
    assert gradients[True] < 1e-3 * gradients[False], gradients


class InFlowForm(nn.Module):
    """A network of another form as the flow form's: A x + B F."""

    def __init__(self, network, preconditioning):
        super().__init__()
        self.network, self.preconditioning = network, preconditioning

    def forward(self, z, c_noise, labels=None, *, end):
        sigma = c_noise / (1 - c_noise)
        x, c_in = expand(1 + sigma, z) * z, self.preconditioning.coefficients(sigma).c_in
        A, B = self.preconditioning.in_form("flow", sigma)
        return expand(A, x) * x + expand(B, x) * self.network(expand(c_in, x) * x, c_noise, labels, end=end)


@pytest.mark.parametrize("form", ["edm", "epsilon", "v", "ve", "sample-boundary"])
def test_every_form_has_the_loss_of_its_average_velocity(form):
    p, batch = Preconditioning(form=form, c_noise=FLOW_TIME), gaussian_batch(4)
    sigma, sigma_end = SIGMA[1:], SIGMA_END[1:]
    network = Bilinear()
    losses = []
    for student in (Denoiser(network, p), Denoiser(InFlowForm(network, p), FLOW)):
        loss = mean_flow_loss(student, batch, sigma, sigma_end, tangent=network_tangent(student.network, "jvp"), power=0.5)
        losses.append((loss.detach(), torch.autograd.grad(loss.sum(), network.weights)[0]))
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("velocity", ["data", pytest.param("network", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "options"), [("adm", {**ADM, "second_time": "gap"}), ("song", {**SONG, "second_time": "end"})])
def test_jvp_and_difference_agree_and_are_not_zero(kind, options, velocity):
    student = Denoiser(filled(kind, {**options, "dropout": 0.0}), FLOW)
    batch = gaussian_batch(3, size=8)._replace(labels=torch.tensor([0, 2, 1]))
    sigma = torch.tensor([0.2, 1.0, 4.0])

    def loss(tangent, end):
        return mean_flow_loss(student, batch, sigma, end, tangent=tangent, power=0.0, velocity=velocity).detach()

    jvp, difference = (network_tangent(student.network, kind) for kind in ("jvp", "finite-difference"))
    exact = loss(jvp, sigma / 4)
    torch.testing.assert_close(loss(difference, sigma / 4), exact, rtol=0.03, atol=1e-3)

    def standing(*arguments, **conditions):
        F_x, dF = jvp(*arguments, **conditions)
        return F_x, 0 * dF

    assert ((loss(standing, sigma / 4) - exact).abs() > 2e-3 * exact).all()
    torch.testing.assert_close(loss(standing, sigma), loss(jvp, sigma))  # r = t: flow matching has no derivative


@pytest.mark.parametrize(("kind", "options"), [("adm", ADM), ("song", SONG)])
def test_the_derivative_sees_the_second_time(kind, options):
    network = filled(kind, {**options, "second_time": "gap"})
    set_stream(network)
    x, c_noise, labels, x_rate, c_rate = point()
    end = torch.tensor([0.1, 0.5, 0.3])
    tangent = network_tangent(network, "jvp")
    _, dF = tangent(x, c_noise, labels, x_rate, c_rate, end=end)
    _, at_zero = tangent(x, c_noise, labels, x_rate, c_rate)
    assert ((dF - at_zero).abs().mean((1, 2, 3)) > 1e-3).all()
    with torch.no_grad():
        double, h = network.double(), 3e-3
        set_stream(double)

        def at(step):
            return double(x.double() + step * x_rate.double(), c_noise.double() + step * c_rate.double(), labels, end=end.double())

        expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    torch.testing.assert_close(dF.double(), expected, rtol=2e-3, atol=2e-4)
