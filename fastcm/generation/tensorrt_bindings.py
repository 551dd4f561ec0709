"""NVIDIA's runtimes as Python modules, or one line that says what is missing of them; and what they have to say, kept off the terminal."""

import contextlib
import importlib
import importlib.util
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import NamedTuple

from fastcm.errors import RunError


class Runtime(NamedTuple):
    """module: what is imported. name: what users call it. packages: its parts, of equal versions; "{}" stands for a CUDA version."""

    module: str
    name: str
    remedy: str
    packages: tuple[str, ...] = ()


RTX, DATACENTER = "tensorrt_rtx", "tensorrt"
RUNTIMES = {
    RTX: Runtime(
        "tensorrt_rtx_bindings", "TensorRT for RTX", "pip install 'fastcm[tensorrt]'", ("tensorrt-rtx-{}-bindings", "tensorrt-rtx-{}-libs")
    ),
    DATACENTER: Runtime("tensorrt", "TensorRT", "pip install tensorrt"),
}
CUDA_VERSIONS = ("cu12", "cu13")


def installed(kind: str) -> bool:
    """True where the module is there at all, whole or not."""
    return importlib.util.find_spec(RUNTIMES[kind].module) is not None


def bindings(kind: str) -> ModuleType:
    """The module of RTX or DATACENTER; RunError where it, or half of it, is missing."""
    runtime = RUNTIMES[kind]
    try:
        module = importlib.import_module(runtime.module)
    except ModuleNotFoundError as error:
        if error.name != runtime.module:
            raise _half(runtime, f"no module {error.name}") from None
        raise RunError(f"{runtime.name} is not installed here: no module {runtime.module}. {runtime.remedy}.") from None
    except (ImportError, OSError) as error:  # its library is in a package of its own
        raise _half(runtime, str(error).strip().splitlines()[0]) from None
    if not hasattr(module, "Builder"):
        raise _half(runtime, f"{runtime.module} is empty")
    for cuda in CUDA_VERSIONS:
        found = {package: _version(package.format(cuda)) for package in runtime.packages}
        if len(set(found.values()) - {None}) > 1:
            versions = ", ".join(f"{package.format(cuda)} {version}" for package, version in found.items())
            raise _half(runtime, f"parts of two versions, {versions}")
    return module


def _half(runtime: Runtime, reason: str) -> RunError:
    return RunError(f"{runtime.name} is half installed: {reason}. {runtime.remedy}.")


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


@cache
def logger(kind: str):
    """The one logger of a process (the runtimes take no second): it keeps errors in `.errors` and prints nothing."""
    trt = bindings(kind)

    class Quiet(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
                del self.errors[:-20]

        def reason(self) -> str:
            """The last error, or that there was none; forgets them all."""
            reason = self.errors[-1][:300] if self.errors else "it gives no reason"
            self.errors.clear()
            return reason

    return Quiet()
