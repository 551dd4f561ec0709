"""N(k) and mu(k) against the values that the published formulas give."""

import math

import pytest

from fastcm.consistency.curriculum import discretization_steps, target_decay
from fastcm.errors import InputError

STEPS = (0, 1_000, 10_000, 100_000, 400_000, 800_000)


@pytest.mark.parametrize(
    ("s1", "expected", "decays"),
    [
        (150, (2, 6, 17, 54, 107, 151), (0.9025, 0.9797, 0.9936, 0.9981, 0.9990, 0.9993)),
        (200, (2, 8, 23, 72, 143, 201), (0.9025, 0.9855, 0.9953, 0.9986, 0.9993, 0.9995)),
    ],
)
def test_progressive_curriculum_and_adaptive_decay(s1, expected, decays):
    steps = tuple(discretization_steps("progressive", k / 800_000, s0=2, s1=s1) for k in STEPS)
    assert steps == expected
    for n, decay in zip(steps, decays, strict=True):
        assert target_decay("adaptive-code", n, s0=2, mu0=0.95) == pytest.approx(decay, abs=6e-5)
        assert target_decay("adaptive", n, s0=2, mu0=0.95) == pytest.approx(math.exp(2 * math.log(0.95) / n))


def test_the_paper_and_the_published_code_differ_by_one():
    assert target_decay("adaptive", 3, s0=2, mu0=0.9) == target_decay("adaptive-code", 4, s0=2, mu0=0.9)


def test_doubling_curriculum():
    total, stage = 400_000, 50_000
    for k, n in ((0, 11), (stage - 1, 11), (stage, 21), (2 * stage, 41), (7 * stage, 1281), (total, 1281)):
        assert discretization_steps("doubling", k / total, s0=10, s1=1280) == n, k


def test_fixed_curriculum_and_the_plain_decays():
    assert [discretization_steps("fixed", p, s0=18, s1=18) for p in (0, 0.5, 1)] == [18, 18, 18]
    assert target_decay("zero", 11, s0=10, mu0=0.9) == 0.0 and target_decay("fixed", 18, s0=2, mu0=0.95) == 0.95


def test_unknown_names_get_a_suggestion():
    with pytest.raises(InputError, match="Did you mean 'doubling'"):
        discretization_steps("dubling", 0.5, s0=2, s1=10)
    with pytest.raises(InputError, match="objective.mu_schedule"):
        target_decay("adaptiv", 10, s0=2, mu0=0.9)


def test_ect_stages_divide_the_run():
    assert [discretization_steps("stages", k / 200, s0=1, s1=8) for k in (0, 24, 25, 100, 199, 200)] == [0, 0, 1, 4, 7, 7]
