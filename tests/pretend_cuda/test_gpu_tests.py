"""The tests of CUDA devices on pretended ones, in processes of their own: what needs no hardware runs without a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
pytestmark = [
    pytest.mark.skipif("pretended" in sys.modules, reason="it would start itself"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler for tests/pretend_cuda/device.cpp"),
]
# Quick ones for every run, the rest where minutes do not count; what tests/benchmarks has needs hardware.
QUICK = "tests/pretend_cuda/test_pretended.py tests/generation/test_cuda_graph.py".split()
LONG = [f"tests/{room}" for room in ("training", "generation", "data", "networks", "kernels")]


def run(paths, seconds):
    """The counts of outcomes, by pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--timeout", str(seconds), *paths]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # it is no worker of this run
    environ = {**inherited, "PYTHONPATH": str(HERE), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|skipped|failed)", done.stdout.splitlines()[-1])}


@pytest.mark.slow
def test_on_pretended_devices():
    assert run(QUICK, 300)["passed"] >= 25


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("room", LONG)
def test_a_room_on_pretended_devices(room):
    assert run([room], 1200)["passed"] > 0
