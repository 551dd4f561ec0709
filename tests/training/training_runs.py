"""Small runs that the tests of training share: a network of a few thousand weights on the built-in digits."""

import functools
import signal
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastcm import runs
from fastcm.training.monitor import Monitor
from fastcm.training.run import RunResult
from fastcm.training.trainer import Trainer

SMALL = {
    "network.channels": 8,
    "network.head_channels": 8,
    "network.channel_mult": (1, 2),
    "network.blocks": 1,
    "batch": 16,
    "precision": "fp32",
    "device": "cpu",
    "compile": "off",
    "checkpoint_every_s": 1e9,
}


def small_run(
    out: Path, *, kimg: float = 0.16, method: str | None = None, teacher: str | None = None, callbacks=(), drawn: bool = False, **changes
) -> RunResult:
    """Trains digits with the small network for `kimg` thousand images (ten steps by default).

    drawn: with the samples and the self-consistency at its end, a third of a short run's time.
    """
    ready = runs.plan("digits", method=method, teacher=teacher, out=out, changes={**SMALL, "duration_kimg": kimg, **changes})
    with nullcontext() if drawn else undrawn():
        return runs.start(ready, callbacks=callbacks)


def undrawn():
    """Within, runs end without samples."""
    return mock.patch.object(Monitor, "finish")


@contextmanager
def recorded_losses():
    """Within, the loss of every step goes to the list that this yields."""
    losses, original = [], Trainer.train_step

    def step(self):
        values = original(self)
        losses.append(float(self.loss))
        return values

    Trainer.train_step = step
    try:
        yield losses
    finally:
        Trainer.train_step = original


def stop_after(steps):
    """A Trainer.train_step that raises SIGINT's request after `steps` steps of this process."""
    taken, original = [], Trainer.train_step

    def step(self):
        values = original(self)
        taken.append(1)
        if len(taken) == steps:
            signal.raise_signal(signal.SIGINT)
        return values

    return step


def run_out_of_memory(*, above):
    """A Trainer.losses that has no room for more images than `above`: it fails as CUDA does, after the pass forward."""
    original = Trainer.losses

    def losses(self, batch):
        result = original(self, batch)
        if len(batch.images) > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    return losses


@pytest.fixture(name="no_recompilation")
def after_the_first_steps(monkeypatch):
    """Fails where a step after the third compiles anew; yields (N, mu, rate) of each. The graph is captured as for Inductor, run as it is.

    Import `after_the_first_steps` and take `no_recompilation`.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    original, seen, warm = Trainer.train_step, [], ExitStack()

    def step(self):
        if self.step == 2:
            warm.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
        values = original(self)
        seen.append((values.steps, values.mu, values.lr))
        return values

    monkeypatch.setattr(Trainer, "train_step", step)
    with warm:
        yield seen
