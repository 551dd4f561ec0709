"""The device's work of a training step, recorded as CUDA graphs and replayed: two launches a step, no allocation, no wait of the host."""

import sys
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fastcm import networks
from fastcm.consistency.objective import Batch
from fastcm.generation.cuda_graph import cause_of, recorded, warm_up

# Steps before the recording, in which libraries choose algorithms and compilers compile: a recording must not see either.
WARM_UP = 3
# Of losses and gradient norms with and without the recording: what a device adds up in another order differs in the last digits of bf16.
TOLERANCE = 1e-2


class Graphs(Protocol):
    """How work is recorded on a device."""

    def run(self, work: Callable[[], None]) -> None:
        """Does the work as it will be recorded, without a recording."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the work, without doing it, and returns what does it again on the same tensors."""


class CudaGraphs:
    """Records on a stream of its own; one memory pool serves all recordings, none of which runs beside another."""

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], None]) -> None:
        with warm_up(self.stream):
            work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with recorded(graph, pool=self.pool, stream=self.stream):
            work()
        return graph.replay


def graphs_for(device: torch.device, network: nn.Module) -> Graphs | None:
    """CUDA graphs for fastcm's own networks, None elsewhere: other people's may look at values on the host."""
    own = isinstance(network, tuple(kind for _, kind in networks.KINDS.values()))
    return CudaGraphs(device) if own and device.type == "cuda" else None


class CapturedStep:
    """Runs `gradients(batch)`, then `update()`: plainly where `graphs` is None, else from recordings after a few plain steps.

    Both functions return nothing and write tensors that keep their places: weights, gradient, loss, norm, counters. What changes from step
    to step they read from tensors; a Python number in them would be frozen. So before recorded gradients are used they are compared, on
    two batches, with those of the plain function, by `check()`: the loss and the gradient's norm as one tensor. Where they differ, or
    where recording fails, one line says so and every step is plain.
    """

    def __init__(
        self, gradients: Callable[[Batch], None], update: Callable[[], None], *, check: Callable[[], Tensor], graphs: Graphs | None
    ):
        self._gradients, self._update, self._check = gradients, update, check
        self.graphs = graphs
        self._batch: Batch | None = None  # where recordings find theirs
        self._replay_gradients: Callable[[], None] | None = None
        self._replay_update: Callable[[], None] | None = None
        self._plain_steps = 0

    @property
    def is_replayed(self) -> bool:
        """Whether the next step comes from recordings."""
        return self.graphs is not None and self._replay_update is not None

    def stop(self) -> None:
        """From here on every step is plain; the recordings' memory is free."""
        self.graphs = self._replay_gradients = self._replay_update = self._batch = None

    def gradients(self, batch: Batch) -> None:
        if self.graphs is None or not self._hold(batch):
            self._gradients(batch)
        elif self._replay_gradients is not None:
            self._replay_gradients()
        elif self._plain_steps < WARM_UP:
            self.graphs.run(self._held_gradients)
            self._plain_steps += 1
        elif not self._record_gradients():
            self._gradients(batch)

    def update(self) -> None:
        if self.graphs is None or self._replay_gradients is None or not self._record_update():
            self._update()
        else:
            self._replay_update()

    def _held_gradients(self) -> None:
        self._gradients(self._batch)

    def _hold(self, batch: Batch) -> bool:
        """Copies the batch to where recordings find it; False for one of another shape, which has to go its own way."""
        if self._batch is None:
            self._batch = batch._replace(**{name: tensor.clone() for name, tensor in batch._asdict().items() if tensor is not None})
            return True
        pairs = list(zip(self._batch, batch, strict=True))
        if any((a is None) != (b is None) or (a is not None and (a.shape, a.dtype) != (b.shape, b.dtype)) for a, b in pairs):
            return False
        for held, new in pairs:
            if held is not None:
                held.copy_(new, non_blocking=True)
        return True

    def _record_gradients(self) -> bool:
        """Whether a recording was made that does what the function does; its gradients of the held batch are then in place."""
        batch = self._batch._replace(**{name: tensor.clone() for name, tensor in self._batch._asdict().items() if tensor is not None})
        plain = self._outcomes(lambda: self.graphs.run(self._held_gradients), batch)
        self._replay_gradients = self._recorded(self._held_gradients)
        if self._replay_gradients is None:
            return False
        replayed = self._outcomes(self._replay_gradients, batch)
        if not torch.allclose(replayed, plain, rtol=TOLERANCE, atol=0, equal_nan=True):
            self._give_up(f"loss and gradient norm are {replayed.tolist()} from a recording and {plain.tolist()} without it")
            return False
        return True

    def _record_update(self) -> bool:
        if self._replay_update is None:
            self._replay_update = self._recorded(self._update)
        return self._replay_update is not None

    def _outcomes(self, work: Callable[[], None], batch: Batch) -> Tensor:
        """check() [2, n] after the work on a batch that differs in everything, and on the batch itself."""
        found = []
        for tried in (_varied(batch), batch):
            self._hold(tried)
            work()
            found.append(self._check().clone())
        return torch.stack(found)

    def _recorded(self, work: Callable[[], None]) -> Callable[[], None] | None:
        try:
            return self.graphs.record(work)
        except Exception as error:  # a compiler's, a library's or the memory's: the plain step needs none of what failed
            error = cause_of(error)
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None

    def _give_up(self, reason: str) -> None:
        self.stop()
        print(f"fastcm: steps run without a CUDA graph ({reason})", file=sys.stderr)


def _varied(batch: Batch) -> Batch:
    """Another batch of the same shapes: the images in another order, with other labels, and with the noise and sides of other places."""
    return Batch(
        batch.images.flip(0), None if batch.labels is None else batch.labels.roll(1), batch.seed, batch.position + len(batch.position)
    )
