"""The keyed permutation behind the order of data."""

import numpy as np
import pytest

from fastcm.kernels import permute


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1797, 2**20 + 7])
def test_permute_is_a_bijection(n):
    places = permute(np.arange(n), n, seed=7, epoch=0)
    assert places.dtype == np.int64
    assert np.array_equal(np.sort(places), np.arange(n))


def test_permute_depends_on_seed_and_epoch_only():
    index = np.arange(1797)
    orders = [permute(index, 1797, seed=seed, epoch=epoch) for seed in (0, 1, -1, 2**63 - 1) for epoch in (0, 1, 2)]
    assert len({order.tobytes() for order in orders}) == len(orders)
    assert np.array_equal(permute(index[100:103], 1797, seed=0, epoch=1), orders[1][100:103])
    assert permute(np.array([[5], [9]]), 1797, seed=0, epoch=1).tolist() == [[orders[1][5]], [orders[1][9]]]


def test_permute_order_is_fixed():
    """Resuming a run of an earlier release needs the same order for ever."""
    assert permute(np.arange(10), 10, seed=3, epoch=4).tolist() == [2, 6, 5, 7, 3, 4, 8, 1, 0, 9]


def test_permute_reaches_every_order_of_four_about_equally():
    counts = np.unique([permute(np.arange(4), 4, seed=seed, epoch=0) @ [64, 16, 4, 1] for seed in range(1200)], return_counts=True)[1]
    # 24 orders, 50 expected of each: a chi-squared of 23 degrees of freedom passes 60 once in 30,000.
    assert len(counts) == 24
    assert ((counts - 50) ** 2 / 50).sum() < 60


def test_permute_mixes_neighbours():
    places = permute(np.arange(4096), 4096, seed=1, epoch=0)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.06
    assert np.mean(places == np.arange(4096)) < 0.002


@pytest.mark.parametrize(
    ("index", "n", "message"),
    [
        (np.array([5]), 5, "permute.index.*0 to 4"),
        (np.array([-1]), 5, "out of range"),
        (np.array([0.5]), 5, "dtype"),
        (np.array([0]), 0, "permute.n."),
    ],
)
def test_permute_refuses_what_it_cannot_place(index, n, message):
    with pytest.raises(ValueError, match=message):
        permute(index, n, seed=0, epoch=0)
