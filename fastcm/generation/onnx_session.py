"""An ONNX Runtime session on the provider that was asked for, or an error that says what is missing."""

import contextlib
import ctypes
import importlib
import io
import logging
import re
from importlib import metadata
from pathlib import Path

from fastcm.errors import InputError, RunError, reason_of

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
# The module of the plugin that brings the last of them.
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
# What runs the nodes that the first cannot; ONNX Runtime appends the CPU to every list.
FALLBACKS = {"cpu": [], "cuda": [], "tensorrt": ["CUDAExecutionProvider"]}
REMEDIES = {
    "cuda": "pip install 'onnxruntime-gpu[cuda,cudnn]', or use --provider cpu",
    "tensorrt": "pip install 'onnxruntime-gpu[cuda,cudnn]' and TensorRT's libraries, or use --provider cpu",
    "tensorrt-rtx": "pip install onnxruntime-ep-nv-tensorrt-rtx-cu12 on a machine with an RTX card, or use --provider cpu",
}
log = logging.getLogger("fastcm")
_warned: set[str] = set()


def open_session(path: Path, provider: str):
    """Returns (session, active): active is a key of PROVIDERS, as ONNX Runtime reports it after loading.

    provider "auto" takes CUDA where the machine has it, and warns once where a GPU is there but cannot be used.
    Raises InputError for files that cannot be read, RunError where the asked provider is not active.
    """
    import onnxruntime

    if not hasattr(onnxruntime, "InferenceSession"):
        raise RunError("broken package: onnxruntime. pip install --force-reinstall --no-deps onnxruntime-gpu.")
    _warn_of_two_packages()
    if provider == "tensorrt-rtx":
        return _plugin_session(onnxruntime, path), provider
    if provider != "auto":
        problem = None if provider == "cpu" else missing_library(onnxruntime, provider)
        if problem:
            raise RunError(f"provider not available in --provider: {provider}, {problem}. {REMEDIES[provider]}.")
        return _strict(onnxruntime, path, provider), provider
    if not _has_gpu() or PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        return _session(onnxruntime, path, ["CPUExecutionProvider"]), "cpu"
    problem = missing_library(onnxruntime, "cuda")
    if problem is None:
        with contextlib.suppress(RunError):
            return _strict(onnxruntime, path, "cuda"), "cuda"
        problem = "ONNX Runtime could not start it"
    _warn_once(f"{path.name} runs on the CPU: no CUDA provider, {problem}. {REMEDIES['cuda']}.")
    return _session(onnxruntime, path, ["CPUExecutionProvider"]), "cpu"


def _strict(onnxruntime, path: Path, provider: str):
    """A session whose first provider is the asked one. Where it cannot take every node, the CPU helps it, and a line says so."""
    if provider == "cpu":
        session = _session(onnxruntime, path, [PROVIDERS[provider]])
    else:
        # A captured graph needs every node on the GPU, so the whole and the graph go together.
        graph = {"enable_cuda_graph": "1"} if provider == "cuda" else {}
        providers = [(PROVIDERS[provider], graph), *FALLBACKS[provider]]
        try:
            session = _session(onnxruntime, path, providers, cpu_fallback=False)
        except InputError:
            session = _session(onnxruntime, path, [PROVIDERS[provider], *FALLBACKS[provider]])
            if session.get_providers()[0] == PROVIDERS[provider]:
                lacking = f"it has nodes that provider {provider} lacks, as the integers of a seeded graph"
                _warn_once(f"{path.name} runs partly on the CPU: {lacking}. Export it with noise as its input.")
    active = session.get_providers()
    if active[0] != PROVIDERS[provider]:
        raise RunError(f"provider not active in --provider: {provider}. ONNX Runtime fell back to {active[0]}; {REMEDIES[provider]}.")
    return session


def _plugin_session(onnxruntime, path: Path):
    """A session on the plugin for TensorRT for RTX, which compiles the graph for the card that it finds."""
    name = PROVIDERS["tensorrt-rtx"]

    def unavailable(problem: str) -> RunError:
        return RunError(f"provider not available in --provider: tensorrt-rtx, {problem}. {REMEDIES['tensorrt-rtx']}.")

    try:
        plugin = importlib.import_module(PLUGIN)
    except ModuleNotFoundError:
        raise unavailable(f"no package {PLUGIN.replace('_', '-')}") from None
    if not hasattr(onnxruntime, "get_ep_devices"):
        raise unavailable(f"onnxruntime {onnxruntime.__version__} takes no plugins")
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not devices:
        try:
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:
            missing = re.search(r"(\S+): cannot open shared object file", str(error))
            raise unavailable(f"missing library {missing[1]}" if missing else str(error).strip().splitlines()[0][:200]) from None
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise unavailable("it finds no card")
    options = onnxruntime.SessionOptions()
    options.add_provider_for_devices(devices[:1], {})
    session = _session(onnxruntime, path, None, options=options)
    if session.get_providers()[0] != name:
        raise unavailable(f"ONNX Runtime fell back to {session.get_providers()[0]}")
    return session


def _session(onnxruntime, path: Path, providers: list | None, *, cpu_fallback: bool = True, options=None):
    options = onnxruntime.SessionOptions() if options is None else options
    options.log_severity_level = 4
    if not cpu_fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # ONNX Runtime prints when a provider fails
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise InputError(_refusal(path, error)) from None


def _refusal(path: Path, error: Exception) -> str:
    """One line for ONNX Runtime's errors, which name C++ files."""
    text = str(error)
    if "parsing failed" in text or "No graph was found" in text:
        head = path.read_bytes()[:64] if path.is_file() else b""
        kind = "a Git LFS pointer (run git lfs pull)" if head.startswith(b"version https://git-lfs") else "not a complete ONNX file"
        return f"unreadable graph in {path}: {kind}. Export or copy it again."
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", reason_of(error, limit=1000))
    reason = re.sub(r"/onnxruntime_src/\S+ |\S+\(.*?\)(?= )", "", reason)
    return f"ONNX Runtime refuses {path}: {reason[:300].rstrip('.')}. Export it again with this fastcm."


def missing_library(onnxruntime, provider: str) -> str | None:
    """What keeps the provider from loading, in words, or None. Asked before ONNX Runtime is, which prints and falls back."""
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        return "this onnxruntime package is built without it"
    folder = Path(onnxruntime.__file__).parent / "capi"
    library = folder / f"libonnxruntime_providers_{provider}.so"
    if not library.is_file():
        return None  # another system's file names: ONNX Runtime will tell
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        onnxruntime.preload_dlls()
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        match = re.match(r"(\S+): cannot open shared object file", str(error))
        return f"missing library {match[1]}" if match else None
    return None


def _has_gpu() -> bool:
    """True where NVIDIA's driver is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _warn_of_two_packages() -> None:
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.distribution(name)
            found.append(name)
    if len(found) == 2:
        cure = "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"
        _warn_once(f"onnxruntime and onnxruntime-gpu are both installed and overwrite each other. {cure}.")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        log.warning(message)
