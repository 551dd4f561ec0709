"""sCT and sCD in TrigFlow's own notation and in float64, in the Gaussian world, and the learned weight."""

import math

import pytest
import torch
from analytic import gaussian_teacher
from test_objective import DATA_STD, gaussian_batch
from torch import nn

from fastcm import kernels
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.consistency.log_weight import LogWeight
from fastcm.consistency.objective import continuous_loss
from fastcm.consistency.tangent import network_tangent

SIGMA_DATA = 0.5


class Linear(nn.Module):
    """F = (a + b c_noise) x: its derivative along a trajectory can be written down."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.4))

    def forward(self, x, c_noise, labels=None):
        return (self.a + self.b * c_noise).view(-1, 1, 1, 1) * x


def trigflow_loss(a, b, batch, sigma, *, warmup, c, c_noise, teacher=None):
    """Lu and Song 2024, Algorithm 1, in its own notation: t, z of deviation sigma_data, F' = -F. Float64; gradient through F' alone."""
    z = SIGMA_DATA * kernels.normal(batch.seed, batch.position, batch.images.shape[1:], stream=0).double()
    x0, t = batch.images.double(), torch.atan(sigma.double() / SIGMA_DATA)
    cos, sin = (f(t).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    x_t = cos * x0 + sin * z
    dx = cos * z - sin * x0
    if teacher is not None:
        dx = SIGMA_DATA * teacher(x_t / SIGMA_DATA, t)
    noise = {"arctan(sigma / sigma_data)": t, "ln sigma / 4": (SIGMA_DATA * torch.tan(t)).log() / 4}[c_noise].view(-1, 1, 1, 1)
    rate = {"arctan(sigma / sigma_data)": torch.ones_like(cos), "ln sigma / 4": 1 / (4 * sin * cos)}[c_noise]

    def F(a, b):
        return -(a + b * noise) * x_t / SIGMA_DATA

    with torch.no_grad():
        dF = -b * rate * x_t / SIGMA_DATA - (a + b * noise) * dx / SIGMA_DATA
        g = -cos.square() * (SIGMA_DATA * F(a, b) - dx) - warmup * cos * sin * (x_t + SIGMA_DATA * dF)
        g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + c)
        goal = F(a, b) + g
    return (F(a, b) - goal).square().mean((1, 2, 3))


@pytest.mark.parametrize("c_noise", ["arctan(sigma / sigma_data)", "ln sigma / 4"])
@pytest.mark.parametrize("taught", [False, True], ids=["sct", "scd"])
def test_value_and_gradient_equal_the_papers_algorithm(c_noise, taught):
    p = Preconditioning(form="edm", c_noise=c_noise)
    student = Denoiser(Linear(), p)
    sigma = torch.tensor([0.01, 0.1, 0.5, 3.0, 60.0])
    batch = gaussian_batch(5)
    teacher = gaussian_teacher("edm", data_std=DATA_STD) if taught else None

    def teacher_F(x, t):  # the teacher's F' in TrigFlow: cos x_t - sin s F' = D
        s = SIGMA_DATA * torch.tan(t)
        cos, sin = (f(t).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
        D = DATA_STD**2 / (s**2 + DATA_STD**2)
        return (cos * x * SIGMA_DATA - D.view(-1, 1, 1, 1) * x * SIGMA_DATA / cos) / (sin * SIGMA_DATA)

    tangent = network_tangent(student.network, "jvp")
    loss = continuous_loss(student, batch, sigma, tangent=tangent, warmup=0.6, tangent_c=0.1, teacher=teacher)
    a, b = (torch.tensor(v.item(), dtype=torch.float64, requires_grad=True) for v in (student.network.a, student.network.b))
    expected = trigflow_loss(a, b, batch, sigma, warmup=0.6, c=0.1, c_noise=c_noise, teacher=teacher_F if taught else None)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-6)
    got = torch.autograd.grad(loss.sum(), [student.network.a, student.network.b])
    want = torch.autograd.grad(expected.sum(), [a, b])
    for one, other in zip(got, want, strict=True):
        assert abs(other) > 0.01
        assert one.item() == pytest.approx(other.item(), rel=5e-3)


def test_the_exact_consistency_function_has_no_tangent():
    # f = x d / sqrt(sigma^2 + d^2) is constant along the ODE of the exact teacher, so the loss vanishes; that of another function does not.
    class Exact(nn.Module):
        power = 0.5

        def forward(self, x, c_noise, labels=None):
            sigma = SIGMA_DATA * torch.tan(c_noise.double())
            root = (sigma.square() + SIGMA_DATA**2).sqrt()
            gain = (DATA_STD**2 / (sigma.square() + DATA_STD**2)) ** self.power  # D = gain x_sigma
            F = (gain - SIGMA_DATA**2 / root.square()) * root / (sigma * SIGMA_DATA) * root  # of x_sigma / root
            return (F.view(-1, 1, 1, 1) * x.double()).to(x.dtype)

    p = Preconditioning(form="edm", c_noise="arctan(sigma / sigma_data)")
    teacher, batch, sigma = gaussian_teacher("edm", data_std=DATA_STD), gaussian_batch(4), torch.tensor([0.05, 0.3, 2.0, 40.0])
    losses = {}
    for power in (0.5, 1.0):
        network = Exact()
        network.power = power
        tangent = network_tangent(network, "jvp")
        losses[power] = continuous_loss(Denoiser(network, p), batch, sigma, tangent=tangent, warmup=1.0, teacher=teacher)
    assert losses[0.5].max() < 1e-4 * losses[1.0].min(), losses


def test_the_learned_weight_settles_where_every_level_weighs_the_same():
    weight = LogWeight()
    sigma = torch.tensor([0.01, 0.5, 20.0])
    assert torch.equal(weight(sigma), torch.zeros(3))
    loss = torch.tensor([0.1, 1.0, 5.0])
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.02)
    for _ in range(800):
        optimizer.zero_grad()
        w = weight(sigma)
        (w.exp() * loss - w).sum().backward()
        optimizer.step()
    torch.testing.assert_close(weight(sigma).exp() * loss, torch.ones(3), rtol=0.02, atol=0)


def test_the_weight_multiplies_the_loss_and_is_taken_off():
    p = Preconditioning(form="edm", c_noise="ln sigma / 4")
    student, batch, sigma = Denoiser(Linear(), p), gaussian_batch(3), torch.tensor([0.1, 1.0, 9.0])
    tangent = network_tangent(student.network, "jvp")
    weight = LogWeight()
    nn.init.constant_(weight.linear.bias, math.log(3))
    plain = continuous_loss(student, batch, sigma, tangent=tangent, warmup=1.0)
    weighted = continuous_loss(student, batch, sigma, tangent=tangent, warmup=1.0, log_weight=weight)
    torch.testing.assert_close(weighted, 3 * plain - math.log(3))
    weighted.sum().backward()
    assert weight.linear.bias.grad.item() == pytest.approx((3 * plain - 1).sum().item(), rel=1e-4)
