"""Several processes train as one does: the same losses, the same order, one writer, one end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import recorded_losses, small_run, stop_after

from fastcm.errors import InputError
from fastcm.training import gradient_reduction
from fastcm.training.config import OptimizerConfig
from fastcm.training.gradient_reduction import GradientReduction
from fastcm.training.optimizer import FlatOptimizer
from fastcm.training.parallel import Processes
from fastcm.training.trainer import Trainer

WORKER = str(Path(__file__).with_name("parallel_worker.py"))
TRAIN = (
    "train",
    "digits",
    "--set",
    "network.channels=8",
    "--set",
    "network.head_channels=8",
    "--batch",
    "16",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--checkpoint-every",
    "0s",
)


def start(size, command):
    """The processes, with the variables that torchrun would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finished(processes, timeout=240):
    """(exit codes, what each said on stderr); none is left behind."""
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def run_parts(size, folder, *parts):
    codes, said = finished(start(size, [WORKER, str(folder), *parts]))
    assert codes == [0] * size, said
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(size)]


def checkpoint(out):
    newest = sorted((out / "checkpoints").iterdir())[-1]
    return {(path.stem, name): tensor for path in newest.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        np.testing.assert_allclose(tensor, b[key], rtol=1e-3, atol=1e-5, err_msg=str(key))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    with recorded_losses() as alone:
        small_run(tmp_path / "alone")
    with recorded_losses() as alone_sct:
        small_run(tmp_path / "alone-sct", method="sct", kimg=0.064)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after(4))
        assert small_run(tmp_path / "resumed").nimg == 64
    first, second = run_parts(2, tmp_path, "whole", "stopped", "resumed", "learned_weight", "short_of_memory", "apart", "undivided")
    np.testing.assert_allclose(first["whole"], alone, rtol=1e-5)
    assert first["whole"] == second["whole"] and len(alone) == 10
    weights = checkpoint(tmp_path / "alone")
    assert weights["ema_0", "out.2.weight"].abs().sum() > 0
    assert_close(checkpoint(tmp_path / "whole"), weights)
    assert json.loads((tmp_path / "whole" / "config.json").read_text()) == json.loads((tmp_path / "alone" / "config.json").read_text())

    assert first["stopped"] == second["stopped"] == [signal.SIGINT, 64]
    assert small_run(tmp_path / "stopped").nimg == 160  # alone from here on
    assert_close(checkpoint(tmp_path / "stopped"), weights)
    assert first["resumed"] == second["resumed"] == 160
    assert_close(checkpoint(tmp_path / "resumed"), weights)

    np.testing.assert_allclose(first["learned_weight"], alone_sct, rtol=1e-4)
    assert_close(checkpoint(tmp_path / "sct"), checkpoint(tmp_path / "alone-sct"))
    np.testing.assert_allclose(first["short_of_memory"], alone, rtol=1e-5)
    assert "differ between the processes" in first["apart"] and first["apart"] == second["apart"]
    assert "--batch: 15 (2 processes)" in first["undivided"]


@pytest.mark.long
def test_four_processes_give_the_same_hundred_losses(tmp_path):
    with recorded_losses() as alone:
        small_run(tmp_path / "alone", kimg=0.8, batch=8)
    seen = run_parts(4, tmp_path, "hundred")
    assert len(alone) == 100 and all(row["hundred"] == seen[0]["hundred"] for row in seen)
    np.testing.assert_allclose(seen[0]["hundred"], alone, rtol=1e-5)


@pytest.mark.slow
def test_the_first_error_is_shown_once_and_ends_all(tmp_path):
    codes, said = finished(start(2, [WORKER, "fail", *TRAIN, "--duration", "10kimg", "--out", str(tmp_path / "run")]), timeout=120)
    assert codes == [2, 2]
    assert "fastcm: error: rank 1: a fault of the second process" in said[1]
    assert "error" not in said[0]


@pytest.mark.slow
def test_a_killed_process_ends_the_others_within_seconds(tmp_path):
    out = tmp_path / "run"
    processes = start(2, ["-m", "fastcm", *TRAIN, "--duration", "1000kimg", "--out", str(out)])
    until = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.05)
    processes[1].kill()
    killed = time.monotonic()
    codes, said = finished(processes, timeout=60)
    assert codes == [1, -9] and time.monotonic() - killed < 30
    assert "rank 0: a process of the run ended or fell silent" in said[0] and "to resume" in said[0]
    assert list(out.glob("checkpoints/step-*"))


def test_one_process_needs_nobody():
    alone = Processes()
    assert alone.share(15) == 15 and alone.agree(3, 1) == (3, 1) and alone.from_writer({"a": 1}) == {"a": 1} and alone.is_writer
    alone.barrier()
    with alone.writer_first():
        pass
    with pytest.raises(InputError, match=r"--batch: 15 \(4 processes\)"):
        share = Processes()
        share.size = 4
        share.share(15)


def test_chunks_leave_during_the_backward_pass_in_one_order(monkeypatch):
    """Two processes' sums without the second process: what is sent is doubled."""
    sent, chunks_at_end = [], []

    class Work:
        def wait(self):
            pass

    def all_reduce(tensor, group, async_op):
        sent.append((tensor.data_ptr(), tensor.numel()))
        tensor.mul_(2)
        return Work()

    monkeypatch.setattr(gradient_reduction.dist, "all_reduce", all_reduce)
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    optimizer = FlatOptimizer(network, None, OptimizerConfig())
    reduction = GradientReduction([optimizer], Processes(), chunk_bytes=2 * 32 * 33 * 4)
    assert len(reduction.chunks) == 3

    def backward(*, armed):
        optimizer.zero_grad()
        if armed:
            reduction.arm()
        x = torch.linspace(-1, 1, 32).expand(4, 32)
        network(x).square().sum().backward()
        chunks_at_end.append(len(sent))
        return optimizer.gradient.clone()

    plain = backward(armed=False)
    assert sent == []
    backward(armed=True)
    reduction.finish()
    assert chunks_at_end[-1] == len(sent) == 3  # all left before the pass was over
    assert torch.equal(optimizer.gradient, 2 * plain) and plain.norm() > 0
    begins = [begin for begin, _ in sent]
    assert begins == sorted(begins, reverse=True) and sum(size for _, size in sent) == optimizer.layout.size

    sent.clear()
    network[3].requires_grad_(False)  # its hooks stay silent: nothing after its chunk may overtake it
    backward(armed=True)
    assert 0 < chunks_at_end[-1] < 3
    reduction.finish()
    assert [begin for begin, _ in sent] == begins
