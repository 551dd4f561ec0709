"""--target mobile: graphs of floats, and the pictures that MNN and ncnn make with them."""

import importlib.util

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_models import INFO, MOBILE_FORMS, exported, tiny_denoiser
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fastcm import cli
from fastcm.benchmarks.latency import other_runtimes
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError, RunError
from fastcm.export.merged_scales import merge_scales
from fastcm.export.parity import check_inputs
from fastcm.export.program import build
from fastcm.export.to_onnx import export_onnx
from fastcm.generation.generator import Generator
from fastcm.generation.onnx_contract import Contract
from fastcm.generation.onnx_generator import OnnxGenerator

MNN, NCNN = ("MNN",), ("ncnn", "pnnx")


@pytest.mark.slow
@pytest.mark.parametrize("form", MOBILE_FORMS)
def test_the_graph_looks_up_and_splits_nothing(form):
    model = onnx.load(exported(form).path)
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Gather", "Split", "Where", "Cast", "Shape", "Expand"} and "Conv" in operators
    steps = (2,) if form == "mobile-steps" else ()
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
    assert shapes == {"noise": [1, *steps, 1, 8, 8], "labels": [1, 3]}
    singles = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if np.prod(tensor.dims) == 1}
    factors = [singles[name] for node in model.graph.node if node.op_type == "Mul" for name in node.input if name in singles]
    assert factors and set(factors) == {()}


@pytest.mark.slow
def test_a_class_is_its_row_and_none_is_zeros():
    """The same call as for every other file, and the pictures of the network that was exported."""
    graph, generator = OnnxGenerator(exported("mobile").path, "cpu"), Generator(tiny_denoiser(), INFO, device="cpu")
    for label in ("ant", 2):
        images, expected = graph(range(3), label), generator(range(3), label)
        assert expected.std() > 10 and np.abs(images.astype(int) - expected).max() <= 1
    assert np.abs(graph([0], "ant").astype(int) - graph([0], 2)).max() > 5
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = build(tiny_denoiser(), graph.graph_sigmas, Contract(1, 1, 8, 3))(noise).numpy()
    np.testing.assert_allclose(graph.run({"noise": noise.numpy(), "labels": np.zeros((1, 3), np.float32)}), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", MOBILE_FORMS)
@pytest.mark.parametrize("runtime", ["MNN", "ncnn"])
def test_converted_graphs_draw_the_same_pictures(form, runtime, tmp_path):
    assert_draws_the_same(runtime, exported(form), tmp_path)


def assert_draws_the_same(runtime, done, folder):
    """The graph of an export in this runtime makes ONNX Runtime's pictures; a skip where the runtime is not installed."""
    missing = [module for module in (MNN if runtime == "MNN" else NCNN) if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'fastcm[mobile]'")
    path = folder / "graph.onnx"
    path.write_bytes(done.path.read_bytes())
    run, expected = other_runtimes.opened(runtime, path), onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for index in range(3):
        feeds = {name: tensor[index : index + 1].numpy() for name, tensor in check_inputs(done.contract).items()}
        images = expected.run(["images"], feeds)[0]
        assert images.std() > 0.05 and np.abs(run(feeds) - images).max() < 1e-3


def chain(*, sums):
    """c2 (c1 x), added to c3 relu(c1 x) where `sums`: the form that MNN's converter aborts at."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", "y"))
    scales = [numpy_helper.from_array(np.full((1, 1, 1, 1), value, np.float32), name) for name, value in (("c1", 3), ("c2", 5), ("c3", 7))]
    nodes = [helper.make_node("Mul", ["x", "c1"], ["a"]), helper.make_node("Mul", ["c2", "a"], ["b" if sums else "y"])]
    if sums:
        nodes += [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Mul", ["c3", "r"], ["d"])]
        nodes += [helper.make_node("Add", ["b", "d"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], scales), opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_products_with_numbers_become_one():
    import onnx_ir

    model = onnx_ir.from_proto(chain(sums=True))
    merge_scales(model)
    merged = {node.outputs[0].name: node for node in model.graph}
    assert [value.name for value in merged["b"].inputs] == ["b_number", "x"] and merged["b"].inputs[0].const_value.numpy() == 15
    assert merged["b"].inputs[0].const_value.shape.rank() == 0
    x = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    sessions = [onnxruntime.InferenceSession(proto.SerializeToString()) for proto in (chain(sums=True), onnx_ir.to_proto(model))]
    np.testing.assert_allclose(*(session.run(None, {"x": x})[0] for session in sessions), rtol=1e-6)


def test_mnn_refuses_what_the_merge_removes(tmp_path):
    """What docs/deploy.md says of MNN 3.6; a version that takes it makes merged_scales.py superfluous."""
    pytest.importorskip("_tools", reason="MNN is not installed: pip install 'fastcm[mobile]'")
    onnx.save(chain(sums=True), tmp_path / "x.onnx")
    with pytest.raises(RunError, match="MNN's converter fails: "):
        other_runtimes.opened("MNN", tmp_path / "x.onnx")


def test_labels_in_the_contract():
    numbers = np.array([1, -1])
    assert Contract(1, 1, 8, 3).labels(numbers) is numbers
    rows = Contract(1, 1, 8, 3, floats=True).labels(numbers)
    assert rows.dtype == np.float32 and rows.tolist() == [[0, 1, 0], [0, 0, 0]]


def test_an_inpainting_mask_is_arithmetic():
    """Half and more is generated, what is below is kept, as where the mask is compared."""
    programs = []
    for floats in (False, True):
        contract = Contract(1, 1, 8, None, task="inpaint", floats=floats, batch=1)
        programs.append(build(tiny_denoiser(classes=None), (3.0,), contract))
    random = torch.Generator().manual_seed(0)
    image, noise = torch.randn(1, 1, 8, 8, generator=random).clamp(-1, 1), torch.randn(1, 1, 8, 8, generator=random)
    mask = torch.tensor([0.0, 0.25, 0.49, 0.5, 0.75, 1.0, 0.0, 1.0]).expand(1, 1, 8, 8)
    with torch.no_grad():
        compared, computed = (program(image, mask, noise) for program in programs)
    torch.testing.assert_close(computed, compared)
    kept = mask < 0.5
    assert torch.equal(computed[kept], image[kept]) and not torch.equal(computed[~kept], image[~kept])


class Foreign(nn.Module):
    def forward(self, x, c_noise, labels=None):
        return x


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp16"}, "half precision for --target mobile in --precision: fp16. The converters make it"),
        ({"uint8": True}, "bytes from a runtime of floats in --uint8: --target mobile"),
        ({"seeded": True}, "a runtime without 64-bit shifts for --seeded in --target: mobile"),
    ],
)
def test_what_floats_cannot_be_is_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        export_onnx(tiny_denoiser(), INFO, out=tmp_path / "x.onnx", target="mobile", **options)
    network = Foreign()
    network.config = type("Config", (), {"num_classes": 3, "in_channels": 1, "resolution": 8})
    with pytest.raises(InputError, match="classes in a network whose embedding cannot be folded, for --target mobile: Foreign"):
        export_onnx(Denoiser(network, Preconditioning()), {}, out=tmp_path / "x.onnx", target="mobile")
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_the_target_is_suggested(tmp_path):
    with pytest.raises(InputError, match="unknown value in --target: mobil. Use one of ort, tensorrt, web, mobile. Did you mean 'mobile'?"):
        export_onnx(tiny_denoiser(), INFO, out=tmp_path / "x.onnx", target="mobil")
    assert "mobile" in " ".join(action.help or "" for action in cli._actions_of(cli.build_parser("export"), "export"))
