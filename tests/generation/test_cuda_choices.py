"""Settings of CUDA's libraries: taken while they are needed, by as many threads as want them, and given back."""

import threading

import pytest
import torch

from fastcm.generation.cuda_choices import exact_fp32, tried_convolutions


@pytest.fixture(params=[True, False])
def before(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param)
    yield request.param
    torch.backends.cudnn.allow_tf32 = True


def test_fp32_is_fp32_until_the_last_thread_has_left(before):
    cudnn, entered, leave, seen = torch.backends.cudnn, threading.Event(), threading.Event(), []

    def work():
        with exact_fp32(True):
            entered.set()
            leave.wait(60)
            seen.append(cudnn.allow_tf32)

    with exact_fp32(False):
        assert cudnn.allow_tf32 == before
    thread = threading.Thread(target=work)
    with exact_fp32(True):
        thread.start()
        entered.wait(60)
    assert not cudnn.allow_tf32  # the other thread is still within
    leave.set()
    thread.join()
    assert seen == [False] and cudnn.allow_tf32 == before


def test_convolutions_are_tried_unless_results_must_repeat(monkeypatch):
    cudnn = torch.backends.cudnn
    with tried_convolutions():
        assert cudnn.benchmark
    assert not cudnn.benchmark
    monkeypatch.setattr(cudnn, "deterministic", True)
    with tried_convolutions():
        assert not cudnn.benchmark
