"""The protocol: equal counts on both sides, a perfect generator at the real figure, a broken one far from it."""

import numpy as np
import pytest
import torch

from fastcm.errors import InputError
from fastcm.evaluation import features, halves, report
from fastcm.evaluation.extractors import ModuleFeatures
from fastcm.evaluation.halves import Features, TrainingJudge, over_splits, paired
from fastcm.evaluation.protocol import evaluate
from fastcm.evaluation.samples import Samples


def pictures(count, *, seed, classes=4, noise=40):
    """Noisy versions of one random picture per class: (uint8 [N, 1, 8, 8], labels)."""
    rng = np.random.default_rng(seed)
    bases = np.random.default_rng(9).integers(0, 256, size=(classes, 1, 8, 8))
    labels = np.arange(count) % classes
    return np.clip(np.round(bases[labels] + rng.normal(size=(count, 1, 8, 8)) * noise), 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def world():
    """(images, labels, judge) of a data set of 400 pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STEPS", (40, 40))
        images, labels = pictures(400, seed=0)
        return images, labels, features.train_judge(images, labels)


def figures(world, images, labels, **options):
    return evaluate([Samples("set", images, labels)], world[0], world[1], judge=world[2], **options)["sets"][0]


def test_both_sides_have_equal_counts_of_each_class():
    rng = np.random.default_rng(0)
    wanted, labels = rng.integers(0, 3, 50), rng.integers(0, 4, 60)
    kept, drawn = paired(wanted, labels, rng.permutation(60))
    assert len(set(drawn)) == len(drawn) and len(set(kept)) == len(kept)
    counts = np.minimum(np.bincount(wanted, minlength=3), np.bincount(labels, minlength=4)[:3])
    np.testing.assert_array_equal(np.bincount(wanted[kept], minlength=3), counts)
    np.testing.assert_array_equal(np.bincount(labels[drawn], minlength=3), counts)
    kept, drawn = paired(wanted, None, rng.permutation(20))
    assert len(kept) == len(drawn) == 20


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_a_perfect_generator_has_the_real_figure(monkeypatch, balanced, labelled):
    """Over many draws of data and generator from one distribution, the ratio of the means is 1: neither side gains by its count."""
    monkeypatch.setattr(halves, "SPLITS", 5)
    rng = np.random.default_rng(1)

    def drawn(count):
        labels = rng.integers(0, 5, count)
        return Features(rng.normal(size=(count, 6)) + 4 * np.eye(5, 6)[labels], labels)

    pairs = []
    for _ in range(30):
        reference, generated = drawn(80), drawn(200)
        generated = generated if labelled else Features(generated.values, None)
        fd = over_splits(generated, reference, metrics=("fd",), balanced=balanced)["fd"]
        pairs.append((fd["mean"], fd["real"]["mean"]))
    ratio = np.mean(pairs, axis=0)[0] / np.mean(pairs, axis=0)[1]
    # Unlabelled samples bring class counts of their own, which balanced halves do not have: there the figure may only be higher.
    assert 0.9 < ratio < (1.1 if labelled or not balanced else 2)


@pytest.mark.slow
def test_fresh_images_score_like_real_ones(world):
    row = figures(world, *pictures(400, seed=5))
    assert row["accuracy"] > 0.9
    assert row["fd"]["ratio"] < 1.6 and row["fd_balanced"]["ratio"] < 1.6 and abs(row["kid"]["mean"]) < 5 * row["kid"]["std"]
    assert row["precision"]["mean"] > 0.8 and row["recall"]["mean"] > 0.8
    assert row["neighbours"]["closer_share"] < 0.1 and row["neighbours"]["identical"] == 0


@pytest.mark.parametrize("broken", ["zeros", "noise", "one class"])
@pytest.mark.slow
def test_a_broken_generator_scores_badly(world, broken):
    images, labels = pictures(400, seed=5)
    if broken == "zeros":
        images = np.full_like(images, 128)
    elif broken == "noise":
        images = np.random.default_rng(2).integers(0, 256, size=images.shape).astype(np.uint8)
    else:
        images = images[labels == 0].repeat(4, axis=0)
    row = figures(world, images, labels)
    assert row["accuracy"] < 0.5
    assert row["fd"]["ratio"] > 10 and row["fd_balanced"]["ratio"] > 10 and row["fid"]["mean"] > 10 * row["fd"]["real"]["mean"]
    assert row["recall"]["mean"] < 0.5


def test_permuted_labels_are_at_chance(world):
    images, labels = pictures(400, seed=5)
    row = figures(world, images, np.random.default_rng(0).permutation(labels), metrics=("accuracy",))
    assert row["accuracy"] == pytest.approx(0.25, abs=0.08)
    assert set(row) == {"name", "count", "nfe", "accuracy", "accuracy_by_class"}


def test_copies_are_detected_with_and_without_held_out_rows(world):
    images, labels, _ = world
    result = evaluate([Samples("set", images, labels)], images, labels, metrics=("neighbours",))
    copies = result["sets"][0]["neighbours"]
    assert result["protocol"]["neighbours_real"] == "training images, leave-one-out"
    assert copies["closer_share"] == 1 and copies["identical"] == 400
    held_out = np.arange(300, 400)
    row = figures(world, images[held_out], labels[held_out], metrics=("neighbours",), held_out=held_out)["neighbours"]
    assert row["identical"] == 0 and row["train_count"] == 300 and row["real_count"] == 100


def test_the_judge_given_as_the_feature_network_is_the_judge(world):
    images, labels = pictures(100, seed=5)
    options = {"metrics": ("fid", "kid")}
    as_judge = evaluate([Samples("set", images, labels)], world[0], world[1], judge=world[2], **options)
    assert as_judge == evaluate([Samples("set", images, labels)], world[0], world[1], extractor=world[2], **options)
    assert as_judge["protocol"]["reference_count"] == len(world[2].reference)
    other = features.Judge(world[2].network, shape=(1, 8, 8), seed=0, fit=world[2].fit, reference=world[2].reference)
    assert other.sha256 == world[2].sha256


def test_another_network_may_not_call_itself_judge(world):
    module = ModuleFeatures(torch.nn.Flatten(), name="judge")
    with pytest.raises(InputError, match="a name that is taken in features: judge"):
        evaluate([Samples("set", world[0])], world[0], world[1], extractor=module, metrics=("fid",))


@pytest.mark.slow
def test_figures_are_deterministic(world):
    images, labels = pictures(100, seed=5)
    assert figures(world, images, labels) == figures(world, images, labels)


@pytest.mark.slow
def test_unlabelled_samples_have_distances_and_no_accuracy(world):
    row = figures(world, pictures(400, seed=5)[0], None)
    assert "accuracy" not in row and row["fd"]["n"] == 100 and row["fd"]["ratio"] < 2


def test_few_samples_reduce_both_sides(world):
    row = figures(world, *pictures(40, seed=5))
    assert row["fd"]["n"] == 40
    full = figures(world, *pictures(400, seed=5))
    assert row["fd_balanced"]["real"]["mean"] > 1.3 * full["fd_balanced"]["real"]["mean"], "real needs the bias of the same small count"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": ("fdd",)}, "unknown metric in --metrics: fdd. .*Did you mean 'fd'"),
        ({"metrics": ()}, "no metric in --metrics"),
        ({"labels": None}, "unlabelled data with --metrics"),
        ({"samples": np.zeros((9, 3, 8, 8), np.uint8)}, "images of another shape than --data in set"),
        ({"samples": np.zeros((1, 1, 8, 8), np.uint8), "metrics": ("fd",)}, "too few samples"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(world, change, words):
    images, labels, judge = world
    samples = Samples("set", change.pop("samples", images[:9]))
    with pytest.raises(InputError, match=words):
        evaluate([samples], images, change.pop("labels", labels), judge=judge, **change)


def test_unlabelled_data_still_have_neighbours(world):
    result = evaluate([Samples("set", world[0][:9])], world[0], None, metrics=("neighbours",))
    assert result["sets"][0]["neighbours"]["identical"] == 9
    assert "identical to a training image" in report.text(result)


@pytest.mark.slow
def test_the_judge_of_the_trainer_prefers_the_better_generator(monkeypatch):
    monkeypatch.setattr(features, "STEPS", (40, 40))
    asked = []

    def generator(noise):
        def draw(seeds, labels):
            asked.append(seeds)
            np.testing.assert_array_equal(labels, seeds % 4)
            return pictures(len(seeds), seed=6, noise=noise)[0].transpose(0, 2, 3, 1)

        return draw

    judge = TrainingJudge(*pictures(400, seed=0))
    good, bad = judge.figures(generator(40)), judge.figures(generator(90))
    assert good["score"] < 1.6 and bad["score"] > 2 * good["score"] and bad["fd"] > good["fd"] and good["accuracy"] >= bad["accuracy"]
    assert min(map(min, asked)) >= 200_000, "the seeds that choose a model must not be those that are published"


def test_the_report_holds_the_figures_and_the_protocol(world):
    images, labels = pictures(100, seed=5)
    result = evaluate([Samples("1 step", images, labels, 1)], world[0], world[1], judge=world[2])
    text = report.text(result)
    row = result["sets"][0]
    shown = (f"{row['accuracy']:.2%}", f"{row['fd']['mean']:.2f}", f"{row['fd_balanced']['ratio']:.2f}", f"{row['recall']['mean']:.3f}")
    assert all(part in text for part in shown)
    assert result["protocol"]["reference_sha256"][:16] in text and "seed 0" in text and f"{halves.SPLITS} fixed halvings" in text
    assert max(map(len, text.splitlines())) <= 120
