"""Feature networks of others: a module, an ONNX file, Inception's adapter; the reference that is computed from them once."""

import hashlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from fastcm.errors import InputError
from fastcm.evaluation import extractors, features
from fastcm.evaluation.extractors import InceptionFeatures, ModuleFeatures, OnnxFeatures, module_sha256, open_extractor
from fastcm.evaluation.protocol import evaluate
from fastcm.evaluation.reference import compute_reference
from fastcm.evaluation.samples import Samples


def images(count=9, *, channels=3, side=8):
    return np.random.default_rng(0).integers(0, 256, size=(count, channels, side, side), dtype=np.uint8)


class Pooled(nn.Module):
    """A random projection of the image."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 4, stride=4)

    def forward(self, x):
        return self.layer(x).flatten(1)


def test_a_module_sees_images_in_minus_one_to_one_and_runs_in_eval_mode():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((x, self.training))
            return x.mean((2, 3)), x.flatten(1)[:, :7]

    x = images()
    found, scores = ModuleFeatures(Spy().train(), name="spy").extract(x)
    np.testing.assert_allclose(found, (x / 127.5 - 1).mean((2, 3)), atol=1e-6)
    assert found.dtype == np.float64 and scores.shape == (9, 7)
    assert seen[0][1] is False and seen[0][0].min() >= -1 and seen[0][0].max() <= 1


def test_the_hash_of_a_module_follows_its_weights():
    module = Pooled()
    before = module_sha256(module)
    assert before == module_sha256(module)
    with torch.no_grad():
        module.layer.bias[0] += 1
    assert module_sha256(module) != before


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda x: x.mean((2, 3)) * float("nan"), "non-finite features in --features: mine: 9 of 9 images"),
        (lambda x: x.mean((2, 3))[:4], r"not one row of features per image in --features: mine: \[4, 3\] for 9"),
        (lambda x: x @ torch.zeros(3, 3), r"refuses the images in --features: mine: .*They are \[3, 8, 8\]"),
    ],
)
def test_what_a_module_may_not_do(forward, words):
    module = nn.Module()
    module.forward = forward
    with pytest.raises(InputError, match=words):
        ModuleFeatures(module, name="mine").extract(images())


def onnx_file(path, *, shape=("batch", 3, 8, 8), inputs=1):
    """A graph that averages over height and width; its second output is twice that."""
    onnx = pytest.importorskip("onnx")
    names = ["x", "y"][:inputs]
    nodes = [onnx.helper.make_node("GlobalAveragePool", ["x"], ["pooled"]), onnx.helper.make_node("Add", ["pooled", "pooled"], ["scores"])]
    given = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape)) for name in names]
    made = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [shape[0], shape[1], 1, 1]) for name in ("pooled", "scores")]
    graph = onnx.helper.make_graph(nodes, "pool", given, made)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("batch", ["batch", 4])
def test_an_onnx_file_gives_features_and_scores(tmp_path, batch):
    x = images()
    found = OnnxFeatures(onnx_file(tmp_path / "a.onnx", shape=(batch, 3, 8, 8)))
    values, scores = found.extract(x)
    np.testing.assert_allclose(values, (x / 127.5 - 1).mean((2, 3)), atol=1e-6)
    np.testing.assert_allclose(scores, 2 * values, atol=1e-6)
    assert found.sha256 == hashlib.sha256((tmp_path / "a.onnx").read_bytes()).hexdigest()


def test_onnx_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"images of another shape for --features a.onnx: \[1, 8, 8\]. It takes \[3, 8, 8\]"):
        OnnxFeatures(onnx_file(tmp_path / "a.onnx")).extract(images(channels=1))
    with pytest.raises(InputError, match="not a feature network in --features"):
        OnnxFeatures(onnx_file(tmp_path / "b.onnx", inputs=2))
    with pytest.raises(InputError, match="no such file in --features"):
        OnnxFeatures(tmp_path / "none.onnx")


def test_missing_or_wrong_inception_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"no Inception weights in --features inception: .*weights-inception.*sha256 begins 6726825d"):
        InceptionFeatures()
    (tmp_path / "w.pth").write_bytes(b"something else")
    with pytest.raises(InputError, match="other Inception weights in .*w.pth: sha256 .*--inception-weights FILE"):
        InceptionFeatures(tmp_path / "w.pth")


def weights_file(tmp_path, monkeypatch, content):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return path


def test_inception_without_torch_fidelity_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    path = weights_file(tmp_path, monkeypatch, {"a": torch.zeros(1)})
    with pytest.raises(InputError, match="torch-fidelity does not import for --features inception: .*pip install torch-fidelity"):
        InceptionFeatures(path)


class FakeInception(nn.Module):
    """The interface of torch-fidelity's class: uint8 in, a tuple in the order of the list out."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048", "logits_unbiased"])
        self.path = feature_extractor_weights_path

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return x.float().mean((2, 3)).repeat(1, 683)[:, :2048], x.float().amax((2, 3)).repeat(1, 336)


@pytest.fixture
def fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    package = types.ModuleType("torch_fidelity")
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_gets_bytes_of_three_channels(tmp_path, monkeypatch, fidelity, channels):
    path = weights_file(tmp_path, monkeypatch, {"a": torch.zeros(1)})
    x = images(109, channels=channels)
    values, scores = InceptionFeatures(path).extract(x)
    assert values.shape == (109, 2048) and scores.shape == (109, 1008)
    np.testing.assert_allclose(values[:, :3], np.broadcast_to(x.mean((2, 3)), (109, 3)), rtol=1e-6)


def test_no_code_in_inception_weights_is_run(tmp_path, monkeypatch, fidelity):
    """torch-fidelity would unpickle whatever the file holds."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = weights_file(tmp_path, monkeypatch, pickle.dumps({"a": Trap()}))
    with pytest.raises(InputError, match="not a plain state dict in"):
        InceptionFeatures(path)
    assert not (tmp_path / "ran").exists()


def test_a_module_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "import torch\nnet = torch.nn.Flatten()\ndef make():\n    return torch.nn.Flatten()\ndef wrong():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for text in ("my_features:net", "my_features:make"):
        found = open_extractor(text)
        assert found.name == text and found.extract(images())[0].shape == (9, 192)
    for text, words in (
        ("my_features:wrong", "not a torch module in --features: my_features:wrong gives int"),
        ("my_features:none", "cannot import --features: my_features:none"),
        ("no_such_module:net", "cannot import --features"),
        ("incepton", "unknown value in --features: incepton. Use judge, inception, a file.onnx or package.module:name"),
    ):
        with pytest.raises(InputError, match=words):
            open_extractor(text)


def test_the_reference_is_computed_once_per_data_and_network(tmp_path):
    calls = []

    class Counting(ModuleFeatures):
        def extract(self, images):
            calls.append(len(images))
            return super().extract(images)

    data, rows = images(40), np.arange(40)
    extractor = Counting(Pooled(), name="pooled")
    first = compute_reference(extractor, data, rows, data_sha256="a", cache=tmp_path)
    again = compute_reference(extractor, data, rows, data_sha256="a", cache=tmp_path)
    assert sum(calls) == 40 and np.array_equal(first.mean, again.mean) and np.array_equal(first.values, again.values)
    np.testing.assert_allclose(first.covariance, np.cov(extractor.extract(data)[0].T), rtol=1e-7, atol=1e-12)
    calls.clear()
    for change in ({"data_sha256": "b"}, {"rows": rows[:30]}, {"extractor": Counting(Pooled(), name="pooled")}):
        arguments = {"extractor": extractor, "rows": rows, "data_sha256": "a", **change}
        compute_reference(arguments["extractor"], data, arguments["rows"], data_sha256=arguments["data_sha256"], cache=tmp_path)
    assert sum(calls) == 40 + 30 + 40
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    calls.clear()
    restored = compute_reference(extractor, data, rows, data_sha256="a", cache=tmp_path)
    assert sum(calls) == 40 and np.array_equal(restored.mean, first.mean), "a damaged file is made again"


def test_the_judge_is_trained_once_per_data(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "STEPS", (5, 5))
    data, labels = images(24, channels=1), np.arange(24) % 3
    first = features.train_judge(data, labels, cache=tmp_path)
    trained = []
    fit = features.fit_network
    monkeypatch.setattr(features, "fit_network", lambda *arguments: (trained.append(1), fit(*arguments)))
    again = features.train_judge(data, labels, cache=tmp_path)
    assert not trained and again.sha256 == first.sha256 and again.held_out_accuracy == first.held_out_accuracy
    for other in ((data ^ 1, labels, 0), (data, (labels + 1) % 3, 0), (data, labels, 1)):
        features.train_judge(other[0], other[1], seed=other[2], cache=tmp_path)
    assert len(trained) == 3
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert features.train_judge(data, labels, cache=tmp_path).sha256 == first.sha256 and len(trained) == 4


def test_every_figure_names_the_features_it_was_made_with():
    data = np.repeat(images(60), 2, axis=0)
    pooled = ModuleFeatures(Pooled(), name="pooled")
    result = evaluate([Samples("set", data)], data, None, extractor=pooled, metrics=("fid", "kid", "precision"))
    row, protocol = result["sets"][0], result["protocol"]
    assert {row[name]["features"] for name in ("fid", "kid", "precision")} == {"pooled"}
    assert row["fid"]["mean"] == pytest.approx(0, abs=1e-8) and row["precision"]["mean"] == 1
    assert (protocol["features_name"], protocol["reference"], protocol["reference_count"]) == ("pooled", "all images of the data", 120)
    assert protocol["data_sha256"] == protocol["reference_sha256"] and protocol["rounding"].startswith("uint8")
    with pytest.raises(InputError, match="no class scores for --metrics is: --features pooled"):
        evaluate([Samples("set", data)], data, None, extractor=ModuleFeatures(Pooled(), name="pooled"), metrics=("is",))
