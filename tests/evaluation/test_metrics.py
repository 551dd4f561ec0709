"""Metrics against closed forms, scipy, torchmetrics and brute force."""

import numpy as np
import pytest
import torch

from fastcm.errors import InputError
from fastcm.evaluation import metrics


def gaussian(rng, count, size, *, shift=0.0):
    mixing = rng.normal(size=(size, size)) / np.sqrt(size)
    return rng.normal(size=(count, size)) @ mixing + shift


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_frechet_of_one_dimensional_gaussians_is_the_closed_form():
    one, var = np.ones(1), np.ones((1, 1))
    assert metrics.frechet_distance(2 * one, 9 * var, -1 * one, 4 * var) == pytest.approx(3**2 + (3 - 2) ** 2, abs=1e-12)


def test_frechet_of_commuting_covariances_is_the_closed_form(rng):
    a, b = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    found = metrics.frechet_distance(np.zeros(6), rotation * a @ rotation.T, np.zeros(6), rotation * b @ rotation.T)
    assert found == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-12)


@pytest.mark.parametrize("size", [2, 17, 64])
def test_frechet_agrees_with_scipy(rng, size):
    import scipy.linalg

    a, b = gaussian(rng, 300, size), gaussian(rng, 250, size, shift=0.3)
    (mean_a, cov_a), (mean_b, cov_b) = metrics.moments(a), metrics.moments(b)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet(a, b) == pytest.approx(expected, abs=1e-8)


@pytest.mark.slow
def test_frechet_agrees_with_torchmetrics(rng):
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = gaussian(rng, 200, 12), gaussian(rng, 200, 12, shift=1.0)
    moments = [torch.from_numpy(part) for features in (a, b) for part in metrics.moments(features)]
    assert metrics.frechet(a, b) == pytest.approx(fid._compute_fid(*moments).item(), abs=1e-3)


def test_frechet_of_singular_covariances_is_zero_for_equal_sets(rng):
    a = np.repeat(gaussian(rng, 20, 3), 4, axis=1)
    assert abs(metrics.frechet(a, a)) < 1e-10
    assert metrics.frechet(a, a + 1) == pytest.approx(12, abs=1e-10)


def test_moments_are_those_of_numpy(rng):
    a = gaussian(rng, 31, 5, shift=100)
    mean, covariance = metrics.moments(a)
    np.testing.assert_allclose(mean, a.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(a.T), rtol=1e-10)


@pytest.mark.slow
def test_kernel_distance_agrees_with_torchmetrics(rng):
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = gaussian(rng, 60, 8), gaussian(rng, 60, 8, shift=0.5)
    expected = kid.poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item()
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_of_equal_distributions_has_expectation_zero(rng):
    values = [metrics.kernel_distance(rng.normal(size=(20, 4)), rng.normal(size=(30, 4))) for _ in range(400)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    # The biased estimate, which counts each point as its own neighbour, fails this by far.
    biased = np.mean([metrics.kernel_distance(x := rng.normal(size=(20, 4)), np.concatenate([x, x])) for _ in range(50)])
    assert abs(biased) > 10 * error


def brute_precision_recall(real, generated, k):
    def inside(points, centres):
        hits = 0
        for point in points:
            hit = False
            for i, centre in enumerate(centres):
                others = sorted(float(np.linalg.norm(centre - other)) for j, other in enumerate(centres) if j != i)
                hit |= float(np.linalg.norm(point - centre)) <= others[k - 1]
            hits += hit
        return hits / len(points)

    return inside(generated, real), inside(real, generated)


@pytest.mark.parametrize("block", [1024, 7])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree_with_brute_force(rng, monkeypatch, k, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, generated = rng.normal(size=(40, 3)), rng.normal(size=(33, 3)) * 0.8 + 0.9
    expected = brute_precision_recall(real, generated, k)
    assert 0.05 < min(expected) and max(expected) < 0.95
    assert metrics.precision_recall(real, generated, k=k) == pytest.approx(expected)


def test_a_dropped_mode_costs_recall_and_an_invented_one_costs_precision(rng):
    left, right = rng.normal(size=(50, 2)), rng.normal(size=(50, 2)) + 50
    both = np.concatenate([left, right])
    precision, recall = metrics.precision_recall(both, left + 0.01)
    assert precision > 0.95 and 0.4 < recall < 0.55
    precision, recall = metrics.precision_recall(left + 0.01, both)
    assert recall > 0.95 and 0.4 < precision < 0.55


def pictures(rng, count):
    return rng.integers(0, 256, size=(count, 1, 4, 4), dtype=np.uint8)


@pytest.mark.parametrize("block", [1024, 7])
def test_nearest_distances_agree_with_brute_force(rng, monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    a, b = pictures(rng, 23), pictures(rng, 31)
    b[17] = a[5]
    table = np.sqrt(((a[:, None].astype(float) - b[None].astype(float)) ** 2).mean(axis=(2, 3, 4)))
    distance, index = metrics.nearest_distances(a, b)
    np.testing.assert_array_equal(index, table.argmin(axis=1))
    np.testing.assert_allclose(distance, table.min(axis=1), rtol=1e-12)
    assert distance[5] == 0 and index[5] == 17


@pytest.mark.parametrize("block", [1024, 7])
def test_leave_one_out_skips_the_image_itself_but_not_its_twin(rng, monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    a = pictures(rng, 30)
    a[29] = a[0]
    table = np.sqrt(((a[:, None].astype(float) - a[None].astype(float)) ** 2).mean(axis=(2, 3, 4)))
    np.fill_diagonal(table, np.inf)
    distance, index = metrics.nearest_distances(a, a, own=np.arange(30))
    np.testing.assert_array_equal(index, table.argmin(axis=1))
    assert distance[0] == 0 and index[0] == 29 and (distance[1:29] > 0).all()
    some = np.array([3, 11, 12, 28])
    np.testing.assert_array_equal(metrics.nearest_distances(a[some], a, own=some)[1], index[some])


def test_copies_are_detected_and_fresh_images_are_not(rng):
    train, held_out, fresh = pictures(rng, 400), pictures(rng, 400), pictures(rng, 400)
    everyone = np.arange(400)
    for real in (metrics.nearest_distances(held_out, train)[0], metrics.nearest_distances(train, train, own=everyone)[0]):
        assert metrics.copy_check(metrics.nearest_distances(fresh, train)[0], real)["closer_share"] < 0.05
        mixed = np.concatenate([fresh[:300], train[:100]])
        found = metrics.copy_check(metrics.nearest_distances(mixed, train)[0], real)
        assert found["closer_share"] == pytest.approx(0.25, abs=0.03) and found["identical"] == 100
        # Copies one level of brightness away are no better.
        assert metrics.copy_check(metrics.nearest_distances(train ^ 1, train)[0], real)["closer_share"] == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.frechet(np.ones((1, 4)), np.ones((9, 4))), "too few samples"),
        (lambda: metrics.frechet(np.full((9, 4), np.nan), np.ones((9, 4))), "non-finite values in features: 36 of 36"),
        (lambda: metrics.precision_recall(np.ones((3, 4)), np.ones((9, 4))), "At least 4"),
        (lambda: metrics.nearest_distances(np.zeros((2, 1, 4, 4), np.uint8), np.zeros((2, 3, 4, 4), np.uint8)), "one shape"),
        (lambda: metrics.nearest_distances(*[np.zeros((1, 1, 4, 4), np.uint8)] * 2, own=np.zeros(1, int)), "too few images"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()
