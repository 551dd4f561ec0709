"""Memory of a GPU between measurements: what the last one held must not count against the next."""

import contextlib
import gc

import torch


def free_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any more, or only a cycle does, which Python would find at a moment of its own."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of an allocator that a failed capture has left broken, before torch 2.12
            torch.cuda.empty_cache()
