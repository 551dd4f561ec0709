"""One batch size of a generator captured as a CUDA graph: seeds and labels are copied in, one replay, images are copied out."""

from collections.abc import Callable

import torch
from torch import Tensor


class CapturedBatch:
    """Replays run(seeds, labels) -> tensors for one shape of its arguments. Not thread-safe: the caller holds a lock."""

    def __init__(self, run: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]], seeds: Tensor, labels: Tensor | None, *, pool):
        self.seeds = seeds.clone()
        self.labels = None if labels is None else labels.clone()
        # Libraries choose algorithms and allocate workspaces in their first calls, which a capture must not see.
        side = torch.cuda.Stream(seeds.device)
        side.wait_stream(torch.cuda.current_stream(seeds.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                run(self.seeds, self.labels)
        torch.cuda.current_stream(seeds.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # One memory pool for all graphs: none runs beside another. Other threads may go on using CUDA meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = run(self.seeds, self.labels)

    def __call__(self, seeds: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        """The outputs belong to the graph: read them before the next call."""
        self.seeds.copy_(seeds)
        if labels is not None:
            self.labels.copy_(labels)
        self.graph.replay()
        return self.outputs
