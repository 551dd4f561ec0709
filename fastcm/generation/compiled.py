"""A frozen level as machine code of torch.compile; eager where that fails, said in one line."""

import logging
import threading

import torch
from torch import Tensor

from fastcm.errors import InputError, nearest, reason_of
from fastcm.generation.frozen import FrozenLevel

COMPILE = ("auto", "on", "off")
# On the CPU without `freezing`, which packs the weights: code that holds them is not kept on disk (torch 2.13), and every process would
# compile anew. On CUDA Inductor times its choices; the generator captures the graph itself.
OPTIONS = {"cpu": {}, "cuda": {"max_autotune": True, "triton.cudagraphs": False}}
# All levels of a process are one function to torch, which stops compiling it after eight variants, without a word: here that is an error.
VARIANTS = {"recompile_limit": 1024, "accumulated_recompile_limit": 1024, "fail_on_recompile_limit_hit": True}
log = logging.getLogger("fastcm")
_compiling = threading.Lock()


def chosen_compile(compile: str) -> bool:
    """Whether levels are compiled. "auto" does not: the first image of a process would wait, up to minutes where nothing is cached."""
    if compile not in COMPILE:
        raise InputError(f"unknown value in --compile: {compile}. Use {', '.join(COMPILE)}.{nearest(str(compile), COMPILE)}")
    return compile == "on"


class CompiledLevel:
    """As the frozen level that it is made of: x fp32 [B, C, H, W], labels int64 [B] or None -> D(x, sigma, labels) fp32 [B, C, H, W].

    One piece of code serves a single image and one all larger batches on the CPU; on CUDA, where batches are powers of two, each size has
    its own. A piece is compiled when its first batch comes, or is read from torch's cache on disk, where an earlier process left it.
    """

    def __init__(self, level: FrozenLevel):
        self.sigma = level.sigma
        self._level = level
        self._runs: dict[int, object] = {}

    @property
    def compiled(self) -> bool:
        """Whether all that has been run so far is compiled code."""
        return bool(self._runs) and self._level not in self._runs.values()

    @property
    def table_bytes(self) -> int:
        return self._level.table_bytes

    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        size = x.shape[0] if x.is_cuda else min(x.shape[0], 2)
        run = self._runs.get(size)
        return run(x, labels) if run is not None else self._first(size, x, labels)

    def _first(self, size: int, x: Tensor, labels: Tensor | None) -> Tensor:
        with _compiling:
            if size not in self._runs:
                try:
                    run = torch.compile(self._level, dynamic=not x.is_cuda and size > 1, options=OPTIONS[x.device.type])
                    with torch._dynamo.config.patch(VARIANTS):
                        run(x, labels)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    log.warning(f"torch.compile failed for sigma {self.sigma:g}: {reason_of(error)}. Images are drawn without it.")
                    run = self._level
                self._runs[size] = run
        return self._runs[size](x, labels)
