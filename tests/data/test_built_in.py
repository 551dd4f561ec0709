"""The built-in sets: what they hold, and that what is held out is measured against and never trained on."""

import numpy as np
import pytest

from fastcm import runs
from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError
from fastcm.evaluation import features

COUNTS = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]


@pytest.fixture(scope="module")
def mnist():
    return open_dataset("mnist")


def test_mnist_has_a_held_out_end(mnist):
    assert mnist.images.shape == (10_000, 1, 28, 28) and mnist.held_out == 2000
    assert np.bincount(mnist.labels).tolist() == COUNTS and mnist.class_names == tuple("0123456789")
    training, held_out = mnist.for_training(), open_dataset("mnist:held-out")
    assert (len(training), training.held_out) == (8000, 0) and np.array_equal(training.images, mnist.images[:8000])
    assert held_out.name == "mnist:held-out" and np.array_equal(held_out.images, mnist.images[8000:])
    assert np.array_equal(held_out.labels, mnist.labels[8000:])
    assert len({mnist.fingerprint, training.fingerprint, held_out.fingerprint}) == 3
    assert not {image.tobytes() for image in held_out.images} & {image.tobytes() for image in training.images}


def test_a_run_trains_on_the_rest(mnist):
    ready = runs.plan("mnist")
    assert ready.config.data == "mnist" and ready.dataset.fingerprint == mnist.for_training().fingerprint
    assert runs.plan().config.preset == "mnist"
    assert len(open_dataset("digits").for_training()) == 1797


def test_other_sizes_keep_what_is_held_out():
    small = open_dataset("mnist", resolution=14)
    assert small.images.shape == (10_000, 1, 14, 14) and len(small.for_training()) == 8000


def test_held_out_pictures_are_not_trained_on():
    with pytest.raises(
        InputError, match=r"held-out pictures in --data: mnist:held-out\. They are kept to measure against: train on the rest"
    ):
        runs.plan("mnist", data="mnist:held-out")


@pytest.mark.parametrize(
    ("source", "hint"), [("mnist:test", "mnist:held-out"), ("digits:held-out", ""), ("mnist:heldout", "mnist:held-out")]
)
def test_other_parts_are_refused(source, hint):
    with pytest.raises(
        InputError, match=rf"unknown part of a built-in set in --data: {source}\. Use one of digits, emoji32, mnist"
    ) as error:
        open_dataset(source)
    assert str(error.value).endswith(f"Did you mean '{hint}'?") or not hint


@pytest.mark.slow
def test_the_judge_learns_from_what_is_not_held_out(mnist, monkeypatch):
    monkeypatch.setattr(features, "STEPS", (2, 2))
    held_out = np.arange(8000, 10_000)
    judge = features.train_judge(mnist.images, mnist.labels, held_out=held_out)
    assert np.array_equal(judge.reference, held_out) and np.array_equal(judge.fit, np.arange(8000))
    expected = np.mean(judge.predict(mnist.images[8000:]) == mnist.labels[8000:])
    assert judge.held_out_accuracy == pytest.approx(expected)
