"""How the number of noise levels N(k) and the target's decay mu(k) change over training."""

import math

from fastcm.errors import InputError, nearest

CURRICULA = ("fixed", "progressive", "doubling", "stages")
MU_SCHEDULES = ("zero", "fixed", "adaptive", "adaptive-code")


def discretization_steps(curriculum: str, progress: float, *, s0: int, s1: int) -> int:
    """Returns N, the number of noise levels at `progress` = k / K in [0, 1].

    fixed: s0 throughout (distillation, Consistency Models Table 3).
    progressive: ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1 (Consistency Models, Appendix C), at least 2.
    doubling: min(s0 2^floor(k/K'), s1) + 1 with K' = K / (log2(s1/s0) + 1) (iCT, section 3.4).
    stages: floor(k/K s1), at most s1 - 1: not a count of levels but ECT's stage a, of s1 stages in all (Geng et al. 2024).
    """
    if curriculum == "fixed":
        return s0
    if curriculum == "progressive":
        return max(math.ceil(math.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1), 1) + 1
    if curriculum == "doubling":
        stages = math.floor(math.log2(s1 / s0)) + 1
        # the small term keeps a stage's first step in its stage: k/K * stages can round below the integer.
        stage = min(math.floor(progress * stages + 1e-9), stages - 1)
        return min(s0 * 2**stage, s1) + 1
    if curriculum == "stages":
        return min(math.floor(progress * s1 + 1e-9), s1 - 1)
    raise InputError(
        f"unknown value in objective.curriculum: {curriculum}. Use one of {', '.join(CURRICULA)}.{nearest(curriculum, CURRICULA)}"
    )


def target_decay(schedule: str, steps: int, *, s0: int, mu0: float) -> float:
    """Returns mu, the decay of the target network's average when N = `steps`.

    zero: the target is the student itself without gradient (iCT). fixed: mu0.
    adaptive: exp(s0 ln mu0 / N) (Consistency Models, Appendix C). adaptive-code: the published code divides by N - 1 instead.
    """
    if schedule == "zero":
        return 0.0
    if schedule == "fixed":
        return mu0
    if schedule == "adaptive":
        return math.exp(s0 * math.log(mu0) / steps)
    if schedule == "adaptive-code":
        return math.exp(s0 * math.log(mu0) / (steps - 1))
    raise InputError(
        f"unknown value in objective.mu_schedule: {schedule}. Use one of {', '.join(MU_SCHEDULES)}.{nearest(schedule, MU_SCHEDULES)}"
    )
