"""A Gaussian world with exact answers: every pixel is N(0, data_std^2), so denoiser and consistency function are known in closed form."""

import math

import torch
from torch import Tensor, nn

from fastcm.consistency.denoiser import Denoiser, Preconditioning, expand


def denoiser_gain(sigma: Tensor, data_std: float) -> Tensor:
    """D(x, sigma) = data_std^2 / (sigma^2 + data_std^2) x, the mean of the data given x."""
    return data_std**2 / (sigma.square() + data_std**2)


def consistency_gain(sigma: Tensor, data_std: float, sigma_min: float) -> Tensor:
    """f(x, sigma) = x sqrt((sigma_min^2 + data_std^2) / (sigma^2 + data_std^2)): the end at sigma_min of the ODE through (x, sigma)."""
    return ((sigma_min**2 + data_std**2) / (sigma.square() + data_std**2)).sqrt()


def ode_gain(sigma_from: float, sigma_to: float, data_std: float) -> float:
    """x(sigma_to) / x(sigma_from) along the probability-flow ODE."""
    return math.sqrt((sigma_to**2 + data_std**2) / (sigma_from**2 + data_std**2))


def sigma_of(p: Preconditioning, c_noise: Tensor) -> Tensor:
    """The noise level that a network is told by c_noise, float64."""
    if p.betas is not None:
        levels, step = p.betas.levels(), c_noise.clamp(0, p.betas.steps - 1)
        low = step.floor().long().clamp(max=len(levels) - 2)
        return torch.exp(torch.lerp(levels[low].log(), levels[low + 1].log(), step - low))
    if p.c_noise == "sigma / (1 + sigma)":
        return c_noise / (1 - c_noise)
    scale = {"250 ln sigma": 250.0, "ln sigma / 4": 0.25, "ln(sigma / 2)": 1.0}[p.c_noise]
    return torch.exp(c_noise / scale) * (2 if p.c_noise == "ln(sigma / 2)" else 1)


def exact_scalings(p: Preconditioning, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in in float64, from the chain's own variables: x = a x_0 + b z with a = 1 / sqrt(1 + sigma^2), b = a sigma."""
    d = p.sigma_data
    shifted = (sigma - p.sigma_min).clamp(min=0) if p.is_boundary else sigma
    m = d**2 / (shifted.square() + d**2)
    if p.base == "edm":
        return m, shifted * d / (sigma.square() + d**2).sqrt(), 1 / (sigma.square() + d**2).sqrt()
    a = 1 / (1 + sigma.square()).sqrt()
    b = sigma * a
    skip, out, c_in = {
        "epsilon": (a / a, -b / a, a),  # x_0 = (x - b F) / a
        "v": (a * a, -b, a),  # x_0 = a x - b F
        "sample": (0 * a, a / a, a),
        "ve": (a / a, b / a, a / a),  # x_0 = x + sigma^2 score, F = sigma score
        "flow": (1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma)),  # x_0 = z - t v
    }[p.base]
    if not p.is_boundary:
        return skip, out, c_in
    n = shifted / (sigma.square() + d**2).sqrt()
    return m + n * skip, n * out, c_in


class GaussianNetwork(nn.Module):
    """The network F for which `Denoiser(F, preconditioning)` is the exact denoiser or the exact consistency function, to fp32 rounding.

    answer: "denoiser" or "consistency". data_std: the data's deviation, preconditioning.sigma_data where not given; the EDM form's teacher
    is F = 0 at that value, so tests of the network's part give another one.
    class_shift: adds class_shift * label to D, so that labels matter (not a solution of the ODE).
    It has one dummy parameter, so that devices and dtypes can be asked of it.
    """

    def __init__(self, preconditioning: Preconditioning, answer: str, *, data_std: float | None = None, class_shift: float = 0.0):
        super().__init__()
        assert answer in ("denoiser", "consistency")
        self.preconditioning = preconditioning
        self.answer = answer
        self.data_std = preconditioning.sigma_data if data_std is None else data_std
        self.class_shift = class_shift
        self.unused = nn.Parameter(torch.zeros(1))

    def gain(self, sigma: Tensor) -> Tensor:
        if self.answer == "denoiser":
            return denoiser_gain(sigma, self.data_std)
        return consistency_gain(sigma, self.data_std, self.preconditioning.sigma_min)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        p = self.preconditioning
        sigma = sigma_of(p, c_noise.double())
        c_skip, c_out, c_in = exact_scalings(p, sigma)
        # at sigma_min the boundary form has c_out = 0 up to the rounding of c_noise: F is finite there and does not matter.
        c_out = torch.where(c_out.abs() < 1e-6, c_out.sign() * 1e-6 + (c_out == 0) * 1e-6, c_out)
        image = x.double() / expand(c_in, x)
        D_x = expand(self.gain(sigma), x) * image
        if labels is not None:
            D_x = D_x + self.class_shift * expand(labels.double(), x)
        return ((D_x - expand(c_skip, x) * image) / expand(c_out, x)).to(x.dtype)


class GainNetwork(nn.Module):
    """A trainable F(x, c_noise) = g(c_noise) x, g a small MLP of ln sigma: it can hold the exact answers and fits in seconds."""

    def __init__(self, preconditioning: Preconditioning, *, width: int = 32):
        super().__init__()
        self.scale = 250.0 if preconditioning.c_noise == "250 ln sigma" else 0.25
        self.layers = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        log_sigma = (c_noise / self.scale / 4).to(x.dtype)
        return expand(self.layers(log_sigma[:, None])[:, 0], x) * x


def gaussian_teacher(form: str = "boundary", *, data_std: float | None = None, **noise: float) -> Denoiser:
    """The exact diffusion denoiser of the Gaussian world."""
    preconditioning = Preconditioning(form=form, **noise)
    return Denoiser(GaussianNetwork(preconditioning, "denoiser", data_std=data_std), preconditioning).eval()


def gaussian_consistency(form: str = "boundary", *, data_std: float | None = None, class_shift: float = 0.0, **noise: float) -> Denoiser:
    """The exact consistency function of the Gaussian world."""
    preconditioning = Preconditioning(form=form, **noise)
    network = GaussianNetwork(preconditioning, "consistency", data_std=data_std, class_shift=class_shift)
    return Denoiser(network, preconditioning).eval()
