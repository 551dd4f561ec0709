"""Memory that is freed stays with the process, in one that nothing else has used."""

import platform
import subprocess
import sys

import pytest

KEPT = """
import resource
from pathlib import Path
import torch
from fastcm.training.host_memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def kept():
    before = resident()
    blocks = [torch.ones(1 << 20) for _ in range(32)]
    del blocks
    return resident() - before

print(kept())
keep_freed_memory()
print(kept())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 32 << 20 and after > 96 << 20  # of 128 MB
