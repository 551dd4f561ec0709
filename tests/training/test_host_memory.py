"""Memory that is freed stays with the process: taken again, it brings no page faults."""

import platform
import resource

import pytest
import torch

from fastcm.training.host_memory import keep_freed_memory

PAGES = 32 * (4 << 20) // resource.getpagesize()


def faults() -> int:
    """Page faults of taking 32 blocks of 4 MB, writing to them and freeing them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1 << 20) for _ in range(32)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_taken_again():
    keep_freed_memory()
    faults()
    assert faults() < 0.1 * PAGES
