"""The pretended devices behave as CUDA does where fastcm relies on it; and what ran wrong before shows there when it is put back."""

import faulthandler
import gc
import sys
import threading

import numpy as np
import pytest
import torch
from test_captured_step import on_the_gpu, steps
from torch import nn

from fastcm.generation import cuda_graph
from fastcm.training.captured_step import WARM_UP
from fastcm.training.step_scalars import StepScalars

pytestmark = [pytest.mark.gpu, pytest.mark.skipif("pretended" not in sys.modules, reason="of the pretended devices alone")]


@pytest.fixture
def ops():
    return sys.modules["pretended"].ops


def captured(work, stream=None):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream or torch.cuda.Stream()):
        result = work()
    return graph, result


def test_devices_do_not_mix():
    here, there = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
    for other in (torch.ones(3), there):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
    assert (here + torch.tensor(1.0)).tolist() == [2] * 3 and (there * 2).get_device() == 1
    with pytest.raises(RuntimeError, match="same device"):
        nn.Linear(3, 3).cuda()(torch.ones(1, 3))
    with pytest.raises(TypeError):
        here.numpy()


def test_what_nobody_wrote_is_not_a_number():
    x = torch.empty(4, device="cuda")
    assert torch.isnan(x).all()


def test_gradients_are_the_cpus():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(32, 2))
    x = torch.randn(3, 2, 4, 4)
    network(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    network.cuda()(x.cuda()).square().sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient)


def test_a_graph_repeats_its_work_on_its_places():
    x, number = torch.ones(2, device="cuda"), [3]
    graph, y = captured(lambda: x * number[0] + 1)
    assert torch.isnan(y).all()  # nothing ran
    number[0] = 5
    for value in (1, 2):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [3 * value + 1] * 2  # the number of the capture
    assert graph.nodes() == ["aten::mul", "aten::add"]
    x = None
    with pytest.raises(RuntimeError, match="memory that was freed after its capture"):
        graph.replay()


def test_a_capture_changes_nothing():
    x = torch.ones(2, device="cuda")
    graph, _ = captured(lambda: x.add_(1))
    assert x.tolist() == [1, 1]
    graph.replay()
    assert x.tolist() == [2, 2]


@pytest.mark.parametrize(
    "work",
    [
        float,
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x.copy_(torch.zeros(1)),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.zeros(2).pin_memory(),
    ],
)
def test_what_a_capture_does_not_permit(work):
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        captured(lambda: work(x))
    torch.cuda.set_stream(torch.cuda.default_stream())  # which torch does not, where a capture's end fails
    with pytest.raises(RuntimeError, match="non-default stream"):
        captured(lambda: x + 1, stream=torch.cuda.default_stream())


def test_copies_that_are_not_waited_for():
    source, x = torch.arange(3.0).pin_memory(), torch.empty(3, device="cuda")
    x.copy_(source, non_blocking=True)
    back = torch.empty(3).pin_memory()
    back.copy_(x, non_blocking=True)
    assert np.isnan(back.numpy()).all()
    torch.cuda.current_stream().synchronize()
    assert back.tolist() == [0, 1, 2]
    x.copy_(source, non_blocking=True)
    source[0] = 7
    with pytest.raises(RuntimeError, match="pinned memory was changed"):
        torch.cuda.synchronize()


def test_threads_do_not_wait_for_each_other_for_ever():
    """A copy holds the devices' lock and asks for Python's; a slice has Python's and asks for the devices'."""
    here, there = torch.zeros(4, device="cuda"), torch.ones(4)
    works = (lambda: there.copy_(here), lambda: here[1:])
    threads = [threading.Thread(target=lambda work=work: [work() for _ in range(20_000)]) for work in works]
    faulthandler.dump_traceback_later(240, exit=True)  # no signal reaches a thread that waits for Python's lock
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    faulthandler.cancel_dump_traceback_later()


def test_memory_runs_out(ops):
    now = torch.cuda.memory_allocated()
    ops.set_limit(now + 1000)
    try:
        x = torch.zeros(200, device="cuda")
        assert torch.cuda.memory_allocated() == now + 800
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(100, device="cuda")
        del x
        torch.zeros(100, device="cuda")
    finally:
        ops.set_limit(1 << 40)


def test_a_trainer_records_on_the_second_device_and_leaves_nothing():
    before = torch.cuda.memory_allocated()
    made, plain = (
        on_the_gpu(recorded=recorded, precision="fp32", device=device) for recorded, device in ((True, "cuda:1"), (False, "cuda"))
    )
    found, expected = steps(made, WARM_UP + 3), steps(plain, WARM_UP + 3)
    assert made.work.is_replayed and made.loss.get_device() == 1 and torch.cuda.current_device() == 0
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for trainer in (made, plain):
        trainer.close()
    gc.disable()
    try:
        del made, plain, trainer
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


# Defects of before, put back


def waits_of(ops, scalars):
    values = type("Values", (), {"lr": 1.0, "mu": 0.5, "ema_decays": (0.9, 0.99), "steps": 3, "tangent_warmup": 1.0})
    before = ops.waits()
    scalars.set(values)
    return ops.waits() - before


def test_a_number_that_is_assigned_waits(ops, monkeypatch):
    scalars = StepScalars(2, torch.device("cuda"))
    assert waits_of(ops, scalars) == 0

    class Assigned:  # `ema_decays[index] = decay` in the place of a fill
        def __getitem__(self, index):
            return type("Place", (), {"fill_": lambda place, decay: tensor.__setitem__(index, decay)})()

    tensor, scalars.ema_decays = scalars.ema_decays, Assigned()
    assert waits_of(ops, scalars) == 2


def test_a_graph_that_does_not_keep_its_level_is_found_out():
    batch = kept_constant()
    assert batch(np.arange(3), None)[0].tolist() == [0, 2, 4]
    batch = kept_constant()
    del batch._run
    with pytest.raises(RuntimeError, match="memory that was freed after its capture"):
        batch(np.arange(3), None)


def kept_constant():
    constant = torch.full((3,), 2.0, device="cuda")
    return cuda_graph.CapturedBatch(
        lambda seeds, labels: (seeds * constant,), np.arange(3), None, pool=torch.cuda.graph_pool_handle(), stream=torch.cuda.Stream()
    )


def test_a_capture_on_another_devices_stream_is_empty():
    x = torch.ones(2, device="cuda:1")
    graph, y = captured(lambda: x * 2, stream=torch.cuda.Stream("cuda:0"))
    x.fill_(3)
    graph.replay()
    assert graph.nodes() == [] and y.tolist() == [2, 2]  # what the capture drew, for ever


def test_two_captures_at_once_break_each_other():
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        captured(lambda: captured(lambda: x + 1)[1] + x)
    torch.cuda.set_stream(torch.cuda.default_stream())
