"""Every kind of graph through NVIDIA's own parser and compiler, TensorRT for RTX, which need no GPU."""

import onnx
import pytest
from exported_models import FORMS, INFO, exported
from onnx import TensorProto, helper
from test_generator import randomised
from test_inference import NETWORKS

from fastcm import cli, networks
from fastcm.consistency.betas import Betas
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError, RunError
from fastcm.export import gpus, to_onnx, to_tensorrt
from fastcm.export.compiler import Profile, compile_graph
from fastcm.export.onnx_metadata import metadata
from fastcm.export.program import build
from fastcm.export.targets import TARGETS
from fastcm.generation.onnx_contract import Contract
from fastcm.generation.plan_generator import read_manifest
from fastcm.generation.tensorrt_bindings import RTX

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: pip install 'fastcm[tensorrt]'")
pytestmark = pytest.mark.slow
BLACKWELL = ((12, 0),)
UNET2D = {"resolution": 8, "in_channels": 1, "out_channels": 1, "widths": (8, 8), "blocks": 1, "norm_groups": 4}
UNET2D |= {"down_blocks": ("DownBlock2D", "AttnDownBlock2D"), "up_blocks": ("AttnUpBlock2D", "UpBlock2D")}
ARCHITECTURES = {**NETWORKS, "unet2d": ("unet2d", UNET2D)}


def graph(name, folder, target="tensorrt", noise=None, **asked):
    """(file, contract) of an architecture of ARCHITECTURES with random weights, converted and not compared."""
    kind, options = ARCHITECTURES[name]
    denoiser = Denoiser(randomised(networks.build(kind, options)), Preconditioning(**(noise or {})))
    info = {"resolution": options["resolution"], "channels": options["in_channels"]}
    form = {"precision": "fp32", "batch": None, "uint8": False, "factor": None, "seeded": False}
    whole, levels, contract = to_onnx.graph_of(denoiser, info, **{"steps": 1, "sigmas": None, "task": "generate", **asked}, **form)
    runtime, properties = TARGETS[target], metadata(denoiser, info, sigmas=levels, contract=contract)
    model = to_onnx.convert(build(whole, levels, contract), contract, target=runtime, opset=runtime.opset, properties=properties)
    to_onnx.write(model, folder / "x.onnx")
    return folder / "x.onnx", contract


@pytest.mark.parametrize("form", [form for form in FORMS if form != "seeded"])
def test_each_kind_of_graph(form):
    """One step and two, symbolic and fixed batch, fp32 and fp16, floats and bytes, inpainting and super-resolution."""
    done = exported(form)
    batches = to_tensorrt.profile(None, done.contract.batch)
    assert_engine(compile_graph(RTX, done.path, done.contract, batches, capabilities=BLACKWELL))


def assert_engine(made):
    assert len(made.engine) > 10_000 and made.layers > 30 and made.timings is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture(name, tmp_path):
    path, contract = graph(name, tmp_path)
    assert_engine(compile_graph(RTX, path, contract, Profile(1, 2, 4), capabilities=BLACKWELL))


@pytest.mark.parametrize("c_noise", ["interpolated step", "nearest step"])
def test_a_diffusion_models_denoiser(c_noise, tmp_path):
    """Its noise embedding and the search of a step among the chain's are part of the graph."""
    noise = {"form": "epsilon", "c_noise": c_noise, "betas": Betas(), "sigma_min": 0.01, "sigma_max": 157.0}
    path, contract = graph("unet2d", tmp_path, noise=noise, steps=None, task="denoise")
    assert_engine(compile_graph(RTX, path, contract, Profile(1, 2, 4), capabilities=BLACKWELL))


def test_the_compiler_agrees_that_seeds_are_not_for_it():
    with pytest.raises(InputError, match="a runtime without 64-bit shifts for --seeded in --target: tensorrt"):
        to_onnx.export_onnx(None, {}, out="x.onnx", target="tensorrt", seeded=True)
    done = exported("seeded")
    with pytest.raises(RunError, match=r"TensorRT for RTX refuses seeded.onnx: \w+ \(\S+\): .*No engine was written"):
        compile_graph(RTX, done.path, done.contract, Profile(1, 2, 4), capabilities=BLACKWELL)


def test_a_refusal_names_the_node_and_leaves_nothing(tmp_path):
    noise, images = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, 4, 4]) for name in ("noise", "images"))
    nodes = [helper.make_node("Sin", ["noise"], ["x"], name="first"), helper.make_node("Det", ["x"], ["images"], name="the_culprit")]
    model = helper.make_model(helper.make_graph(nodes, "g", [noise], [images]), opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "x.onnx")
    done = exported("plain")._replace(path=tmp_path / "x.onnx", contract=Contract(1, 1, 4))
    with pytest.raises(RunError, match=r"TensorRT for RTX refuses x.onnx: Det \(the_culprit\): unsupported node. No engine") as caught:
        to_tensorrt.build_engine(done, tmp_path / "x.plan", Profile(1, 2, 4), kind=RTX, capabilities=BLACKWELL)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_the_command_builds_for_several_cards(tmp_path, monkeypatch, capsys):
    """The whole command, on a graph that is already exported; the manifest says what it is and what it came from."""
    done, asked = exported("plain"), {}
    monkeypatch.setattr(to_onnx, "export_onnx", lambda *a, **options: asked.update(options) or done)
    monkeypatch.setattr("fastcm.api.load_denoiser", lambda model: (None, {}))
    plan = tmp_path / "x.plan"
    assert cli.main(["export", "run", "--tensorrt", str(plan), "--gpu", "rtx50,rtx40", "--profile", "1,2,8"]) == 0
    assert "for sm_120, sm_89, batches 1, 2, 8; its images are compared where it first runs" in capsys.readouterr().out
    content = read_manifest(plan)
    assert asked["target"] == "tensorrt" and asked["out"] == tmp_path / "x.onnx"
    assert content["engine"]["capabilities"] == [[12, 0], [8, 9]] and content["engine"]["profile"] == [1, 2, 8]
    assert content["onnx"]["name"] == "plain.onnx" and content["graph"] == done.contract._asdict() and content["config"]["licence"] == "MIT"
    assert content["versions"]["tensorrt-rtx-cu12-libs"] == content["engine"]["version"] and "NVIDIA" in content["licence"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.plan", "x.plan.manifest.json"] and INFO["licence"] == "MIT"
    # On this machine without a card, the engine is asked for by its manifest and refused by name.
    assert cli.main(["sample", str(plan), "--trust"]) == 2
    assert "an engine without a CUDA device in MODEL: " in capsys.readouterr().err


def test_names_of_cards():
    assert gpus.capabilities(["rtx50", "RTX40", "sm_86", "rtx30", "sm75"]) == ((12, 0), (8, 9), (8, 6), (7, 5))
    assert gpus.capabilities(["a100-class"]) == ((8, 0),) and gpus.capabilities(["sm_121"]) == ((12, 1),)
    assert gpus.capabilities(["current"]) is None and gpus.sm((12, 0)) == "sm_120"
