"""The denoiser D(x, sigma): a network F with skip and output scaling. The only place that holds c_skip, c_out, c_in, c_noise."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcm import kernels
from fastcm.consistency.betas import Betas
from fastcm.errors import InputError, nearest
from fastcm.networks.checks import is_number

# What a network predicts, F of D = c_skip x + c_out F, and the same for consistency functions, with D(x, sigma_min) = x.
BASES = ("edm", "epsilon", "v", "sample", "ve", "flow")
BOUNDARY_FORMS = {base: "boundary" if base == "edm" else f"{base}-boundary" for base in BASES}
FORMS = ("boundary", *BASES, *(form for form in BOUNDARY_FORMS.values() if form != "boundary"))
STEPS = ("interpolated step", "nearest step")  # of Preconditioning.betas
TRIGFLOW = "arctan(sigma / sigma_data)"
FLOW_TIME = "sigma / (1 + sigma)"
C_NOISE = ("250 ln sigma", "ln sigma / 4", "ln(sigma / 2)", TRIGFLOW, FLOW_TIME, *STEPS)
MOST_GAIN = 4.0
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

    form: what F is. "edm": Table 1 of Karras et al. 2022; "epsilon": the noise (Ho et al. 2020), "v" (Salimans and Ho 2022) and "sample",
      the image, of a variance-preserving chain, whose x is x / sqrt(1 + sigma^2); "ve": sigma times the score (Song et al. 2021);
      "flow": the velocity noise - image of flow matching (Lipman et al. 2023), whose x is z = x / (1 + sigma) = (1 - t) image + t noise.
      "boundary" shifts sigma by sigma_min in the edm form's c_skip and c_out, so that D(x, sigma_min) = x exactly (Consistency Models,
      Appendix C). "epsilon-boundary" and so on mix x with the denoised image D_0 of the form before the dash (Luo et al. 2023, LCM,
      section 4.1): D = m x + n D_0 with m = sigma_data^2 / (s^2 + sigma_data^2), n = s / sqrt(sigma^2 + sigma_data^2) and
      s = sigma - sigma_min; at and below sigma_min D = x.
      In TrigFlow's terms (Lu and Song 2024) the EDM form is f = cos(t) x_t - sin(t) sigma_data F' with tan(t) = sigma / sigma_data,
      x_t = cos(t) x and F' = -F: a diffusion model needs no conversion to be tuned by ect, sct or scd.
    c_noise: the scalar the network is conditioned on. ADM networks take 1000 * ln(sigma) / 4 (OpenAI and diffusers),
      SongUNets ln(sigma) / 4 (EDM), or ln(sigma / 2) for "ve"; TrigFlow's own is t = arctan(sigma / sigma_data), flow matching's
      t = sigma / (1 + sigma). Networks of a discrete chain take its step: that of the nearest of the levels of `betas`, or a real number
      between them.
    transition: of a truncated consistency model (Lee et al. 2024), the lowest level that its network answers; None for all others.
    """

    form: str = "boundary"
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    c_noise: str = "250 ln sigma"
    betas: Betas | None = None
    transition: float | None = None

    def __post_init__(self):
        for name, choices in (("form", FORMS), ("c_noise", C_NOISE)):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"unknown value in noise.{name}: {value}. Use one of {', '.join(choices)}.{nearest(str(value), choices)}")
        for name in ("sigma_data", "sigma_min", "sigma_max", "rho"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise InputError(f"illegal value in noise.{name}: {value}. Give a positive finite number.")
        if self.sigma_min >= self.sigma_max:
            raise InputError(
                f"illegal range in noise.sigma_min: {self.sigma_min}. It must be smaller than noise.sigma_max = {self.sigma_max}."
            )
        if self.transition is not None and not (is_number(self.transition) and self.sigma_min <= self.transition < self.sigma_max):
            levels = f"Give a level from noise.sigma_min = {self.sigma_min} to below noise.sigma_max = {self.sigma_max}."
            raise InputError(f"illegal value in noise.transition: {self.transition}. {levels}")
        self._check_betas()

    def _check_betas(self) -> None:
        if isinstance(self.betas, dict):  # as config.json has them
            try:
                object.__setattr__(self, "betas", Betas(**self.betas))
            except TypeError as error:
                raise InputError(f"unknown field in noise.betas: {error}. Give schedule, start, end, steps, or trained.") from None
        if self.betas is not None and not isinstance(self.betas, Betas):
            raise InputError(f"illegal value in noise.betas: {self.betas}. Give the fields of a chain, or leave it out.")
        if (self.betas is not None) != (self.c_noise in STEPS):
            raise InputError(f"c_noise and betas that do not fit in noise.c_noise: {self.c_noise}. {' and '.join(STEPS)} alone take betas.")
        if self.betas is not None and self.sigma_max > self.betas.sigma_range[1] * (1 + 1e-6):
            top = f"The chain of noise.betas ends at {self.betas.sigma_range[1]:g}"
            raise InputError(f"noise level beyond the chain in noise.sigma_max: {self.sigma_max}. {top}; give no more.")

    @property
    def base(self) -> str:
        """What the network predicts, whether or not the form is one of the boundary: one of BASES."""
        return next(base for base, shifted in BOUNDARY_FORMS.items() if self.form in (base, shifted))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest level that the network answers."""
        return self.sigma_min if self.transition is None else self.transition, self.sigma_max

    @property
    def is_boundary(self) -> bool:
        """Whether D(x, sigma_min) = x exactly, as a consistency function's."""
        return self.form in BOUNDARY_FORMS.values()

    @property
    def fits_16_bits(self) -> bool:
        """Whether a network in 16 bits draws clean images: bf16 rounds F by 2^-9, and the image has that times c_out, at most MOST_GAIN.

        "epsilon" and "ve" have a c_out of sigma, 157 at the top of DDPM's chain: a third of the pixels' range.
        """
        return self._scalings(torch.tensor([self.sigma_max]))[1].abs().item() <= MOST_GAIN

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Returns the four scalings for sigma [B] fp32."""
        sigma = sigma.float()
        return Coefficients(*self._scalings(sigma), self._c_noise(sigma))

    def _scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in."""
        shifted = (sigma - self.sigma_min).clamp(min=0) if self.is_boundary else sigma
        data_variance = self.sigma_data**2
        m = data_variance / (shifted.square() + data_variance)
        if self.base == "edm":
            # EDM Table 1 with sigma shifted by sigma_min in c_skip and c_out (CM Appendix C); the EDM form has no shift.
            c_out = shifted * self.sigma_data * (sigma.square() + data_variance).rsqrt()
            return m, c_out, (sigma.square() + data_variance).rsqrt()
        c_skip, c_out, c_in = self._diffusion(sigma)
        if self.is_boundary:
            n = shifted * (sigma.square() + data_variance).rsqrt()
            c_skip, c_out = m + n * c_skip, n * c_out
        return c_skip, c_out, c_in

    def _diffusion(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(s, o, c_in) of D_0 = s x + o F. With a = 1 / (1 + sigma^2) the chain's own x is sqrt(a) x; v = sqrt(a) z - sqrt(1 - a) x_0."""
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        root = (1 + sigma.square()).rsqrt()
        return {
            "epsilon": (one, -sigma, root),
            "v": (root.square(), -sigma * root, root),
            "sample": (zero, one, root),
            "ve": (one, sigma, one),
            "flow": (1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma)),
        }[self.base]

    def in_form(self, form: str, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B), each [B], by which this form is `form` with the network A x + B F. (0, 1) for that form itself."""
        own, other = self._scalings(sigma), replace(self, form=form)._scalings(sigma)
        return (own[0] - other[0]) / other[1], own[1] / other[1]

    def input_share(self, sigma: Tensor) -> Tensor:
        """k [B] fp32 of d (c_in x) / d ln(sigma) = c_in (k x - D) along the ODE, on which dx / d ln(sigma) = x - D."""
        if self.base in ("ve", "flow"):
            return torch.ones_like(sigma) if self.base == "ve" else 1 / (1 + sigma)
        variance = self.sigma_data**2 if self.base == "edm" else 1.0
        return variance / (sigma.square() + variance)

    def _c_noise(self, sigma: Tensor) -> Tensor:
        if self.c_noise == TRIGFLOW:
            return torch.atan(sigma / self.sigma_data)
        if self.c_noise == FLOW_TIME:
            return sigma / (1 + sigma)
        if self.c_noise in STEPS:
            return self.betas.step(sigma, whole=self.c_noise == "nearest step")
        if self.c_noise == "ln(sigma / 2)":
            return (sigma.clamp(min=SMALLEST_SIGMA) / 2).log()
        return self._log_scale * sigma.clamp(min=SMALLEST_SIGMA).log()

    @property
    def _log_scale(self) -> float:
        return {"250 ln sigma": 250.0, "ln sigma / 4": 0.25, "ln(sigma / 2)": 1.0}[self.c_noise]

    def c_noise_rate(self, sigma: Tensor) -> Tensor:
        """d c_noise / d ln(sigma) at sigma [B] fp32, which is cos(t) sin(t) d c_noise / dt in TrigFlow's time t."""
        if self.c_noise == TRIGFLOW:
            return sigma * self.sigma_data / (sigma.square() + self.sigma_data**2)
        if self.c_noise == FLOW_TIME:
            return sigma / (1 + sigma).square()
        if self.c_noise in STEPS:
            if self.c_noise == "nearest step":
                raise InputError("a c_noise without a derivative in noise.c_noise: nearest step. Use interpolated step for scd and sct.")
            return self.betas.rate(sigma)
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
