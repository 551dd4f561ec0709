"""The soak: two of its rounds run, and what it looks for is found: memory that grows, threads that disagree, errors in threads."""

import numpy as np
import pytest

from fastcm.benchmarks.reliability import soak
from fastcm.errors import RunError


@pytest.mark.long
def test_two_rounds(tmp_path):
    rounds = soak.soak(tmp_path, seconds=0, on_round=lambda row: None)
    assert [row["round"] for row in rounds] == [0, 1]
    assert all(row["here_mb"] > 50 and row["server_mb"] > 50 for row in rounds)


def test_growth_is_found_and_a_warm_up_is_not():
    def rows(values):
        return [{"here_mb": value, "server_mb": 100.0} for value in values]

    soak.check_flat(rows([100, 200, 300, 300, 301, 300, 299, 301, 302]))
    with pytest.raises(RunError, match=r"memory that grows in soak: here_mb by 3.0% over 9 rounds"):
        soak.check_flat(rows([100, 200, 300, 300, 300, 300, 309, 309, 309]))


def test_threads_that_disagree_or_fail_are_noticed():
    calls = iter(range(1000))
    with pytest.raises(RunError, match="differ between threads"):
        soak.from_threads(lambda seed: np.array([next(calls)]))
    with pytest.raises(ZeroDivisionError):
        soak.from_threads(lambda seed: np.array([1 // (seed - 3)]))
    assert soak.from_threads(lambda seed: np.array([seed])).shape == (soak.SEEDS, 1)
