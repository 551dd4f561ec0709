"""The denoiser D(x, sigma): a network F with skip and output scaling. The only place that holds c_skip, c_out, c_in, c_noise."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcm import kernels
from fastcm.errors import InputError, nearest
from fastcm.networks.checks import is_number

FORMS = ("boundary", "edm")
C_NOISE = ("250 ln sigma", "ln sigma / 4", "arctan(sigma / sigma_data)")
# Below every level that is trained or sampled; the lower end of an ECT pair may be 0, where c_out = 0 and c_noise need only be finite.
SMALLEST_SIGMA = 1e-20


class Coefficients(NamedTuple):
    """The four scalings of EDM Table 1 at one noise level per sample, each [B] fp32."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True, kw_only=True)
class Preconditioning:
    """How a network's output becomes a denoised image, and the noise levels it was trained for.

    form: "edm" is Table 1 of Karras et al. 2022; "boundary" shifts sigma by sigma_min in c_skip and c_out so that
      D(x, sigma_min) = x exactly (Consistency Models, Appendix C).
      In TrigFlow's terms (Lu and Song 2024) the EDM form is f = cos(t) x_t - sin(t) sigma_data F' with tan(t) = sigma / sigma_data,
      x_t = cos(t) x and F' = -F: a diffusion model needs no conversion to be tuned by ect, sct or scd.
    c_noise: the scalar the network is conditioned on. ADM networks take 1000 * ln(sigma) / 4 (OpenAI and diffusers),
      SongUNets ln(sigma) / 4 (EDM); TrigFlow's own is t = arctan(sigma / sigma_data).
    """

    form: str = "boundary"
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    c_noise: str = "250 ln sigma"

    def __post_init__(self):
        for name, choices in (("form", FORMS), ("c_noise", C_NOISE)):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"unknown value in noise.{name}: {value}. Use one of {', '.join(choices)}.{nearest(value, choices)}")
        for name in ("sigma_data", "sigma_min", "sigma_max", "rho"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise InputError(f"illegal value in noise.{name}: {value}. Give a positive finite number.")
        if self.sigma_min >= self.sigma_max:
            raise InputError(
                f"illegal range in noise.sigma_min: {self.sigma_min}. It must be smaller than noise.sigma_max = {self.sigma_max}."
            )

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Returns the four scalings for sigma [B] fp32."""
        sigma = sigma.float()
        # EDM Table 1 with sigma shifted by sigma_min in c_skip and c_out (CM Appendix C); the EDM form has no shift.
        shifted = sigma - self.sigma_min if self.form == "boundary" else sigma
        data_variance = self.sigma_data**2
        c_skip = data_variance / (shifted.square() + data_variance)
        c_out = shifted * self.sigma_data * (sigma.square() + data_variance).rsqrt()
        c_in = (sigma.square() + data_variance).rsqrt()
        return Coefficients(c_skip, c_out, c_in, self._c_noise(sigma))

    def _c_noise(self, sigma: Tensor) -> Tensor:
        if self.c_noise == "arctan(sigma / sigma_data)":
            return torch.atan(sigma / self.sigma_data)
        return self._log_scale * sigma.clamp(min=SMALLEST_SIGMA).log()

    @property
    def _log_scale(self) -> float:
        return 250.0 if self.c_noise == "250 ln sigma" else 0.25

    def c_noise_rate(self, sigma: Tensor) -> Tensor:
        """d c_noise / d ln(sigma) at sigma [B] fp32, which is cos(t) sin(t) d c_noise / dt in TrigFlow's time t."""
        if self.c_noise == "arctan(sigma / sigma_data)":
            return sigma * self.sigma_data / (sigma.square() + self.sigma_data**2)
        return torch.full_like(sigma, self._log_scale)


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Views a [B] coefficient as [B, 1, ...] so that it broadcasts over x [B, ...]."""
    return coefficient.view(-1, *[1] * (x.ndim - 1))


def working_dtype(network: nn.Module) -> torch.dtype:
    """The dtype that the network computes in: its first parameter's, fp32 for a network without parameters."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def check_channels(network: nn.Module, where: object = "network.out_channels") -> None:
    """Raises InputError, naming `where`, for a network whose configuration gives its output other channels than its input."""
    config = getattr(network, "config", None)
    taken, given = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    if None not in (taken, given) and taken != given:
        raise InputError(
            f"a network whose output is not its input in {where}: {given} channels of {taken}. A denoiser needs as many out as in."
        )


class Denoiser(nn.Module):
    """D(x, sigma, labels) = c_skip x + c_out F(c_in x, c_noise, labels) (Karras et al. 2022, equation 7).

    x: [B, C, H, W] fp32; sigma: [B] fp32 in image units ([-1, 1]); labels: int64 [B] or None.
    Returns [B, C, H, W] fp32, unclamped. F sees its input in its own dtype and never sees sigma.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning):
        super().__init__()
        check_channels(network)
        self.network = network
        self.preconditioning = preconditioning

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return self.preconditioning.coefficients(sigma)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        F_x = self.network((expand(c_in, x) * x).to(working_dtype(self.network)), c_noise, labels)
        return kernels.precondition(x, F_x, c_skip, c_out)
