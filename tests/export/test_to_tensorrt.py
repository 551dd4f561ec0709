"""TensorRT: the commands against the published options, and the builder's calls against a stand-in for its package."""

import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from exported_models import exported

from fastcm import cli
from fastcm.errors import InputError, RunError
from fastcm.export import to_onnx, to_tensorrt
from fastcm.export.parity import cpu_run
from fastcm.export.tensorrt_options import POLYGRAPHY_RUN, TRTEXEC
from fastcm.export.to_tensorrt import Profile, profile
from fastcm.generation.onnx_contract import Contract

CONTRACTS = [
    Contract(1, 3, 32, 10, precision="fp16"),
    Contract(2, 1, 8, uint8=True),
    Contract(2, 3, 16, 10, task="inpaint"),
    Contract(1, 3, 16, task="superres", factor=4),
    Contract(1, 3, 16, 10, batch=4),
]


def words(command):
    return [word.partition("=")[0] for word in command if word.startswith("--")]


@pytest.mark.parametrize("contract", CONTRACTS)
def test_commands_use_published_options_alone(contract, tmp_path):
    batches = profile(None, contract.batch)
    build = to_tensorrt.trtexec(tmp_path / "x.onnx", tmp_path / "x.plan", contract, batches)
    compare = to_tensorrt.polygraphy(tmp_path / "x.onnx", tmp_path / "x.plan", contract, batches)
    assert set(words(build)) <= TRTEXEC and set(words(compare)) <= POLYGRAPHY_RUN
    assert build[0] == "trtexec" and compare[:2] == ["polygraphy", "run"] and "--stronglyTyped" in build and "--strongly-typed" in compare
    dynamic = contract.batch is None
    for option, batch in zip(("--minShapes", "--optShapes", "--maxShapes"), batches, strict=True):
        [shapes] = [word.partition("=")[2] for word in build if word.startswith(option)] or [None]
        assert (shapes is not None) == dynamic
        if dynamic:
            given = dict(part.split(":") for part in shapes.split(","))
            assert given == {name: "x".join(map(str, (batch, *shape))) for name, (shape, _) in contract.inputs.items()}
    for option in ("--input-shapes", "--val-range"):
        start = compare.index(option) + 1
        assert [part.partition(":")[0] for part in compare[start : start + len(contract.inputs)]] == list(contract.inputs)


def test_the_exact_commands():
    contract = Contract(1, 3, 32, 10, precision="fp16")
    assert " ".join(to_tensorrt.trtexec("m.onnx", to_tensorrt.Path("m.plan"), contract, Profile(1, 4, 16))) == (
        "trtexec --onnx=m.onnx --saveEngine=m.plan --stronglyTyped --timingCacheFile=m.timing.cache"
        " --minShapes=noise:1x3x32x32,labels:1 --optShapes=noise:4x3x32x32,labels:4 --maxShapes=noise:16x3x32x32,labels:16 --skipInference"
    )
    assert " ".join(to_tensorrt.polygraphy("m.onnx", to_tensorrt.Path("m.plan"), contract, Profile(1, 4, 16))) == (
        "polygraphy run m.onnx --onnxrt --trt --strongly-typed --trt-min-shapes noise:[1,3,32,32] labels:[1]"
        " --trt-opt-shapes noise:[4,3,32,32] labels:[4] --trt-max-shapes noise:[16,3,32,32] labels:[16]"
        " --input-shapes noise:[4,3,32,32] labels:[4] --val-range noise:[-3,3] labels:[0,9]"
        " --load-timing-cache m.timing.cache --save-timing-cache m.timing.cache --atol 0.02 --rtol 0"
    )


def test_profiles_are_checked():
    assert profile(None, None) == (1, 4, 16) and profile((1, 2, 8), None) == (1, 2, 8) and profile(None, 3) == (3, 3, 3)
    for batches, batch in (((4, 1, 16), None), ((0, 1, 2), None), ((1, 2), None), ((1, 2, 3), 3)):
        with pytest.raises(InputError, match="--profile"):
            profile(batches, batch)


@pytest.mark.slow
def test_without_tensorrt_the_command_writes_a_script(tmp_path, monkeypatch, capsys):
    """The whole command, on a graph that is already exported; the script is one that a shell reads."""
    monkeypatch.setattr(to_tensorrt, "can_build", lambda: False)
    done, asked = exported("tensorrt"), {}
    monkeypatch.setattr(to_onnx, "export_onnx", lambda *a, **options: asked.update(options) or done)
    monkeypatch.setattr("fastcm.api.load_denoiser", lambda model: (None, {}))
    assert cli.main(["export", "run", "--tensorrt", str(tmp_path / "x.plan"), "--precision", "fp16", "--profile", "1,2,8"]) == 0
    assert asked["target"] == "tensorrt" and asked["out"] == tmp_path / "x.onnx" and asked["precision"] == "fp16"
    script = done.path.with_suffix(".tensorrt.sh")
    try:
        assert str(script) in capsys.readouterr().out
        subprocess.run(["sh", "-n", str(script)], check=True)
        commands = [shlex.split(line) for line in script.read_text().splitlines() if line.startswith(("trtexec", "polygraphy"))]
        assert commands[0] == to_tensorrt.trtexec("tensorrt.onnx", to_tensorrt.Path("x.plan"), done.contract, Profile(1, 2, 8))
        assert commands[1][0] == "polygraphy" and "labels:[0,2]" in commands[1]
    finally:
        script.unlink()


def test_bad_options_are_named(capsys):
    for argv, expected in (
        (["--tensorrt", "x.onnx"], "unknown kind of file in --tensorrt: x.onnx"),
        (["--onnx", "x.onnx", "--profile", "1,2,4"], "an option of --tensorrt alone: --profile"),
        (["--tensorrt", "x.plan", "--profile", "1,b"], "not a profile in --profile: 1,b"),
    ):
        assert cli.main(["export", "run", *argv]) == 2
        assert expected in capsys.readouterr().err


class Stand(types.ModuleType):
    """tensorrt's calls as its documentation has them, answered by ONNX Runtime."""

    def __init__(self, log):
        super().__init__("tensorrt")
        stand, self.broken = self, False

        class Logger:
            ERROR = 1

            def __init__(self, level):
                pass

        class Shapes:
            def set_shape(self, name, smallest, tuned, largest):
                log.append(("shape", name, smallest, tuned, largest))

        class Cache:
            def serialize(self):
                return b"timings"

        class Config:
            def create_timing_cache(self, content):
                log.append(("cache", content))
                return Cache()

            def set_timing_cache(self, cache, ignore_mismatch):
                pass

            def add_optimization_profile(self, shapes):
                log.append("profile")

        class Builder:
            def __init__(self, logger):
                self.create_builder_config, self.create_optimization_profile = Config, Shapes

            def create_network(self, flags):
                log.append(("flags", flags))
                return types.SimpleNamespace()

            def build_serialized_network(self, network, config):
                return network.path.encode()

        class OnnxParser:
            def __init__(self, network, logger):
                self.network = network

            def parse_from_file(self, path):
                self.network.path = path
                return path.endswith(".onnx")

            def get_error(self, index):
                return "no such file"

        class Context:
            def __init__(self, path):
                self.run, self.addresses = cpu_run(to_tensorrt.Path(path)), {}

            def set_input_shape(self, name, shape):
                self.addresses[name] = shape

            def set_tensor_address(self, name, address):
                log.append(("address", name))

            def execute_async_v3(self, stream):
                feeds = {name: tensor.numpy() for name, tensor in stand.tensors[-1].items()}
                stand.images[-1].copy_(torch.from_numpy(self.run(feeds)) + (1 if stand.broken else 0))
                return True

        self.Logger, self.Builder, self.OnnxParser = Logger, Builder, OnnxParser
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.Runtime = lambda logger: types.SimpleNamespace(
            deserialize_cuda_engine=lambda engine: types.SimpleNamespace(create_execution_context=lambda: Context(engine.decode()))
        )


@pytest.mark.slow
def test_the_engine_is_compared_before_it_is_published(tmp_path, monkeypatch):
    log, done = [], exported("plain")
    stand = Stand(log)
    stand.tensors, stand.images = [], []
    monkeypatch.setitem(sys.modules, "tensorrt", stand)
    real, empty = torch.from_numpy, torch.empty

    class Tensors(dict):
        pass

    def from_numpy(array):
        tensor = real(array)
        stand.tensors[-1:] = [Tensors(stand.tensors[-1] if stand.tensors else {}, **{"labels" if array.ndim == 1 else "noise": tensor})]
        return types.SimpleNamespace(cuda=lambda: tensor)

    def empty_on_device(shape, dtype, device):
        stand.images.append(empty(shape, dtype=dtype))
        return stand.images[-1]

    fake = types.SimpleNamespace(
        from_numpy=from_numpy,
        empty=empty_on_device,
        uint8=torch.uint8,
        float32=torch.float32,
        cuda=types.SimpleNamespace(current_stream=lambda: types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None)),
    )
    monkeypatch.setattr(to_tensorrt, "torch", fake)
    plan = tmp_path / "x.plan"
    rows = to_tensorrt.build_engine(done, plan, Profile(1, 2, 4))
    assert [row.batch for row in rows] == [1, 2] and all(0 < row.max_error < 1e-5 for row in rows)
    assert log[:3] == [("flags", 2), ("cache", b""), ("shape", "noise", (1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8))]
    assert ("shape", "labels", (1,), (2,), (4,)) in log and ("address", "images") in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.plan", "x.timing.cache"]
    plan.unlink()
    stand.broken = True
    with pytest.raises(RunError, match="disagrees with torch in x.plan: "):
        to_tensorrt.build_engine(done, plan, Profile(1, 2, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["x.timing.cache"] and np.isfinite(done.variation)


@pytest.mark.hardware("builds a TensorRT engine")
@pytest.mark.gpu
def test_an_engine_on_the_gpu(tmp_path):
    pytest.importorskip("tensorrt")
    rows = to_tensorrt.build_engine(exported("tensorrt"), tmp_path / "x.plan", Profile(1, 2, 8))
    assert [row.batch for row in rows] == [1, 2, 5] and (tmp_path / "x.plan").stat().st_size > 0
