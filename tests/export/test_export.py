"""ONNX export: what is published has made torch's images in ONNX Runtime, and nothing else is published."""

import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from exported_models import FORMS, INFO, LEVELS, TINY, exported, tiny_denoiser
from test_generator import SMALL, randomised
from torch import nn

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError, RunError
from fastcm.export import fusion, parity, publish, to_onnx
from fastcm.export.parity import check_images, cpu_run
from fastcm.export.program import build
from fastcm.export.targets import TARGETS
from fastcm.export.to_onnx import export_onnx
from fastcm.generation.onnx_contract import TOLERANCE, Contract
from fastcm.networks.blocks import Attention, GroupNorm, ScaleShift

PLAIN = Contract(1, 1, 8, 3)


def shapes(values):
    return {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


def operators(form):
    return {node.op_type for node in onnx.load(exported(form).path).graph.node}


def floats(form):
    """Shapes of the graph's floating-point constants, by type."""
    kinds = onnx.TensorProto
    return {
        name: [tuple(tensor.dims) for tensor in onnx.load(exported(form).path).graph.initializer if tensor.data_type == kind]
        for name, kind in (("float32", kinds.FLOAT), ("float16", kinds.FLOAT16))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "inputs", "images", "opset"),
    [
        ("plain", {"noise": ["batch", 1, 8, 8], "labels": ["batch"]}, ["batch", 1, 8, 8], 18),
        ("tensorrt", {"noise": ["batch", 2, 1, 8, 8], "labels": ["batch"]}, ["batch", 8, 8, 1], 21),
        (
            "inpaint",
            {"image": ["batch", 1, 8, 8], "mask": ["batch", 1, 8, 8], "noise": ["batch", 2, 1, 8, 8], "labels": ["batch"]},
            ["batch", 1, 8, 8],
            18,
        ),
        ("superres", {"image": ["batch", 1, 4, 4], "noise": ["batch", 1, 8, 8], "labels": ["batch"]}, ["batch", 8, 8, 1], 18),
        ("seeded", {"seeds": ["batch"], "labels": ["batch"]}, ["batch", 1, 8, 8], 18),
        ("batch", {"noise": [3, 1, 8, 8], "labels": [3]}, [3, 1, 8, 8], 18),
    ],
)
def test_the_graphs_have_the_contracts_form(form, inputs, images, opset):
    done = exported(form)
    model = onnx.load(done.path)
    assert shapes(model.graph.input) == inputs and shapes(model.graph.output) == {"images": images}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)] and done.opset == opset
    properties = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert properties["fastcm.sigmas"] == list(done.sigmas) and properties["fastcm.graph"] == done.contract._asdict()
    assert properties["fastcm.config"]["network"]["channels"] == 8 and properties["fastcm.config"]["licence"] == "MIT"
    assert b"/fastcm/" not in done.path.read_bytes()  # no traces of the machine's folders
    assert sorted(path.name for path in done.path.parent.glob(f"{form}*")) == [f"{form}.onnx", f"{form}.onnx.manifest.json"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_no_embedding_is_left(form):
    """The noise level is a constant: no sines, no table of class embeddings, only one row per class, level and block."""
    done = exported(form)
    model = onnx.load(done.path)
    left = {"Sin", "Cos"} if form == "seeded" else set()  # of its Box-Muller transform
    assert operators(form) & {"Sin", "Cos", "Gemm", "Exp"} == left
    assert not [name for name in (*(i.name for i in model.graph.initializer), *(n.name for n in model.graph.node)) if "embed" in name]
    tables = [dims for shapes in floats(form).values() for dims in shapes if len(dims) == 4 and dims[0] == 4 and dims[2:] == (1, 1)]
    assert len(tables) == done.contract.steps  # three classes and none
    widths = [2 * layer.out_features for layer in tiny_denoiser().network.modules() if isinstance(layer, ScaleShift)]
    assert {dims[1] for dims in tables} == {sum(widths) // 2}
    matrices = [dims for shapes in floats(form).values() for dims in shapes if len(dims) == 2]
    assert not any(4 * TINY["channels"] in dims for dims in matrices)  # the width of the embedding


@pytest.mark.slow
def test_the_noise_stream_is_few_nodes():
    """A node costs more than its arithmetic on one image's words."""
    seeded, plain = (len(onnx.load(exported(form).path).graph.node) for form in ("seeded", "plain"))
    assert seeded - plain <= 190


@pytest.mark.slow
def test_nothing_constant_is_computed_and_nothing_is_moved_twice():
    """One row of the table per image, cut into the norms' pieces; per norm one product and one sum, per attention one transposition of q
    and one of its weights, which runtimes take into the products, and one that makes patches."""
    model = onnx.load(exported("plain").path)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["Gather"] == counts["Split"] == 1 and not counts["Unsqueeze"] and not counts["Expand"]
    attentions = sum(isinstance(layer, Attention) for layer in tiny_denoiser().network.modules())
    assert attentions and counts["Transpose"] == 2 * attentions + 1 and counts["MatMul"] == 6 * attentions
    constants = {tensor.name for tensor in model.graph.initializer}
    assert not [node.name for node in model.graph.node if all(name in constants for name in node.input if name)]
    norms = sum(isinstance(layer, GroupNorm) for layer in tiny_denoiser().network.modules())
    # Besides: the activations' x sigmoid(x), the scalings of noise, input, skip and output; attentions' norms are part of their products.
    assert counts["Mul"] == (norms - attentions) + counts["Sigmoid"] + 4


@pytest.mark.slow
def test_group_norm_has_the_targets_form():
    assert "InstanceNormalization" in operators("plain") - operators("tensorrt")
    assert "GroupNormalization" in operators("tensorrt") - operators("plain")
    assert "Round" in operators("tensorrt") and "Round" not in operators("superres")  # which WebGPU lacks


@pytest.mark.slow
def test_half_precision_is_inside_alone():
    """Weights and tables are half; what scales the images is not, and takes part in fp32."""
    done, constants = exported("tensorrt"), floats("tensorrt")
    assert sum(len(dims) == 4 for dims in constants["float16"]) >= 14
    assert {int(np.prod(dims)) for dims in constants["float32"]} == {1}  # sigma, and the conversion to bytes
    # c_in, c_skip and c_out of both levels act on fp32.
    assert constants["float32"].count((1, 1, 1, 1)) == 6 and (1, 1, 1, 1) not in constants["float16"]
    assert done.contract.tolerance == 4 and TOLERANCE["fp16"] == 2e-2
    assert all(row.max_error <= 1 for row in done.comparisons)


@pytest.mark.slow
def test_the_table_of_errors():
    done = exported("plain")
    assert [row.batch for row in done.comparisons] == [1, 2, 5] and len(parity.SEEDS) == 8
    assert all(0 < row.max_error < 2e-5 and row.mean_error < row.max_error for row in done.comparisons)
    assert [row.batch for row in exported("batch").comparisons] == [3]
    for form in FORMS:
        assert exported(form).variation > parity.VARIATION  # the images depend on the noise, so agreement means something
    # Rounded, not cut off, which would be half a level.
    assert all(row.mean_error < 0.05 for form in ("superres", "tensorrt") for row in exported(form).comparisons)
    lines = parity.table(done.comparisons, done.contract.tolerance)
    assert len(lines) == 5 and lines[1].split()[:2] == ["1", "8"]


@pytest.mark.slow
def test_the_manifest_says_what_was_checked():
    done = exported("tensorrt")
    content = json.loads(publish.manifest_path(done.path).read_text())
    whole = done.path.read_bytes()
    assert content["files"] == {"tensorrt.onnx": {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}}
    assert content["versions"]["torch"] == torch.__version__ and content["versions"]["onnx"] == onnx.__version__
    assert content["target"] == {"name": "tensorrt", "operators": "ONNX-TensorRT, docs/operators.md (TensorRT 10.15)", "opset": 21}
    assert content["graph"]["precision"] == "fp16" and content["graph"]["sigmas"] == [80.0, 3.0]
    assert content["inputs"]["noise"] == {"type": "float32", "shape": ["batch", 2, 1, 8, 8]}
    compared = content["compared with torch"]
    assert [row["batch"] for row in compared["batches"]] == [1, 2, 5] and compared["tolerance"] == 4


@pytest.mark.slow
def test_unconditional_song_unet(tmp_path):
    options = {"resolution": 8, "in_channels": 3, "out_channels": 3, "channels": 8, "channel_mult": (1,), "blocks": 1}
    network = randomised(networks.build("song", {**options, "attention_resolutions": (8,)}))
    denoiser = Denoiser(network, Preconditioning(c_noise="ln sigma / 4"))
    model = onnx.load(export_onnx(denoiser, {}, out=tmp_path / "song.onnx").path)
    assert shapes(model.graph.input) == {"noise": ["batch", 3, 8, 8]}
    assert not {node.op_type for node in model.graph.node} & {"Sin", "Cos", "Gemm"}


@pytest.mark.slow
def test_equal_models_give_equal_bytes(tmp_path):
    """In a process with another hash seed, so that no order of a set gets into the file."""
    code = f"import sys; sys.path[:] = {sys.path}; from exported_models import *; export_onnx(tiny_denoiser(), INFO, out=Path(sys.argv[1]))"
    again = tmp_path / "plain.onnx"
    environment = {"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(again)], check=True, env=environment)
    first = exported("plain").path
    assert again.read_bytes() == first.read_bytes() and again.stat().st_size > 10_000
    one, two = (json.loads(publish.manifest_path(path).read_text()) for path in (first, again))
    compared = [content.pop("compared with torch") for content in (one, two)]  # sums of floats, which follow the number of threads
    assert one == two and compared[0].keys() == compared[1].keys()


def changed(monkeypatch, form, change):
    """Makes the next export publish the graph of `form` with a change to one of its constants."""
    import onnx_ir

    model = onnx.load(exported(form).path)
    change(model.graph)
    ir = onnx_ir.from_proto(model)
    monkeypatch.setattr(to_onnx, "convert", lambda program, contract, **options: ir)


def scaled(graph, chosen, factor):
    tensor = next(tensor for tensor in graph.initializer if chosen(tensor))
    tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * np.float32(factor)).tobytes()


@pytest.mark.slow
def test_a_wrong_constant_is_caught_and_nothing_is_left(tmp_path, monkeypatch):
    """The last convolution is off by 0.5 %; the file that stood there before stays."""
    last = [node.input[1] for node in onnx.load(exported("plain").path).graph.node if node.op_type == "Conv"][-1]
    changed(monkeypatch, "plain", lambda graph: scaled(graph, lambda tensor: tensor.name == last, 1.005))
    with pytest.raises(RunError, match=r"disagrees with torch in spoiled.onnx: .* at batch 1, seed .*, over 0.0001 for fp32"):
        export_onnx(tiny_denoiser(), INFO, out=tmp_path / "new" / "spoiled.onnx")
    assert list(tmp_path.iterdir()) == []
    standing = tmp_path / "standing.onnx"
    standing.write_bytes(b"before")
    with pytest.raises(RunError):
        export_onnx(tiny_denoiser(), INFO, out=standing)
    assert standing.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("label", [0, 2])
def test_a_wrong_class_is_caught(tmp_path, monkeypatch, label):
    """One row of one table is wrong: the check visits the first class and the last."""

    def spoil(graph):
        table = next(tensor for tensor in graph.initializer if tensor.dims[:1] == [4] and tensor.dims[2:] == [1, 1])
        values = onnx.numpy_helper.to_array(table).copy()
        values[label] += 0.5
        table.raw_data = values.tobytes()

    changed(monkeypatch, "plain", spoil)
    with pytest.raises(RunError, match="disagrees with torch"):
        export_onnx(tiny_denoiser(), INFO, out=tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_edit_has_four_levels_where_none_are_asked_for(tmp_path, monkeypatch):
    """Told from the check's complaint about a graph of two."""
    changed(monkeypatch, "inpaint", lambda graph: None)
    with pytest.raises(RunError, match=r"unexpected shape or type in x.onnx: noise is FLOAT \['batch', 2, 1, 8, 8\]"):
        export_onnx(tiny_denoiser(), INFO, out=tmp_path / "x.onnx", task="inpaint")
    assert len(export_onnx(tiny_denoiser(), INFO, out=tmp_path / "x.onnx", task="inpaint", sigmas=LEVELS).sigmas) == 2


class FixedBatch(nn.Module):
    """Looks at the batch size in Python, which makes torch.export fix it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, c_noise, labels=None):
        return torch.cat([self.conv(x[i : i + 1]) for i in range(x.shape[0])])


@pytest.mark.slow
def test_a_network_that_fixes_the_batch_is_refused_in_one_line(tmp_path):
    denoiser = Denoiser(randomised(FixedBatch()), Preconditioning())
    with pytest.raises(RunError, match="torch cannot export the network FixedBatch: .*Nothing was written") as caught:
        export_onnx(denoiser, {"resolution": 8, "channels": 1}, out=tmp_path / "x.onnx")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_beyond_the_limit_have_a_file_of_their_own(tmp_path, monkeypatch):
    changed(monkeypatch, "plain", lambda graph: None)
    monkeypatch.setattr(to_onnx, "SINGLE_FILE_BYTES", 1000)
    out = export_onnx(tiny_denoiser(), INFO, out=tmp_path / "big.onnx").path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data", "big.onnx.manifest.json"]
    stored = onnx.load(out, load_external_data=False).graph.initializer
    assert sum(tensor.data_location == tensor.EXTERNAL for tensor in stored) > 14 and not any(len(t.raw_data) > 256 for t in stored)
    assert set(json.loads((tmp_path / "big.onnx.manifest.json").read_text())["files"]) == {"big.onnx", "big.onnx.data"}
    check_images(cpu_run(out), build(tiny_denoiser(), [80.0], PLAIN), PLAIN, name="big.onnx")
    changed(monkeypatch, "plain", lambda graph: None)
    monkeypatch.setattr(to_onnx, "SINGLE_FILE_BYTES", 10**9)
    export_onnx(tiny_denoiser(), INFO, out=out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.onnx", "big.onnx.manifest.json"]  # no weights of another file


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kept"), [("plain", True), ("seeded", True), ("tensorrt", False)])
def test_fusions_are_kept_where_they_help(tmp_path, monkeypatch, form, kept):
    """Half precision gains casts around each node on the CPU: more nodes, so it stays as it is."""
    options = {**FORMS[form], "target": "ort"}
    changed(monkeypatch, form, lambda graph: None)
    monkeypatch.setitem(TARGETS, "ort", TARGETS["tensorrt"] if form == "tensorrt" else TARGETS["ort"])
    done = export_onnx(tiny_denoiser(), INFO, out=tmp_path / "x.onnx", optimize=True, **options)
    model = onnx.load(done.path)
    fused = {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}
    assert done.fusion.kept == kept == bool(fused) and done.fusion.largest_difference <= 1e-6
    assert (done.fusion.nodes_after < done.fusion.nodes_before) == kept
    assert ({"QuickGelu", "FusedMatMul"} <= fused) == kept and model.producer_name == "fastcm"
    assert json.loads(publish.manifest_path(done.path).read_text())["fused by ONNX Runtime"] == done.fusion._asdict()
    with pytest.raises(InputError, match="--optimize: --target web"):
        export_onnx(tiny_denoiser(), INFO, out=tmp_path / "y.onnx", optimize=True, target="web")


@pytest.mark.slow
def test_a_fusion_that_changes_images_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(fusion, "largest_difference", lambda one, other, contract: 1e-5)
    changed(monkeypatch, "plain", lambda graph: None)
    done = export_onnx(tiny_denoiser(), INFO, out=tmp_path / "x.onnx", optimize=True)
    assert not done.fusion.kept and {node.domain for node in onnx.load(done.path).graph.node} == {""}


@pytest.mark.slow
def test_nan_fails_the_check(monkeypatch):
    """NaN on both sides is no agreement."""
    with pytest.raises(RunError, match="disagrees with torch in small.onnx: inf"):
        check_images(lambda feeds: np.full((len(feeds["labels"]), 1, 8, 8), np.nan), exported("plain").reference, PLAIN, name="small.onnx")


def test_an_untrained_network_is_told_apart():
    """Zero output layers: every comparison would pass, which the variation shows."""
    denoiser = Denoiser(networks.build("adm", {**SMALL, **TINY, "num_classes": 3}).eval(), Preconditioning())
    assert parity.variation(build(denoiser, [80.0], PLAIN), PLAIN) < parity.VARIATION
    assert parity.variation(build(tiny_denoiser(), [80.0], PLAIN), PLAIN) > parity.VARIATION


def test_many_classes_and_levels_keep_the_embedding():
    """A table per class, level and block would outweigh the network; the images are the same."""
    denoiser, sigmas = tiny_denoiser(classes=1500), (80.0, 3.0)
    contract = Contract(2, 1, 8, 1500)
    program = build(denoiser, sigmas, contract)
    assert sum(p.numel() for p in program.state_dict().values()) < 10 * sum(p.numel() for p in denoiser.network.state_dict().values())
    inputs = parity.check_inputs(contract)
    folded = build(tiny_denoiser(classes=1500), sigmas[:1], contract._replace(steps=1))
    assert any(name.endswith("table.rows") for name in folded.state_dict()) and not any(n.endswith("rows") for n in program.state_dict())
    one = build(denoiser, sigmas[:1], contract._replace(steps=1))
    with torch.no_grad():
        torch.testing.assert_close(one(inputs["noise"][:, 0], inputs["labels"]), folded(inputs["noise"][:, 0], inputs["labels"]))
        assert program(*inputs.values()).std() > 0.05


def test_a_teacher_is_not_exported_as_a_one_step_generator(tmp_path):
    with pytest.raises(InputError, match="a diffusion teacher in MODEL.*--method cd --teacher"):
        export_onnx(tiny_denoiser(), {"training": {"method": "edm"}}, out=tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": 17}, "opset out of range in --opset: 17. Use 18 to 20 for ort"),
        ({"opset": 21}, "opset out of range in --opset: 21"),
        ({"opset": 24, "target": "tensorrt"}, "opset out of range in --opset: 24. Use 18 to 23 for tensorrt"),
        ({"steps": 0}, "illegal value in steps"),
        ({"sigmas": (80.0, 90.0)}, "noise level out of range in sigmas: 90"),
        ({"steps": 2, "sigmas": (80.0,)}, "both steps and sigmas"),
        ({"precision": "bf16"}, "unknown value in --precision: bf16"),
        ({"target": "tensort"}, "unknown value in --target: tensort.*Did you mean 'tensorrt'"),
        ({"target": "tensorrt", "seeded": True}, "a runtime without 64-bit shifts for --seeded in --target: tensorrt"),
        ({"task": "inpant"}, "unknown value in --task: inpant.*Did you mean 'inpaint'"),
        ({"task": "inpaint", "seeded": True}, "exclude each other: --seeded and --task inpaint"),
        ({"task": "superres", "factor": 3}, "illegal value in --factor: 3"),
        ({"factor": 2}, "an option for superres alone: --factor 2"),
        ({"batch": 0}, "illegal value in --batch: 0"),
    ],
)
def test_bad_options_create_nothing(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        export_onnx(tiny_denoiser(), {}, out=tmp_path / "sub" / "x.onnx", **options)
    with pytest.raises(InputError, match="a folder in --onnx"):
        export_onnx(tiny_denoiser(), {}, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
