"""What CUDA's libraries may choose while fastcm works: full fp32 where fp32 was asked for, and the fastest convolution of those tried."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_within, _before = 0, True


@contextmanager
def exact_fp32(active: bool) -> Iterator[None]:
    """Within, where `active`, cuDNN's convolutions of fp32 tensors are fp32 and not TF32, which keeps 10 bits of 23 (torch's default).

    Matrix products are full fp32 by torch's default; torch.set_float32_matmul_precision decides. The setting is the process's: the first
    of several threads within takes it and the last gives back what stood there before.
    """
    global _within, _before
    if not active:
        yield
        return
    with _lock:
        if _within == 0:
            _before = torch.backends.cudnn.allow_tf32
            torch.backends.cudnn.allow_tf32 = False
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if _within == 0:
                torch.backends.cudnn.allow_tf32 = _before


@contextmanager
def tried_convolutions() -> Iterator[None]:
    """Within, cuDNN tries its algorithms in the first call of each shape, and later calls take the fastest: for what will be recorded."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
