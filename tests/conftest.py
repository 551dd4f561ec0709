"""What every test runs under: fixed seeds, no network, its own cache, threads that fit the cores, GPU tests only beside a GPU."""

import gc
import os
import random
import socket
import sys

import numpy as np
import pytest

try:
    from hypothesis import settings
except ImportError:  # beside a GPU it need not be there; the tests that use it are left out
    settings = None

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, and inherited by child processes: workers that share the cores must not each take all of them.
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")

if settings is not None:
    settings.register_profile("fastcm", deadline=None, derandomize=True, max_examples=20)
    settings.load_profile("fastcm")
if settings is None:
    collect_ignore = ["data/test_data.py", "faults/test_faults_settings.py"]

# The CUDA devices of tests/pretend_cuda.
IS_PRETENDED = "pretended" in sys.modules or any(os.path.basename(path) == "pretend_cuda" for path in sys.path)


def _guarded(connect):
    def connect_to_loopback(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise PermissionError(f"a test reached for the network: {address}")
        return connect(self, address)

    return connect_to_loopback


def _local_only(getaddrinfo):
    def resolve(host, *args, **options):
        if host not in (None, "", "127.0.0.1", "::1", "0.0.0.0", "localhost", socket.gethostname()):
            raise PermissionError(f"a test asked for the address of {host}")
        return getaddrinfo(host, *args, **options)

    return resolve


def pytest_configure(config):
    os.fsync = lambda descriptor: None  # waits for disks, for power cuts that no test has
    # For the whole run and not by a fixture, so that imports and session fixtures are held to it as well.
    socket.socket.connect = _guarded(socket.socket.connect)
    socket.socket.connect_ex = _guarded(socket.socket.connect_ex)
    socket.getaddrinfo = _local_only(socket.getaddrinfo)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # torch and the tests themselves: half a million objects that no collection need look through again


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # a second, spared where no GPU test is asked for

    for item in marked:
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif IS_PRETENDED and (needed := item.get_closest_marker("hardware")):
            item.add_marker(pytest.mark.skip(reason=f"on hardware alone: {needed.args[0]}"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Decoded pictures go to the test run's own folder, in child processes too; what workers share lies beside their folders."""
    os.environ["FASTCM_CACHE"] = str(tmp_path_factory.mktemp("fastcm-cache"))
    base = tmp_path_factory.getbasetemp()
    os.environ["FASTCM_SHARED"] = str(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def definitions_for_speed(request):
    """On pretended devices kernels are interpreted, slowly: what does not test them takes their definitions."""
    if not IS_PRETENDED or request.path.parent.name == "kernels":
        yield
        return
    from fastcm import kernels

    kernels.use("reference")
    yield
    kernels.use("auto")
