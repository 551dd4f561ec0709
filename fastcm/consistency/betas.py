"""The noise levels of a discrete diffusion chain, and the step at which its network met a noise level."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcm.errors import InputError, nearest
from fastcm.networks.checks import is_number

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "trained_betas", "continuous")
MOST_STEPS = 100_000
COSINE_CAP = 0.999  # of the cosine schedule's last betas (Nichol and Dhariwal 2021, section 3.2)


@dataclass(frozen=True, kw_only=True)
class Betas:
    """A variance-preserving chain of `steps` steps: x_i = sqrt(a_i) x_0 + sqrt(1 - a_i) z with a_i = prod_{j <= i} (1 - beta_j)
    (Ho et al. 2020, equation 4). In units of the image its noise level is sigma_i = sqrt((1 - a_i) / a_i).

    schedule: "linear" from start to end (Ho et al. 2020), "scaled_linear": the square of a line, "squaredcos_cap_v2": cosine (Nichol and
      Dhariwal 2021, equation 17), "trained_betas": the numbers in `trained`, or "continuous": beta(t) from start to end over t in [0, 1],
      step (steps - 1) t (Song et al. 2021, equation 32; EDM's VP).
    zero_snr: rescaled so that nothing of the image is left at the last step (Lin et al. 2023, algorithm 1); that step, whose sigma is
      infinite, is left out of `levels`.
    scale: the network is told step * scale (1000 / steps where a chain of other length was rescaled).
    """

    schedule: str = "linear"
    start: float = 0.0001
    end: float = 0.02
    steps: int = 1000
    trained: tuple[float, ...] | None = None
    zero_snr: bool = False
    scale: float = 1.0

    def __post_init__(self):
        if isinstance(self.trained, list):
            object.__setattr__(self, "trained", tuple(self.trained))
        if self.schedule not in SCHEDULES:
            choices = f"Use one of {', '.join(SCHEDULES)}.{nearest(str(self.schedule), SCHEDULES)}"
            raise InputError(f"unknown value in noise.betas.schedule: {self.schedule}. {choices}")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or not 2 <= self.steps <= MOST_STEPS:
            raise InputError(f"illegal value in noise.betas.steps: {self.steps}. Give a whole number from 2 to {MOST_STEPS:,}.")
        for name in ("start", "end", "scale"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise InputError(f"illegal value in noise.betas.{name}: {value}. Give a positive finite number.")
        if not isinstance(self.zero_snr, bool):
            raise InputError(f"illegal value in noise.betas.zero_snr: {self.zero_snr}. Give true or false.")
        if (self.trained is not None) != (self.schedule == "trained_betas"):
            raise InputError(
                f"betas and schedule that do not fit in noise.betas.schedule: {self.schedule}. trained_betas alone lists them."
            )
        if self.trained is not None and (not isinstance(self.trained, tuple) or len(self.trained) != self.steps):
            raise InputError(f"another number of betas in noise.betas.trained than noise.betas.steps: {self.steps}. Give one a step.")
        if self.schedule == "continuous" and (self.zero_snr or self.end <= self.start):
            raise InputError(f"illegal range in noise.betas.end: {self.end}. A continuous schedule rises from its start, without zero_snr.")
        if self.schedule != "continuous" and not all(is_number(beta) and 0 < beta < 1 for beta in self._numbers()):
            raise InputError(f"illegal value in noise.betas: a beta of {self.schedule} outside 0 to 1. Correct start, end or the list.")

    def _numbers(self) -> list[float]:
        n = self.steps
        if self.trained is not None:
            return list(self.trained)
        if self.schedule == "squaredcos_cap_v2":
            bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
            return [min(1 - after / before, COSINE_CAP) for before, after in zip(bar, bar[1:], strict=False)]
        root = 0.5 if self.schedule == "scaled_linear" else 1.0
        low, high = self.start**root, self.end**root
        return [(low + (high - low) * i / (n - 1)) ** (1 / root) for i in range(n)]

    def levels(self) -> Tensor:
        """sigma of each step, [steps] float64, upwards; without the last step where `zero_snr` makes it infinite."""
        return torch.from_numpy(_levels(self).copy())

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The least and the largest noise level of the chain."""
        if self.schedule == "continuous":
            return self._sigma_at(1e-5), self._sigma_at(1.0)  # EDM starts at t = 1e-5
        levels = _levels(self)
        return float(levels[0]), float(levels[-1])

    def _sigma_at(self, t: float) -> float:
        return math.sqrt(math.expm1((self.end - self.start) * t**2 / 2 + self.start * t))

    def step(self, sigma: Tensor, *, whole: bool) -> Tensor:
        """What the network is told at sigma [B] fp32: the step of the nearest level (whole), or a real number that is linear in
        ln(sigma) between the levels. [B] fp32; the first or last step beyond the ends."""
        if self.schedule == "continuous":
            root = (self.start**2 + 2 * (self.end - self.start) * _log1p(sigma.to(_working_dtype()).square())).sqrt()
            step = (root - self.start) / (self.end - self.start) * (self.steps - 1)
            return (self.scale * (step.round() if whole else step)).float()
        levels, above = self._segment(sigma)
        low, high, sigma = levels.index_select(0, above - 1), levels.index_select(0, above), sigma.to(levels.dtype)
        if whole:
            step = above - 1 + (high - sigma < sigma - low).long()
        else:
            sigma = sigma.clamp(levels[0], levels[-1])
            step = above - 1 + (sigma / low).log() / (high / low).log()
        return (self.scale * step).float()

    def rate(self, sigma: Tensor) -> Tensor:
        """d step / d ln(sigma) of the real-numbered step at sigma [B] fp32."""
        if self.schedule == "continuous":
            variance, width = sigma.double().square(), self.end - self.start
            root = (self.start**2 + 2 * width * torch.log1p(variance)).sqrt()
            return (self.scale * (self.steps - 1) * 2 * variance / ((1 + variance) * root)).float()
        levels, above = self._segment(sigma)
        return (self.scale / (levels[above] / levels[above - 1]).log()).float()

    def _segment(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The levels on sigma's device, and the index of the one at or above each sigma, at least 1."""
        levels = _levels_on(self, sigma.device).to(_working_dtype())
        below = levels < sigma.to(levels.dtype)[:, None]  # counted: few runtimes of exported graphs can search
        return levels, below.to(levels.dtype).sum(1).clamp(1, len(levels) - 1).long()


def _working_dtype() -> torch.dtype:
    """float64, but in exported graphs, whose runtimes may have none: a step then is right to about 1e-4 of it."""
    return torch.float32 if torch.compiler.is_exporting() else torch.float64


def _log1p(x: Tensor) -> Tensor:
    """ln(1 + x), in exported graphs too, where ln is all there is: what 1 + x lost is given back in proportion."""
    if not torch.compiler.is_exporting():
        return torch.log1p(x)
    whole = 1 + x
    return whole.log() * x / (whole - 1).clamp(min=torch.finfo(x.dtype).eps)


@functools.lru_cache(maxsize=32)
def _levels(betas: Betas) -> np.ndarray:
    alphas = np.cumprod(1 - np.array(betas._numbers(), dtype=np.float64))
    if betas.zero_snr:
        root = np.sqrt(alphas)
        alphas = np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))[:-1]
    return np.sqrt((1 - alphas) / alphas)


_ON_DEVICE: dict[tuple[Betas, torch.device], Tensor] = {}


def _levels_on(betas: Betas, device: torch.device) -> Tensor:
    """The table on a device; kept there for GPUs, since a CUDA graph cannot record the copy."""
    if device.type == "cpu":
        return betas.levels()
    if (betas, device) not in _ON_DEVICE:
        table = betas.levels().to(device)
        if type(table) is not Tensor:  # a tensor without memory, of an estimate
            return table
        _ON_DEVICE[betas, device] = table
    return _ON_DEVICE[betas, device]
