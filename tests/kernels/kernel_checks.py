"""Tools of the kernel tests: one test body for the reference, the kernel under Triton's interpreter and the kernel on a GPU."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcm import kernels
from fastcm.kernels import launch

if launch.INTERPRETED:
    # triton 3.6 makes a loop's bound an int by int(array), which NumPy 2.4 refuses for arrays of one element; 3.7 does not.
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_bounds(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_bounds

ROOT = Path(__file__).resolve().parents[2]
# The tests of files that hold kernels.
KERNEL_TESTS = sorted(
    f"tests/kernels/test_{path.stem}.py" for path in (ROOT / "kernels").glob("*.py") if "_kernel[" in path.read_text(encoding="utf-8")
)
# A GPU's fast logarithm, sine and cosine cost up to this for each normal; the reference and the interpreter keep 2e-6.
NORMAL_TOLERANCE = {"cpu": 2e-6, "cuda": 1e-5}


@pytest.fixture(name="device", params=["interpreter" if launch.INTERPRETED else "reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def each_implementation(request, monkeypatch):
    """The device of a test that runs once for each implementation of the op that it calls.

    Import `each_implementation` and take `device`. "reference": the torch definition on the CPU. "interpreter": the kernel itself, in
    a process under TRITON_INTERPRET=1 (`run_interpreted` starts one). "cuda": the kernel on the GPU. Kernels allocate NaN-poisoned
    memory, so that an element that is not written shows, and a test that launched nothing fails.
    """
    if request.param == "reference":
        with using("reference"):
            yield torch.device("cpu")
        return
    launches = []
    guard = launch.device_guard
    monkeypatch.setattr(launch, "device_guard", lambda x: launches.append(x) or guard(x))
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    with using("triton"):
        yield torch.device("cuda" if request.param == "cuda" else "cpu")
    assert launches, "no kernel was launched: the test compared the reference with itself"


@contextlib.contextmanager
def using(implementation: str):
    """`kernels.use(implementation)` within a with statement."""
    before = launch._use
    kernels.use(implementation)
    try:
        yield
    finally:
        kernels.use(before)


def poisoned(allocate):
    """Returns `allocate` with its result filled: NaN for floats, 0xA5 for bytes, a large odd number for other integers."""

    def allocate_poisoned(*args, **options):
        tensor = allocate(*args, **options)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_({torch.bool: True, torch.uint8: 0xA5}.get(tensor.dtype, 0x5A5A5A5))

    return allocate_poisoned


def assert_as_close_as_eager(found: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, *, atol: float) -> None:
    """|found - exact| <= 2 |eager - exact| + atol, in float64 and by the largest error: as good as the same arithmetic in torch."""
    found, eager, exact = (t.detach().double().cpu() for t in (found, eager, exact))
    assert found.shape == exact.shape and torch.isfinite(found).all(), "shape or NaN: an element was not written"
    error, allowed = (found - exact).abs().max().item(), 2 * (eager - exact).abs().max().item() + atol
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"


def words_by_numpy(seed: int, position: int, counters: np.ndarray, stream: int) -> np.ndarray:
    """Philox4x32-10 as its paper writes it: words [n, 4] uint64 of the counters [n]."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0 = counters.astype(np.uint64)
    c1, c2, c3 = (np.full(len(counters), v & 0xFFFFFFFF, np.uint64) for v in (position, position >> 32, stream))
    for r in range(10):
        k0 = np.uint64(((seed & 0xFFFFFFFF) + r * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((((seed >> 32) & 0xFFFFFFFF) + r * 0xBB67AE85) & 0xFFFFFFFF)
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
    return np.stack((c0, c1, c2, c3), -1)


def exact_normals(seed: torch.Tensor, position: torch.Tensor, shape: tuple[int, ...], stream: int) -> torch.Tensor:
    """The contract's normals in float64 [B, *shape], from the definition by numpy."""
    batch, elements = max(len(seed), len(position)), int(np.prod(shape))
    samples = []
    for key, place in zip(seed.expand(batch).tolist(), position.expand(batch).tolist(), strict=True):
        words = words_by_numpy(key, place, np.arange(-(-elements // 4)), stream)
        u = ((words[:, 0::2] >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
        theta = 2 * np.pi * (words[:, 1::2] >> np.uint64(8)).astype(np.float64) * 2.0**-24
        radius = np.sqrt(-2 * np.log(u))
        z = np.stack((radius * np.cos(theta), radius * np.sin(theta)), -1)  # [Q, pair, cos or sin]
        samples.append(z.reshape(len(words), 4).T.reshape(-1)[:elements].reshape(shape))
    return torch.from_numpy(np.stack(samples))


def run_interpreted(test_files: list[str], *, timeout: float = 600, environment: Mapping[str, str] = os.environ) -> str:
    """Runs these test files in a process under TRITON_INTERPRET=1 and returns pytest's closing line; AssertionError where one fails."""
    environment = {**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *test_files]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout.strip().splitlines()[-1]
