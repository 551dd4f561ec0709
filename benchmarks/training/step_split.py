"""Where a training step's time goes: marks between its phases, on the host's clock or as events on the CUDA stream."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastcm import kernels
from fastcm.benchmarks.interleaved import rounded
from fastcm.training.trainer import Trainer

PHASES = ("data", "perturb", "student", "target", "distance", "backward", "optimizer")


class NoClock:
    """Takes marks and keeps none."""

    def mark(self, phase: str) -> None:
        """Nothing: a step that is timed whole must not pay for its parts."""


NO_CLOCK = NoClock()


class Clock:
    """mark(phase) ends the phase that began at the last mark; on CUDA it waits for nothing, and phases are the stream's."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str | None, Any]] = []
        self.steps: list[dict[str, float]] = []

    def mark(self, phase: str | None) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, time.perf_counter()))

    def end_step(self) -> None:
        """Adds up the phases since the last call; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        step = dict.fromkeys(PHASES, 0.0)
        for (_, start), (phase, end) in zip(self.marks, self.marks[1:], strict=False):
            step[phase] += start.elapsed_time(end) if self.cuda else (end - start) * 1000
        self.steps.append(step)
        self.marks.clear()

    def split(self) -> dict[str, float]:
        """{"data_ms": ..., ...}: the median of each phase."""
        return {f"{phase}_ms": rounded(float(np.median([step[phase] for step in self.steps]))) for phase in PHASES}


def split_step(step: Callable[[], object], clock: Clock, *, steps: int) -> dict[str, float]:
    """The phases of `step`, which marks their ends on the clock."""
    for _ in range(steps):
        clock.mark(None)
        step()
        clock.end_step()
    return clock.split()


@contextmanager
def marked(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """Within, the trainer's own step marks its phases: the end of the call named, with all that led to it since the last mark.

    What the step does before it asks for images (its scalars) belongs to the optimizer, and so does zeroing the gradient.
    Recorded steps have no calls to mark: within, steps are plain.
    """

    def before(call, phase):
        def marked_call(*args, **options):
            clock.mark(phase() if callable(phase) else phase)
            return call(*args, **options)

        return marked_call

    def after(call, phase):
        def marked_call(*args, **options):
            result = call(*args, **options)
            clock.mark(phase() if callable(phase) else phase)
            return result

        return marked_call

    def network_phase() -> str:
        return "student" if torch.is_grad_enabled() else "target"

    optimizer, loss = trainer.optimizer, trainer.method_loss
    with ExitStack() as stack:
        for network in {id(network): network for network in (loss.student.network, loss.target.network)}.values():
            stack.enter_context(mock.patch.object(network, "forward", after(network.forward, network_phase)))
        stack.enter_context(mock.patch.object(trainer.work, "graphs", None))
        for owner, name, call in (
            (trainer, "next_batch", before(after(trainer.next_batch, "data"), "optimizer")),
            (kernels, "perturb", after(kernels.perturb, "perturb")),
            (kernels, "distance", after(kernels.distance, "distance")),
            (optimizer, "zero_grad", after(optimizer.zero_grad, "optimizer")),
            (optimizer, "gradient_norm", before(optimizer.gradient_norm, "backward")),
            (trainer, "train_step", after(trainer.train_step, "optimizer")),
        ):
            stack.enter_context(mock.patch.object(owner, name, call))
        yield
