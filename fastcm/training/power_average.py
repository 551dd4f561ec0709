"""Averages by power functions of time: their decay at a step, and any width as a combination of others (Karras et al. 2024, section 3)."""

import math

import numpy as np

# The width of the average that weighs every step alike: gamma = 0, the widest.
WIDEST = 12**-0.5


def gamma_of(width: float) -> float:
    """gamma of the profile t^gamma on [0, 1], whose standard deviation `width` is sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))
    (equations 123 to 126): the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2. width: above 0, below WIDEST."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_decay(width: float, step: int) -> float:
    """beta = (1 - 1 / step)^(gamma + 1), the share of itself that the average keeps at step 1, 2, ... (equation 127).

    The weights of step k then count ((k / step)^(gamma + 1) - ((k - 1) / step)^(gamma + 1)): the profile's integral over that step.
    """
    return (1 - 1 / step) ** (gamma_of(width) + 1)


def combination(steps: np.ndarray, widths: np.ndarray, *, step: int, width: float) -> tuple[np.ndarray, float]:
    """Coefficients [k] by which averages of `widths` [k], taken at `steps` [k], come nearest to that of `width` at `step`, and the distance
    of the two profiles over the length of the wanted one (appendix C.5, equations 133 to 143)."""
    times, gammas = np.asarray(steps, float) / step, np.array([gamma_of(each) for each in widths])
    wanted = gamma_of(width)
    products = _inner(times[:, None], gammas[:, None], times, gammas)
    right, square = _inner(times, gammas, 1.0, wanted), _inner(1.0, wanted, 1.0, wanted)
    lengths = np.sqrt(np.diag(products))
    # Neighbouring profiles are nearly one: the smallest singular values are rounding.
    solved = np.linalg.lstsq(products / np.outer(lengths, lengths), right / lengths, rcond=1e-14)[0] / lengths
    residual = square - 2 * solved @ right + solved @ products @ solved
    return solved, math.sqrt(max(residual, 0) / square)


def _inner(time_a, gamma_a, time_b, gamma_b):
    """The integral of two profiles' product, each (gamma + 1) t^gamma / time^(gamma + 1) up to its own time (equation 151)."""
    ratio, last = np.minimum(time_a, time_b) / np.maximum(time_a, time_b), np.maximum(time_a, time_b)
    later = np.where(time_a < time_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**later / last
