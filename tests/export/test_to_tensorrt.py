"""TensorRT: the commands against the published options, and the builder's calls against a stand-in for its package."""

import hashlib
import shlex
import subprocess
import sys

import pytest
from exported_models import exported
from tensorrt_stand_in import StandIn, cpu_as_cuda

from fastcm import cli
from fastcm.errors import InputError, RunError
from fastcm.export import to_onnx, to_tensorrt
from fastcm.export.tensorrt_options import POLYGRAPHY_RUN, TRTEXEC
from fastcm.export.to_tensorrt import Profile, profile
from fastcm.generation import tensorrt_bindings
from fastcm.generation.onnx_contract import Contract
from fastcm.generation.plan_generator import read_manifest

CONTRACTS = [
    Contract(1, 3, 32, 10, precision="fp16"),
    Contract(2, 1, 8, uint8=True),
    Contract(2, 3, 16, 10, task="inpaint"),
    Contract(1, 3, 16, task="superres", factor=4),
    Contract(1, 3, 16, 10, batch=4),
]


LABELS = ("shape", "labels", (1,), (2,), (4,))


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
        "trtexec --onnx=m.onnx --saveEngine=m.plan --stronglyTyped --noTF32 --timingCacheFile=m.plan.timing.cache"
        " --minShapes=noise:1x3x32x32,labels:1 --optShapes=noise:4x3x32x32,labels:4 --maxShapes=noise:16x3x32x32,labels:16 --skipInference"
    )
    assert " ".join(to_tensorrt.polygraphy("m.onnx", to_tensorrt.Path("m.plan"), contract, Profile(1, 4, 16))) == (
        "polygraphy run m.onnx --onnxrt --trt --strongly-typed --trt-min-shapes noise:[1,3,32,32] labels:[1]"
        " --trt-opt-shapes noise:[4,3,32,32] labels:[4] --trt-max-shapes noise:[16,3,32,32] labels:[16]"
        " --input-shapes noise:[4,3,32,32] labels:[4] --val-range noise:[-3,3] labels:[0,9]"
        " --load-timing-cache m.plan.timing.cache --save-timing-cache m.plan.timing.cache --atol 0.02 --rtol 0"
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
    script = done.path.with_name(f"{done.path.name}.tensorrt.sh")
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
        (["--onnx", "x.onnx", "--gpu", "rtx50"], "an option of --tensorrt alone: --gpu"),
        (["--tensorrt", "x.plan", "--gpu", "rtx51"], "unknown card in --gpu: rtx51. Use rtx50, rtx40, "),
        (["--tensorrt", "x.plan", "--gpu", "rtx51"], "Did you mean 'rtx50'?"),
        (["--tensorrt", "x.plan", "--gpu", "rtx50,"], "unknown card in --gpu: none"),
        (["--tensorrt", "x.plan", "--gpu", "h100"], "a data-centre card, for which TensorRT for RTX has no code, in --gpu: h100"),
        (["--tensorrt", "x.plan", "--gpu", "rtx40,sm_90"], "a data-centre card, for which TensorRT for RTX has no code, in --gpu: sm_90"),
        (["--tensorrt", "x.plan", "--gpu", "sm_90a"], "unknown card in --gpu: sm_90a"),
        (["--tensorrt", "x.plan", "--gpu", "current,rtx40"], "current beside other cards in --gpu: current,rtx40"),
        (["--aot", "x.pt2", "--gpu", "rtx40"], "an option that --aot decides itself: --gpu"),
        (["--tensorrt", "x.plan", "--profile", "1,b"], "not a profile in --profile: 1,b"),
    ):
        assert cli.main(["export", "run", *argv]) == 2
        assert expected in capsys.readouterr().err


@pytest.fixture
def stand(monkeypatch):
    """TensorRT's stand-in and a card's; `.log` has its calls."""
    exported("plain")  # before torch believes in a card
    log = []
    stand = StandIn(log)
    stand.log = log
    monkeypatch.setitem(sys.modules, "tensorrt", stand)
    cpu_as_cuda(monkeypatch, stand)
    tensorrt_bindings.logger.cache_clear()
    yield stand
    tensorrt_bindings.logger.cache_clear()


@pytest.mark.slow
def test_the_engine_is_compared_before_it_is_published(tmp_path, stand):
    done, plan = exported("plain"), tmp_path / "x.plan"
    built = to_tensorrt.build_engine(done, plan, Profile(1, 2, 4))
    assert [row.batch for row in built.comparisons] == [1, 2] and all(0 < row.max_error < 1e-5 for row in built.comparisons)
    assert stand.log[:4] == [("flags", 2), ("cleared", "tf32"), ("shape", "noise", (1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8)), LABELS]
    assert stand.log[4:6] == ["profile", ("cache", b"")] and built.capabilities == ((8, 6),)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.plan", "x.plan.manifest.json", "x.plan.timing.cache"]
    content = read_manifest(plan)
    assert content["engine"] == {"runtime": "tensorrt", "version": "10.15.1", "capabilities": [[8, 6]], "profile": [1, 2, 4]}
    assert content["onnx"] == {"name": "plain.onnx", "sha256": hashlib.sha256(done.path.read_bytes()).hexdigest()}
    assert content["config"]["classes"] == ["ant", "bee", "cat"] and "NVIDIA" in content["licence"]
    plan.unlink()
    stand.broken = True
    with pytest.raises(RunError, match="disagrees with torch in x.plan: "):
        to_tensorrt.build_engine(done, plan, Profile(1, 2, 4))
    assert not plan.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.hardware("builds a TensorRT engine")
@pytest.mark.gpu
def test_an_engine_on_the_gpu(tmp_path):
    pytest.importorskip("tensorrt")
    built = to_tensorrt.build_engine(exported("tensorrt"), tmp_path / "x.plan", Profile(1, 2, 8))
    assert [row.batch for row in built.comparisons] == [1, 2, 5] and (tmp_path / "x.plan").stat().st_size > 0
