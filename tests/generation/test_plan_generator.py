"""Engines as generators: the calls against a stand-in for the bindings on the CPU, the names of those calls against the real bindings."""

import hashlib
import json
import logging
import sys

import numpy as np
import pytest
from exported_models import exported
from tensorrt_stand_in import StandIn, cpu_as_cuda

import fastcm
from fastcm import api, cli
from fastcm.errors import InputError, RunError
from fastcm.export.compiler import Profile
from fastcm.export.to_tensorrt import build_engine
from fastcm.generation import tensorrt_bindings
from fastcm.generation.plan_engine import Batches
from fastcm.generation.plan_generator import manifest_path, read_manifest


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """An "engine" for batches of 2 to 4 with its graph beside it; `.stand` is what runs it."""
    done, log = exported("plain"), []
    stand = StandIn(log)
    stand.log = log
    monkeypatch.setitem(sys.modules, "tensorrt", stand)
    cpu_as_cuda(monkeypatch, stand)
    tensorrt_bindings.logger.cache_clear()
    path = tmp_path / "x.plan"
    build_engine(done, path, Profile(2, 2, 4))
    (tmp_path / done.path.name).write_bytes(done.path.read_bytes())
    log.clear()
    yield path, stand
    tensorrt_bindings.logger.cache_clear()


def edited(path, change):
    content = json.loads(manifest_path(path).read_text())
    change(content)
    manifest_path(path).write_text(json.dumps(content))


@pytest.mark.slow
def test_an_engine_draws_as_its_graph_does(plan, caplog):
    path, stand = plan
    generator, graph = fastcm.load(path, trust=True), fastcm.load(path.with_name("plain.onnx"), provider="cpu")
    for seeds in ([5], range(7), [], range(2, 5)):
        images = generator(seeds, "bee")
        assert images.shape == (len(list(seeds)), 8, 8, 1) and np.array_equal(images, graph(seeds, "bee"))
    # 1 is filled up to 2; 7 are runs of 4; a batch size is bound, warmed and captured once.
    assert [entry for entry in stand.log if entry[0] == "bound"] == [
        ("bound", name, (size, *shape)) for size in (2, 4) for name, shape in (("noise", (1, 8, 8)), ("labels", ()))
    ]
    assert stand.log.count("executed") == 2 + 1 + 2 + 2 + 1 and not caplog.records
    assert generator.provider == "TensorRT" and generator.classes == ["ant", "bee", "cat"] and generator.batch_size == 4


@pytest.mark.slow
def test_the_first_call_is_compared_with_the_graph(plan, caplog):
    path, stand = plan
    stand.broken = True
    with pytest.raises(RunError, match=r"x.plan disagrees with plain.onnx: 1, over 0.0001 for fp32. Build it again"):
        fastcm.load(path, trust=True)(range(3))
    path.with_name("plain.onnx").write_bytes(b"another")
    with caplog.at_level(logging.WARNING, "fastcm"):
        generator = fastcm.load(path, trust=True)
        generator(range(3)), generator(range(3))
    assert [record.message for record in caplog.records] == [
        "x.plan is not compared with its graph: plain.onnx, as it was built from, does not lie beside it."
    ]


@pytest.mark.slow
def test_what_cannot_be_captured_runs_without(plan, caplog):
    path, stand = plan
    stand.capturable = False
    with caplog.at_level(logging.WARNING, "fastcm"):
        assert fastcm.load(path, trust=True)(range(2)).std() > 10
    assert "no CUDA graph of this engine" in caplog.text and stand.log.count("executed") == 3


@pytest.mark.slow
def test_an_engine_that_does_not_fit_is_one_line(plan, monkeypatch, tmp_path):
    path, stand = plan
    manifest = manifest_path(path).read_bytes()

    def refused(words, **options):
        with pytest.raises(InputError, match=words) as caught:
            fastcm.load(path, **{"trust": True, **options})
        assert "\n" not in str(caught.value)
        manifest_path(path).write_bytes(manifest)

    refused("a program in MODEL: .*x.plan. Loading it runs its code: give --trust", trust=False)
    refused("an engine for CUDA in MODEL: .*x.plan. Leave out --device and --provider: cpu", device="cpu")
    stand.__version__ = "10.16.0"
    refused("an engine of another version of TensorRT in MODEL: .*x.plan is of 10.15.1, here is 10.16.0. Build it again")
    stand.__version__ = "10.15.1"
    edited(path, lambda content: content["engine"].update(capabilities=[[8, 9], [12, 0]]))
    refused(r"an engine for another card in MODEL: .*x.plan is for sm_89, sm_120, here is sm_86. Build it for sm_86")
    edited(path, lambda content: content["graph"].update(resolution=16))
    refused("another engine than its manifest says in MODEL: .*x.plan, noise of noise, labels, images")
    edited(path, lambda content: content["engine"].update(runtime="x"))
    refused("not the manifest of an engine of this fastcm in ")
    edited(path, lambda content: content["onnx"].update(name="../x.onnx"))
    refused("not the manifest of an engine of this fastcm in ")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused("an engine without a CUDA device in MODEL: .*x.plan. Run its .onnx here")
    path.write_bytes(b"cut short")
    refused("another file than its manifest says in MODEL: .*x.plan. Copy both again")
    manifest_path(path).unlink()
    with pytest.raises(InputError, match="no manifest beside the engine in MODEL: .*x.plan. Put x.plan.manifest.json there"):
        fastcm.load(path, trust=True)


@pytest.mark.slow
def test_commands_take_an_engine(plan, capsys):
    path, _ = plan
    assert cli.main(["sample", str(path), "--trust", "--seeds", "0-2", "--out", str(path.with_name("x.npz"))]) == 0
    drawn = np.load(path.with_name("x.npz"))["arr_0"]
    assert drawn.shape == (3, 8, 8, 1) and "(TensorRT, fp32" in capsys.readouterr().out
    assert cli.main(["info", str(path)]) == 0
    told = capsys.readouterr().out
    assert "TensorRT 10.15.1 for sm_86, batches of 2 to 4" in told and "ant, bee, cat" in told and "fp32, of plain.onnx" in told
    for command in ("sample", "edit", "evaluate", "serve"):
        assert "--trust" in {option for action in cli._actions_of(cli.build_parser(command), command) for option in action.option_strings}
    with pytest.raises(InputError, match="an exported graph in MODEL: .*x.plan. Its weights cannot be taken out"):
        api.load_denoiser(path)


def test_batches_are_powers_of_two_within_the_profile():
    assert [Batches(1, 16).size(count) for count in (1, 3, 9, 16, 40)] == [1, 4, 16, 16, 16]
    assert [Batches(3, 6).size(count) for count in (1, 4, 5)] == [3, 4, 6]


@pytest.mark.parametrize("kind", ["tensorrt_rtx", "tensorrt"])
def test_a_missing_or_half_installed_runtime_is_one_line(kind, tmp_path, monkeypatch):
    runtime = tensorrt_bindings.RUNTIMES[kind]
    monkeypatch.delitem(sys.modules, runtime.module, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / runtime.module
    folder.mkdir()
    for source, words in (
        ("", "half installed: .* is empty"),
        ("import tensorrt_libs_that_are_missing", "half installed: no module tensorrt_libs_that_are_missing"),
        ("raise ImportError('libtensorrt.so.1: cannot open shared object file')", "half installed: libtensorrt.so.1: cannot open"),
        ("raise ModuleNotFoundError('no', name=__name__)", "is not installed here: no module"),
    ):
        (folder / "__init__.py").write_text(source)
        sys.modules.pop(runtime.module, None)
        for file in folder.rglob("*.pyc"):
            file.unlink()
        with pytest.raises(RunError, match=f"{runtime.name} (is )?{words}.*pip install"):
            tensorrt_bindings.bindings(kind)
    if kind == "tensorrt_rtx":
        (folder / "__init__.py").write_text("class Builder: pass")
        for file in folder.rglob("*.pyc"):
            file.unlink()
        versions = {"tensorrt-rtx-cu12-bindings": "1.7.1.116", "tensorrt-rtx-cu12-libs": "1.6.1.120"}
        monkeypatch.setattr(tensorrt_bindings, "_version", versions.get)
        sys.modules.pop(runtime.module, None)
        with pytest.raises(RunError, match="parts of two versions, tensorrt-rtx-cu12-bindings 1.7.1.116, tensorrt-rtx-cu12-libs 1.6.1.120"):
            tensorrt_bindings.bindings(kind)
    sys.modules.pop(runtime.module, None)


# What the code calls, with the names of the arguments that it gives.
CALLS = {
    "Builder": {
        "create_network": "flags: ",
        "create_builder_config": "",
        "create_optimization_profile": "",
        "build_serialized_network": "network: .*config: ",
    },
    "OnnxParser": {"__init__": "network: .*logger: ", "parse_from_file": "model: str", "get_error": "index: "},
    "ParserError": {"desc": "", "node": "", "node_name": "", "node_operator": ""},
    "IBuilderConfig": {
        "clear_flag": "flag: ",
        "set_compute_capability": "compute_capability: .*index: ",
        "add_optimization_profile": "profile: ",
        "create_timing_cache": "serialized_timing_cache: ",
        "set_timing_cache": "cache: .*ignore_mismatch: ",
    },
    "IOptimizationProfile": {"set_shape": "input: .*min: .*opt: .*max: "},
    "IProgressMonitor": {
        "phase_start": "phase_name: str, parent_phase: str, num_steps",
        "phase_finish": "phase_name: str",
        "step_complete": "phase_name: str, step",
    },
    "Runtime": {"deserialize_cuda_engine": "serialized_engine: "},
    "ICudaEngine": {
        "get_tensor_name": "index: ",
        "get_tensor_shape": "name: str",
        "get_tensor_dtype": "name: str",
        "create_runtime_config": "",
        "create_execution_context": "runtime_config: ",
    },
    "IExecutionContext": {
        "set_input_shape": "name: str, shape: tuple",
        "set_tensor_address": "name: str, memory: ",
        "execute_async_v3": "stream_handle: ",
        "is_stream_capturable": "stream: ",
    },
}
FIELDS = {
    "INetworkDefinition": ("num_layers",),
    "IBuilderConfig": ("num_compute_capabilities", "progress_monitor"),
    "ICudaEngine": ("num_io_tensors",),
    "IRuntimeConfig": ("dynamic_shapes_kernel_specialization_strategy",),
    "BuilderFlag": ("TF32",),
    "DataType": ("FLOAT", "INT64", "UINT8"),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "ComputeCapability": ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
    "ILogger": ("ERROR", "INTERNAL_ERROR", "log"),
}


def test_the_calls_are_those_of_the_real_bindings():
    import re

    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: pip install 'fastcm[tensorrt]'")
    for name, methods in CALLS.items():
        for method, arguments in methods.items():
            document = getattr(getattr(trt, name), method).__doc__
            assert re.search(arguments, document, re.DOTALL), f"{name}.{method}: {document}"
    for name, fields in FIELDS.items():
        assert [field for field in fields if not hasattr(getattr(trt, name), field)] == [], name
    assert trt.__version__.count(".") == 3


def test_a_manifest_names_its_file(tmp_path):
    path = tmp_path / "x.plan"
    path.write_bytes(b"engine")
    graph = {"steps": 1, "channels": 1, "resolution": 8}
    content = {"format": "fastcm-plan", "version": 1, "graph": graph, "sigmas": [80.0], "config": {"preconditioning": {}}}
    content["engine"] = {"runtime": "tensorrt_rtx", "version": "1", "capabilities": [[12, 0]], "profile": [1, 2, 4]}
    content["onnx"] = {"name": "x.onnx", "sha256": "0"}
    content["files"] = {"x.plan": {"sha256": hashlib.sha256(b"engine").hexdigest()}}
    manifest_path(path).write_text(json.dumps(content))
    assert read_manifest(path) == content
    for name, value in (("version", 2), ("sigmas", [80.0, 1.0]), ("graph", {**graph, "steps": 0}), ("onnx", {}), ("engine", 1)):
        manifest_path(path).write_text(json.dumps({**content, name: value}))
        with pytest.raises(InputError, match="not the manifest of an engine"):
            read_manifest(path)
