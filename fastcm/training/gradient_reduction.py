"""The sum of the flat gradients over the processes, chunk by chunk while the backward pass still fills the rest."""

import torch.distributed as dist

from fastcm.training.optimizer import FlatOptimizer
from fastcm.training.parallel import Processes, told

# Large enough for the links' full rate, small enough that the first chunk leaves early.
CHUNK_BYTES = 32 << 20


class Chunk:
    """Neighbouring parameters of one flat gradient. `left` counts those whose gradient is still to come."""

    def __init__(self, optimizer: FlatOptimizer, part: slice, parameters: int):
        self.optimizer, self.part, self.parameters = optimizer, part, parameters
        self.left = parameters


class GradientReduction:
    """Between `arm`, before the last backward pass of a step, and `finish`, the gradients become their sums over the processes.

    Chunks leave in one order, the last parameters first, whatever the order in which they fill: every process sends the same.
    """

    def __init__(self, optimizers: list[FlatOptimizer], processes: Processes, *, chunk_bytes: int = CHUNK_BYTES):
        self.group = processes.gradient_group
        self.chunks: list[Chunk] = []
        for optimizer in optimizers:
            self.chunks += self._chunks(optimizer, chunk_bytes)
        self._armed, self._next = False, 0
        self._works: list[dist.Work] = []

    def _chunks(self, optimizer: FlatOptimizer, chunk_bytes: int) -> list[Chunk]:
        """Cuts the flat gradient between parameters, and hangs a hook on each parameter that gets a gradient."""
        layout, size = optimizer.layout, max(1, chunk_bytes // optimizer.gradient.element_size())
        chunks, members, end = [], [], layout.size
        for offset, parameter in zip(reversed(layout.offsets), reversed(list(optimizer.student.parameters())), strict=True):
            members += [parameter] if parameter.requires_grad else []
            if end - offset >= size or offset == 0:
                chunk = Chunk(optimizer, slice(offset, end), len(members))
                for member in members:
                    member.register_post_accumulate_grad_hook(lambda _, chunk=chunk: self._filled(chunk))
                chunks.append(chunk)
                members, end = [], offset
        return chunks

    def arm(self) -> None:
        for chunk in self.chunks:
            chunk.left = chunk.parameters
        self._armed, self._next = True, 0

    def _filled(self, chunk: Chunk) -> None:
        if self._armed:
            chunk.left -= 1
            while self._next < len(self.chunks) and self.chunks[self._next].left == 0:
                self._send()

    def _send(self) -> None:
        chunk = self.chunks[self._next]
        self._next += 1
        chunk.optimizer.collect(chunk.part)
        with told():
            work = dist.all_reduce(chunk.optimizer.collected[chunk.part], group=self.group, async_op=True)
        self._works.append(work)

    def finish(self) -> None:
        """Sends what has not left yet, parameters without a gradient among it, and waits; on CUDA the stream waits, not the host.

        Also after a failed pass: the other processes wait for this one's part.
        """
        if not self._armed:
            self.arm()
        while self._next < len(self.chunks):
            self._send()
        with told():
            for work in self._works:
                work.wait()
        self._works.clear()
        self._armed = False
