"""The provider that runs an exported file: the one that was asked for, whole, or an error or a line that says so."""

import logging
import sys
from importlib import metadata
from types import SimpleNamespace

import onnxruntime
import pytest
from exported_models import exported

from fastcm.errors import InputError, RunError
from fastcm.generation import onnx_session
from fastcm.generation.onnx_generator import OnnxGenerator

pytestmark = pytest.mark.slow  # the file that they read takes seconds to export


@pytest.fixture(scope="module")
def path():
    return exported("plain").path


def test_the_active_provider_is_named(path):
    assert OnnxGenerator(path, provider="cpu").provider == "ONNX Runtime CPUExecutionProvider"
    with pytest.raises(InputError, match="Did you mean 'cuda'"):
        OnnxGenerator(path, provider="cudaa")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_cannot_start_is_an_error(path, provider, capfd):
    if onnx_session._has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RunError, match=rf"provider not available in --provider: {provider}, .*pip install"):
        OnnxGenerator(path, provider=provider)
    assert capfd.readouterr() == ("", "")  # ONNX Runtime was not asked, which would print


def test_a_silent_fallback_is_an_error(path, monkeypatch):
    """Where the libraries are there but ONNX Runtime falls back all the same."""
    monkeypatch.setattr(onnx_session, "missing_library", lambda onnxruntime, provider: None)
    with pytest.raises(RunError, match="provider not active in --provider: cuda. ONNX Runtime fell back to CPUExecutionProvider"):
        OnnxGenerator(path, provider="cuda")


def test_a_provider_gets_the_whole_graph_or_the_user_is_told(path, monkeypatch, caplog):
    """First without the CPU's help, with CUDA graphs; where a node remains, with it, and a line says so."""
    calls, real = [], onnx_session._session

    def session(onnxruntime, path, providers, *, cpu_fallback=True):
        calls.append((providers, cpu_fallback))
        if not cpu_fallback:
            raise InputError("some nodes are assigned to the CPU")
        found = real(onnxruntime, path, ["CPUExecutionProvider"])
        monkeypatch.setattr(found, "get_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        return found

    monkeypatch.setattr(onnx_session, "_session", session)
    monkeypatch.setattr(onnx_session, "_warned", set())
    with caplog.at_level(logging.WARNING, "fastcm"):
        onnx_session._strict(onnxruntime, path, "cuda")
    assert calls == [([("CUDAExecutionProvider", {"enable_cuda_graph": "1"})], False), (["CUDAExecutionProvider"], True)]
    assert "runs partly on the CPU" in caplog.text


def test_auto_warns_once_where_a_gpu_cannot_be_used(path, monkeypatch, caplog):
    monkeypatch.setattr(onnx_session, "_has_gpu", lambda: True)
    monkeypatch.setattr(onnx_session, "missing_library", lambda onnxruntime, provider: "missing library libcudnn.so.9")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnx_session, "_warned", set())
    with caplog.at_level(logging.WARNING, "fastcm"):
        assert [OnnxGenerator(path).provider for _ in range(2)] == ["ONNX Runtime CPUExecutionProvider"] * 2
    assert [record.getMessage() for record in caplog.records if "libcudnn.so.9" in record.getMessage()] != []
    assert len(caplog.records) == 1


def test_two_wheels_are_named_with_the_cure(path, monkeypatch, caplog):
    monkeypatch.setattr(metadata, "distribution", lambda name: name)
    monkeypatch.setattr(onnx_session, "_warned", set())
    with caplog.at_level(logging.WARNING, "fastcm"):
        OnnxGenerator(path, provider="cpu")
    assert "pip install --force-reinstall --no-deps onnxruntime-gpu" in caplog.text


class Plugin:
    """The plugin's package and the part of ONNX Runtime that it talks to; what is registered appears among the devices."""

    def __init__(self, path, monkeypatch, *, devices=1, error=None, active=onnx_session.PROVIDERS["tensorrt-rtx"]):
        self.registered, name = [], onnx_session.PROVIDERS["tensorrt-rtx"]
        monkeypatch.setitem(sys.modules, onnx_session.PLUGIN, SimpleNamespace(get_library_path=lambda: "/x/plugin.so"))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.session = SimpleNamespace(get_providers=lambda: [active, "CPUExecutionProvider"], get_inputs=session.get_inputs)
        self.options = SimpleNamespace(add_provider_for_devices=lambda found, options: self.registered.append((len(found), options)))

        def register(provider, library):
            if error:
                raise RuntimeError(error)
            self.registered.append((provider, library))

        found = [SimpleNamespace(ep_name=name)] * devices
        self.runtime = SimpleNamespace(
            __version__="1.31.1",
            SessionOptions=lambda: self.options,
            InferenceSession=lambda path, options, providers: self.session,
            register_execution_provider_library=register,
            get_ep_devices=lambda: found if self.registered else [],
        )


def test_the_plugin_of_tensorrt_for_rtx(path, monkeypatch):
    plugin = Plugin(path, monkeypatch)
    assert onnx_session._plugin_session(plugin.runtime, path) is plugin.session
    assert plugin.registered == [("NvTensorRTRTXExecutionProvider", "/x/plugin.so"), (1, {})]
    for options, words in (
        ({"devices": 0}, "it finds no card"),
        ({"error": "failed: libcudart.so.12: cannot open shared object file"}, "missing library libcudart.so.12"),
        ({"active": "CPUExecutionProvider"}, "ONNX Runtime fell back to CPUExecutionProvider"),
    ):
        plugin = Plugin(path, monkeypatch, **options)
        with pytest.raises(RunError, match=f"provider not available in --provider: tensorrt-rtx, {words}. pip install onnxruntime-ep-nv-"):
            onnx_session._plugin_session(plugin.runtime, path)


def test_without_the_plugin_it_is_refused(path, monkeypatch):
    monkeypatch.setitem(sys.modules, onnx_session.PLUGIN, None)
    with pytest.raises(RunError, match="--provider: tensorrt-rtx, no package onnxruntime-ep-nv-tensorrt-rtx. pip install "):
        OnnxGenerator(path, provider="tensorrt-rtx")
    for call in ("register_execution_provider_library", "get_ep_devices"):
        assert callable(getattr(onnxruntime, call))
    assert callable(onnxruntime.SessionOptions.add_provider_for_devices)
