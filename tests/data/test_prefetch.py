"""Batches prepared ahead, or taken from the device: the same as the data set's own, in any order; errors, ends, waiting."""

import threading
import time

import numpy as np
import pytest
import torch
from random_pictures import random_pixels

from fastcm.data import prefetch
from fastcm.data.dataset import open_dataset
from fastcm.data.prefetch import Prefetcher, ResidentBatches, batches
from fastcm.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def dataset():
    return open_dataset((random_pixels(37, 4, 4, 3), np.arange(37) % 5))


def same(a, b):
    return all((x is None) == (y is None) and (x is None or torch.equal(x.cpu(), y)) for x, y in zip(a, b, strict=True))


def slowed(dataset, seconds):
    """The data set with a `batch` that takes its time and writes down what was asked for."""
    asked, real = [], dataset.batch

    def batch(first, size, *, seed):
        asked.append(first)
        time.sleep(seconds)
        return real(first, size, seed=seed)

    object.__setattr__(dataset, "batch", batch)
    return asked


@pytest.mark.parametrize("kind", ["ahead", "resident"])
def test_equal_to_the_data_sets_own_batches(dataset, kind):
    """In the order of a run of two processes, after a jump back (resumed), and the same batch twice (memory ran out)."""
    source = Prefetcher(dataset, seed=3, size=8, stride=16) if kind == "ahead" else ResidentBatches(dataset, seed=3, size=8, device=CPU)
    for first in (8, 24, 40, 40, 56, 8, 24, 1000):
        assert same(source.batch(first), dataset.batch(first, 8, seed=3)), first
    source.close()


def test_unlabelled(dataset):
    plain = open_dataset(random_pixels(5, 4, 4))
    with Prefetcher(plain, seed=0, size=3, stride=3) as source:
        assert same(source.batch(0), plain.batch(0, 3, seed=0)) and source.batch(3)[1] is None
    assert ResidentBatches(plain, seed=0, size=3, device=CPU).batch(0)[1] is None


def test_prepared_while_the_caller_works(dataset):
    asked = slowed(dataset, 0.05)
    with Prefetcher(dataset, seed=0, size=4, stride=12) as source:
        source.batch(0)
        assert source.wait_s >= 0.05
        waited = source.wait_s
        for step in range(1, 4):
            time.sleep(0.25)
            assert asked[-1] >= 12 * (step + 1), "nothing was prepared ahead"
            source.batch(12 * step)
        assert source.wait_s - waited < 0.05
        fast = source.wait_s
        for step in range(4, 8):
            source.batch(12 * step)
        assert source.wait_s - fast > 0.05, "waiting was not counted"
    assert asked == list(range(0, 12 * len(asked), 12)), "a batch was prepared twice, or another than the next"


def test_errors_reach_the_call_for_their_batch(dataset):
    real = dataset.batch

    def batch(first, size, *, seed):
        if first == 8:
            raise InputError("unreadable picture in --data: x.png (broken). Repair it.")
        return real(first, size, seed=seed)

    object.__setattr__(dataset, "batch", batch)
    with Prefetcher(dataset, seed=0, size=4, stride=4) as source:
        source.batch(0)
        source.batch(4)
        for _ in range(2):
            with pytest.raises(InputError, match=r"x\.png"):
                source.batch(8)
        assert same(source.batch(12), real(12, 4, seed=0))


def test_close_ends_the_thread_at_once(dataset):
    asked = slowed(dataset, 0.1)
    before = threading.active_count()
    source = Prefetcher(dataset, seed=0, size=4, stride=4, depth=50)
    source.batch(0)
    assert threading.active_count() == before + 1
    source.close()
    assert threading.active_count() == before and len(asked) <= 3


def test_small_sets_are_kept_on_a_gpu(dataset, monkeypatch):
    """Which way is chosen, without a GPU: 37 pictures of 48 bytes beside a memory of that size."""
    chosen = {}
    monkeypatch.setattr(prefetch, "ResidentBatches", lambda *args, **options: chosen.update(kind="resident"))
    monkeypatch.setattr(prefetch, "Prefetcher", lambda *args, pin, **options: chosen.update(kind=f"ahead, pinned {pin}"))

    def kind(device, memory):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"total_memory": memory}))
        batches(dataset, seed=0, size=4, stride=4, device=torch.device(device))
        return chosen["kind"]

    size = dataset.images.nbytes
    assert kind("cuda", 10 * size) == "resident" and kind("cuda", 10 * size - 1) == "ahead, pinned True"
    assert kind("cpu", 100 * size) == "ahead, pinned False"


@pytest.mark.gpu
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_on_a_gpu(dataset, monkeypatch, share):
    monkeypatch.setattr(prefetch, "RESIDENT_SHARE", share)
    source = batches(dataset, seed=3, size=8, stride=8, device=torch.device("cuda"))
    assert isinstance(source, ResidentBatches if share else Prefetcher)
    for first in range(0, 80, 8):
        parts = source.batch(first)
        assert same(parts, dataset.batch(first, 8, seed=3))
        assert parts[0].is_cuda if share else parts[0].is_pinned()
    source.close()
