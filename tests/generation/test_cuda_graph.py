"""Captures: what keeps the memory that a graph reads, what a failure leaves behind, two threads, two devices."""

import logging
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from test_generator import small_denoiser

from fastcm.generation import cuda_graph
from fastcm.generation import generator as generator_module
from fastcm.generation.cuda_graph import CapturedBatch, cause_of, recorded
from fastcm.generation.generator import Generator


def test_the_cause_of_a_broken_recording():
    first, last = RuntimeError("not permitted"), RuntimeError("capture_end")
    memory = torch.OutOfMemoryError("out of memory")
    last.__context__ = first
    assert cause_of(last) is first and cause_of(first) is first
    first.__context__, memory.__context__ = memory, ValueError("unrelated")
    assert cause_of(last) is memory


# On a device, pretended or not


def cuda_generator(denoiser=None, device="cuda", **options):
    return Generator(denoiser or small_denoiser(), {"resolution": 8, "channels": 1}, device=device, precision="fp32", **options)


def looking_at(condition):
    """A denoiser whose network looks at a value on the host, which no capture allows, where the condition holds for the batch."""
    denoiser = small_denoiser(classes=None)

    def look(network, inputs):
        if condition(inputs[0]):
            float(inputs[0].sum())

    denoiser.network.register_forward_pre_hook(look)
    return denoiser


@pytest.mark.gpu
def test_a_graph_keeps_what_it_reads():
    constant = torch.full((3,), 2.0, device="cuda")
    alive = weakref.ref(constant)
    batch = CapturedBatch(
        lambda seeds, labels, constant=constant: (seeds * constant,),
        np.arange(3),
        None,
        pool=torch.cuda.graph_pool_handle(),
        stream=torch.cuda.Stream(),
    )
    del constant
    other = torch.full((3,), 7.0, device="cuda")  # which would lie there
    assert batch(np.arange(3) + 1, None)[0].tolist() == [2, 4, 6] and other.tolist() == [7] * 3
    del batch
    assert alive() is None


@pytest.mark.gpu
def test_levels_come_and_go(monkeypatch):
    """Whatever was forgotten meanwhile, a noise level has its images."""
    monkeypatch.setattr(generator_module, "LEVELS_KEPT", 2)
    ours, alone = cuda_generator(), Generator(small_denoiser(), {}, device="cpu")
    for sigma in (5.0, 4.0, 3.0, 5.0, 4.0):
        levels = {"sigmas": (80.0, sigma), "output": "float"}
        np.testing.assert_allclose(ours(range(2), **levels), alone(range(2), **levels), atol=1e-4)
    assert [key[1] for key in ours._graphs] == [(80.0, 4.0)]  # each goes with its levels


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_thread_where_it_was(caplog):
    ours = cuda_generator(looking_at(lambda x: len(x) == 2))
    before = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, "fastcm"):
        images = ours(range(2))
    assert torch.cuda.current_stream() == before
    (line,) = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert "no CUDA graph for batches of 2:" in line and "captur" in line and "previous error" not in line
    assert np.array_equal(images, ours(range(4))[:2]) and list(ours._graphs.values())[-1] is not None
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_memory_that_runs_out_in_a_capture_halves_the_batch():
    def run_out(x):
        if len(x) == 8 and torch.cuda.is_current_stream_capturing():
            try:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            finally:
                float(x.sum())  # the capture breaks as well
        return False

    ours = cuda_generator(looking_at(run_out))
    ours.batch_size = 8
    assert len(ours(range(8))) == 8 and ours.batch_size == 4


@pytest.mark.gpu
def test_two_generators_capture_in_two_threads():
    alone = cuda_generator()(range(4))
    generators, results = [cuda_generator() for _ in range(2)], {}
    together = threading.Barrier(2)

    def work(number):
        together.wait(60)
        for size in (1, 2, 4):
            results[number, size] = generators[number](range(size))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(None not in generator._graphs.values() for generator in generators)
    assert all(np.array_equal(images, alone[:size]) for (_, size), images in results.items()) and len(results) == 6


@pytest.mark.gpu
def test_a_second_device_draws_its_own_images():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    first, second = cuda_generator(), cuda_generator(device="cuda:1")
    assert np.array_equal(first([0, 1]), second([0, 1]))
    assert np.array_equal(first([5, 6]), second([5, 6])) and not np.array_equal(first([5, 6]), first([0, 1]))
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_work_that_was_not_recorded_on_its_own_stream_is_in_no_graph():
    """What `recorded` is for: on another device's stream the work would run once and the graph be empty."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream("cuda:1")
    x = torch.ones(4, device="cuda:1")
    with recorded(graph, pool=torch.cuda.graph_pool_handle(), stream=stream):
        y = x * 2
    x.fill_(3)
    graph.replay()
    torch.cuda.synchronize("cuda:1")
    assert y.tolist() == [6.0] * 4


@pytest.mark.gpu
def test_after_a_failed_capture_an_older_allocator_goes_on(monkeypatch):
    if "pretended" in sys.modules:
        monkeypatch.setattr(sys.modules["pretended"], "failed_captures_stay", True)
    monkeypatch.setattr(cuda_graph, "ENDS_FAILED_CAPTURES", (99, 0))  # as before 2.12, where it has to be ended by hand
    value = torch.ones(1, device="cuda")
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    with pytest.raises(RuntimeError, match="captur"), recorded(torch.cuda.CUDAGraph(), pool=pool, stream=stream):
        float(value)
    torch.cuda.empty_cache()
    batch = CapturedBatch(lambda seeds, labels: (seeds * 2,), np.arange(3), None, pool=pool, stream=stream)
    assert batch(np.arange(3) + 4, None)[0].tolist() == [8, 10, 12]
