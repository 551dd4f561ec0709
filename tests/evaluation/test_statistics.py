"""Streamed statistics against numpy, torchmetrics and closed forms; the error bars against repeated draws; memory against the count."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from fastcm.errors import InputError
from fastcm.evaluation import metrics, statistics
from fastcm.evaluation.extractors import ModuleFeatures
from fastcm.evaluation.protocol import evaluate
from fastcm.evaluation.samples import Samples, Stream
from fastcm.evaluation.statistics import FeatureStatistics, ScoreStatistics, load_statistics, save_statistics


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def streamed(features, *, block=37):
    found = FeatureStatistics(len(features), features.shape[1])
    for start in range(0, len(features), block):
        found.add(features[start : start + block])
    return found


@pytest.mark.parametrize("count", [2, 5, 1000])
def test_moments_of_a_stream_are_those_of_numpy(rng, count):
    features = rng.normal(size=(count, 5)) @ rng.normal(size=(5, 5)) + 1e5
    mean, covariance = streamed(features).moments()
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(features.T), rtol=1e-7, atol=1e-9)


def test_a_choice_of_rows_is_kept_and_all_of_few(rng, monkeypatch):
    features = rng.normal(size=(3000, 4))
    whole = streamed(features)
    np.testing.assert_array_equal(whole.values, features)
    monkeypatch.setattr(statistics, "ROW_BYTES", 1)
    few = streamed(features)
    assert few.values.shape == (1000, 4) and abs(few.rows.mean() - 1500) < 100, "the choice must not be the first rows"
    np.testing.assert_array_equal(few.values, features[few.rows])
    np.testing.assert_allclose(few.moments()[1], np.cov(features.T), rtol=1e-10)


def test_error_bars_are_those_of_repeated_draws(rng):
    """The bootstrap of one stream gives the deviation that fresh streams have, for the mean and for the Frechet distance."""
    reference = np.zeros(3), np.eye(3)
    root = metrics.symmetric_root(reference[1])
    drawn, bars = [], []
    for _ in range(60):
        found = streamed(rng.normal(size=(300, 3)) + 0.3)
        drawn.append(metrics.frechet_distance(*found.moments(), *reference))
        bars.append(np.std([metrics.quick_frechet(*m, *reference, root) for m in found.bootstrap(50)], ddof=1) * found.correction)
    assert np.mean(bars) == pytest.approx(np.std(drawn, ddof=1), rel=0.3)


def test_groups_cut_across_the_order_of_the_samples():
    """Samples come as seed mod classes: groups by row number would be classes."""
    group = FeatureStatistics(1000, 2).group
    assert all(len(set(group[np.arange(1000) % 10 == c])) > 50 for c in range(10))


def test_quick_frechet_is_the_frechet_distance(rng):
    a, b = rng.normal(size=(300, 20)), rng.normal(size=(200, 20)) * 2 + 1
    (mean_a, cov_a), (mean_b, cov_b) = metrics.moments(a), metrics.moments(b)
    expected = metrics.frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert metrics.quick_frechet(mean_a, cov_a, mean_b, cov_b, metrics.symmetric_root(cov_b)) == pytest.approx(expected, rel=1e-6)


def scores_of(logits, *, splits):
    found = ScoreStatistics(len(logits), logits.shape[1], splits=splits)
    for start in range(0, len(logits), 41):
        found.add(logits[start : start + 41])
    return found.scores()


def test_inception_score_of_known_cases():
    certain = np.eye(7)[np.arange(700) % 7] * 1e4
    assert scores_of(certain, splits=1) == pytest.approx([7])
    assert scores_of(np.tile(certain[:1], (50, 1)), splits=1) == pytest.approx([1])
    assert scores_of(np.zeros((50, 7)), splits=5) == pytest.approx(np.ones(5))


@pytest.mark.slow
def test_inception_score_agrees_with_torchmetrics(rng):
    inception = pytest.importorskip("torchmetrics.image.inception")
    logits = rng.normal(size=(200, 12)) * 3
    score = inception.InceptionScore(feature=nn.Identity(), splits=1)
    score.features = [torch.from_numpy(logits)]
    assert scores_of(logits, splits=1)[0] == pytest.approx(score.compute()[0].item(), abs=1e-3)


def test_splits_are_those_of_the_definition(rng):
    logits, splits = rng.normal(size=(100, 4)), 10
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    of = ScoreStatistics(100, 4).split
    parts = [p[of == number] for number in range(splits)]
    expected = [np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()) for part in parts]
    np.testing.assert_allclose(scores_of(logits, splits=splits), expected, rtol=1e-12)


def test_statistics_on_disk_are_adms(tmp_path, rng):
    features = rng.normal(size=(50, 6))
    mean, covariance = metrics.moments(features)
    save_statistics(tmp_path / "a.npz", mean, covariance)
    with np.load(tmp_path / "a.npz") as file:
        assert set(file.files) == {"mu", "sigma"} and file["sigma"].dtype == np.float64
    found = load_statistics(tmp_path / "a.npz")
    np.testing.assert_array_equal(found[0], mean)
    np.testing.assert_array_equal(found[1], covariance)
    # As ADM publishes them: float32 or float64, other arrays beside them.
    np.savez(tmp_path / "adm.npz", mu=mean.astype(np.float32), sigma=covariance.astype(np.float32), mu_s=mean, sigma_s=covariance)
    assert metrics.frechet_distance(*load_statistics(tmp_path / "adm.npz"), mean, covariance) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(3)}, "no array sigma in --reference: .* \\(it holds mu\\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"wrong shapes in --reference: .*: mu \[3\], sigma \[4, 4\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "non-finite values in --reference"),
        (None, "unreadable .npz in --reference"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(tmp_path, arrays, words):
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK\x03\x04 not a zip") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(InputError, match=words):
        load_statistics(path)
    with pytest.raises(InputError, match="no such file in --reference"):
        load_statistics(tmp_path / "none.npz")


@pytest.mark.parametrize(("rows", "words"), [(np.full((3, 2), np.inf), "non-finite values in features: 6 of 6"), (None, "too few samples")])
def test_features_that_cannot_be_used_are_refused(rows, words):
    found = FeatureStatistics(1, 2)
    with pytest.raises(InputError, match=words):
        found.add(np.zeros((1, 2)) if rows is None else rows)
        found.moments()


def test_other_features_than_the_references_are_refused():
    with pytest.raises(InputError, match="other features than the reference's: 3 and 4 numbers per image"):
        metrics.frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


def test_diversity_is_measured_between_samples_of_one_class():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), 30))
    images = (labels * 60)[:, None, None, None] + rng.integers(0, 10, size=(120, 1, 4, 4))
    seen = []

    def distance(x, y):
        seen.append((x, y))
        return (x - y).square().mean((1, 2, 3)).sqrt()

    def measured(labels):
        return evaluate([Samples("s", images.astype(np.uint8), labels)], images.astype(np.uint8), None, metrics=("lpips",), lpips=distance)

    alike, mixed = measured(labels)["sets"][0]["lpips"], measured(None)["sets"][0]["lpips"]
    assert alike["n"] == 100 and seen[0][0].shape == (20, 1, 64, 64) and seen[0][0].min() >= -1
    assert alike["mean"] < 0.1 < 0.4 < mixed["mean"] and 0 < alike["std"] < alike["mean"]
    with pytest.raises(InputError, match="too few samples for --metrics lpips: 2"):
        evaluate([Samples("s", images[:2].astype(np.uint8))], images.astype(np.uint8), None, metrics=("lpips",), lpips=distance)
    with pytest.raises(InputError, match="no weights for --metrics lpips"):
        evaluate([Samples("s", images.astype(np.uint8))], images.astype(np.uint8), None, metrics=("lpips",))


class Means(nn.Module):
    """Features and class scores of an image: its mean by channel."""

    def forward(self, x):
        means = x.mean((2, 3))
        return means, means


@pytest.mark.slow
def test_fifty_thousand_samples_stream_in_bounded_memory():
    blocks = np.random.default_rng(0).integers(0, 256, size=(4, 250, 3, 16, 16), dtype=np.uint8)
    count = 50_000
    stream = Stream((count, 3, 16, 16), lambda: (blocks[i % 4] for i in range(count // 250)))
    images = blocks[0][:100]
    extractor = ModuleFeatures(Means(), name="means")
    options = {"extractor": extractor, "metrics": ("fid", "is", "kid"), "galleries": {}}
    evaluate([Samples("warm", images)], images, None, **options)
    tracemalloc.start()
    try:
        row = evaluate([Samples("many", stream)], images, None, **options)["sets"][0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert row["count"] == row["fid"]["n"] == count and row["fid"]["features"] == "means"
    assert peak < 15e6 < 0.5 * count * 3 * 16 * 16, peak


@pytest.mark.parametrize("sizes", [[5] * 140, [256, 256], [700], [1, 600, 3], [300, 212, 1], [2]])
def test_blocks_do_not_depend_on_how_images_were_drawn(sizes):
    images = np.arange(sum(sizes) * 4).astype(np.uint8).reshape(-1, 1, 2, 2)
    parts = np.split(images, np.cumsum(sizes)[:-1])
    blocks = list(Samples("s", Stream(images.shape, lambda: parts)).blocks())
    np.testing.assert_array_equal(np.concatenate(blocks), images)
    assert [len(b) for b in blocks] == [len(b) for b in Samples("s", images).blocks()]


def test_a_stream_of_another_length_is_refused():
    images = np.zeros((10, 3, 4, 4), np.uint8)
    stream = Stream((20, 3, 4, 4), lambda: [images])
    with pytest.raises(InputError, match="other number of samples than announced in short: 10 of 20"):
        evaluate([Samples("short", stream)], images, None, extractor=ModuleFeatures(Means(), name="means"), metrics=("fid",))
