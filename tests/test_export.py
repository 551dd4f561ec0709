"""ONNX export: what is published has made torch's images in ONNX Runtime, and nothing else is published."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from test_generator import SMALL, randomised, small_denoiser
from torch import nn

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError, RunError
from fastcm.export import parity, to_onnx
from fastcm.export.program import Program
from fastcm.export.to_onnx import export_onnx
from fastcm.generation.generator import Generator
from fastcm.generation.onnx_generator import OnnxGenerator

ATTENTION = {"attention_resolutions": (8,)}
TINY = {"channels": 8, "head_channels": 8, "channel_mult": (1,), "attention_resolutions": (8,)}


def tiny_denoiser(classes=3, seed=0):
    return small_denoiser(classes, seed, **TINY)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One export of the small network, shared by the tests that only read it."""
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    return export_onnx(small_denoiser(), {"classes": list("abcdefghij"), "licence": "MIT"}, out=path)


def shapes(values):
    return {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


@pytest.mark.slow
def test_the_graph_has_the_contracts_form(exported):
    model = onnx.load(exported.path)
    assert shapes(model.graph.input) == {"noise": ["batch", 1, 8, 8], "labels": ["batch"]}
    assert shapes(model.graph.output) == {"images": ["batch", 1, 8, 8]}
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [exported.opset] == [18]
    properties = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert properties["fastcm.sigmas"] == [80.0] and properties["fastcm.precision"] == "fp32"
    assert properties["fastcm.config"]["network"]["channels"] == 16 and properties["fastcm.config"]["licence"] == "MIT"
    assert b"/fastcm/" not in exported.path.read_bytes()  # no traces of the machine's folders
    assert [path.name for path in exported.path.parent.iterdir()] == ["small.onnx"]


@pytest.mark.slow
def test_no_embedding_is_left(exported):
    """The noise level is a constant: no sines, no table of class embeddings, only one row per class and block."""
    model = onnx.load(exported.path)
    assert not {node.op_type for node in model.graph.node} & {"Sin", "Cos", "Gemm", "Exp", "Log"}
    floats = [tuple(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    matrices = [dims for dims in floats if len(dims) == 2]
    blocks = sum(name.endswith("emb_layers.1") for name, _ in small_denoiser().network.named_modules())
    assert sum(dims[0] == 11 for dims in matrices) == blocks  # ten classes and none
    assert not any(4 * SMALL["channels"] in dims for dims in matrices if dims[0] != 11)  # the width of the embedding


@pytest.mark.slow
def test_the_table_of_errors(exported):
    assert [row.batch for row in exported.comparisons] == [1, 2, 5] and len(parity.SEEDS) == 8
    assert all(0 < row.max_error < 2e-5 and row.mean_error < row.max_error for row in exported.comparisons)
    assert exported.variation > parity.VARIATION  # the images depend on the noise, so agreement means something
    lines = parity.table(exported.comparisons, exported.tolerance)
    assert len(lines) == 5 and lines[1].split()[:2] == ["1", "8"]


@pytest.mark.slow
@pytest.mark.parametrize("uint8", [False, True])
def test_k_steps_with_the_renoising_inside(tmp_path, uint8):
    done = export_onnx(tiny_denoiser(), {}, out=tmp_path / "k.onnx", sigmas=(80.0, 5.0, 0.7), uint8=uint8)
    model = onnx.load(done.path)
    assert shapes(model.graph.input)["noise"] == ["batch", 3, 1, 8, 8]
    assert shapes(model.graph.output)["images"] == (["batch", 8, 8, 1] if uint8 else ["batch", 1, 8, 8])
    torch_images = Generator(tiny_denoiser(), {}, device="cpu")(range(7), sigmas=(80.0, 5.0, 0.7))
    onnx_images = OnnxGenerator(done.path)(range(7), steps=3)
    assert torch_images.std() > 10 and np.abs(torch_images.astype(int) - onnx_images.astype(int)).max() <= 1


@pytest.mark.slow
def test_unconditional_song_unet(tmp_path):
    options = {"resolution": 8, "in_channels": 3, "out_channels": 3, "channels": 8, "channel_mult": (1,), "blocks": 1, **ATTENTION}
    denoiser = Denoiser(randomised(networks.build("song", options)), Preconditioning(c_noise="ln sigma / 4"))
    done = export_onnx(denoiser, {}, out=tmp_path / "song.onnx")
    model = onnx.load(done.path)
    assert shapes(model.graph.input) == {"noise": ["batch", 3, 8, 8]}
    assert not {node.op_type for node in model.graph.node} & {"Sin", "Cos", "Gemm"}


@pytest.mark.slow
def test_equal_models_give_equal_bytes(tmp_path):
    """In processes with other hash seeds, so that no order of a set gets into the file."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_export import *; from pathlib import Path;"
        "export_onnx(tiny_denoiser(), {'classes': ['a', 'b', 'c']}, out=Path(sys.argv[1]))"
    )
    paths = [tmp_path / f"{name}.onnx" for name in ("one", "two")]
    for seed, path in enumerate(paths):
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env={"PYTHONHASHSEED": str(seed), "PATH": "/usr/bin:/bin"})
    assert paths[0].read_bytes() == paths[1].read_bytes() and paths[0].stat().st_size > 10_000


@pytest.mark.slow
def test_a_wrong_constant_is_caught_and_nothing_is_left(tmp_path, monkeypatch):
    """The graph is of a denoiser whose sigma_data is off by 0.1 %; the file that stood there before stays."""
    wrong = Denoiser(tiny_denoiser().network, Preconditioning(sigma_data=0.5005))
    model = onnx.load(export_onnx(wrong, {}, out=tmp_path / "wrong.onnx").path)
    (tmp_path / "wrong.onnx").unlink()
    monkeypatch.setattr(to_onnx, "convert", lambda program, expected, **options: model)
    out = tmp_path / "new" / "spoiled.onnx"
    with pytest.raises(RunError, match=r"disagrees with torch in spoiled.onnx: .* at batch 1, seed .*, over 0.0001 for fp32"):
        export_onnx(tiny_denoiser(), {}, out=out)
    assert list(tmp_path.iterdir()) == []
    standing = tmp_path / "standing.onnx"
    standing.write_bytes(b"before")
    with pytest.raises(RunError):
        export_onnx(tiny_denoiser(), {}, out=standing)
    assert standing.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("label", [0, 9])
def test_a_wrong_class_is_caught(tmp_path, exported, monkeypatch, label):
    """One row of one table is wrong: the check visits the first class and the last."""
    model = onnx.load(exported.path)
    table = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and tensor.dims[0] == 11)
    values = onnx.numpy_helper.to_array(table).copy()
    values[label] += 0.5
    table.raw_data = values.tobytes()
    monkeypatch.setattr(to_onnx, "convert", lambda program, expected, **options: model)
    with pytest.raises(RunError, match="disagrees with torch"):
        export_onnx(small_denoiser(), {}, out=tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


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
def test_structure_is_checked(tmp_path, exported):
    expected = parity.Expected(1, 1, 8, 10, False, "fp32")
    parity.check_structure(exported.path, expected)
    model = onnx.load(exported.path)

    def refused(change, words):
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        change(broken)
        path = tmp_path / "broken.onnx"
        path.write_bytes(broken.SerializeToString())
        with pytest.raises(RunError, match=words):
            parity.check_structure(path, expected)

    def fix_batch(m):
        m.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    def private_domain(m):
        m.opset_import.add(domain="com.example", version=1)
        m.graph.node.add(op_type="Foo", domain="com.example", name="foo", input=["images"], output=["foo_out"])

    def unknown_operator(m):
        m.graph.node[0].op_type = "Foo"

    refused(fix_batch, "fixed batch|malformed graph")
    refused(private_domain, "private domain in broken.onnx: com.example::Foo|malformed graph")
    refused(unknown_operator, "malformed graph in broken.onnx: .*Foo")
    with pytest.raises(RunError, match="unexpected shape or type in small.onnx: images is FLOAT"):
        parity.check_structure(exported.path, expected._replace(uint8=True))
    with pytest.raises(RunError, match="unexpected inputs and outputs"):
        parity.check_structure(exported.path, expected._replace(classes=None))


@pytest.mark.slow
def test_nan_fails_the_check(exported, monkeypatch):
    """NaN on both sides is no agreement."""
    monkeypatch.setattr(Program, "forward", lambda self, noise, labels=None: torch.full_like(noise, float("nan")))
    expected = parity.Expected(1, 1, 8, 10, False, "fp32")
    with pytest.raises(RunError, match="disagrees with torch in small.onnx: inf"):
        parity.check_file(exported.path, Program(small_denoiser(), [80.0], classes=10), expected)


def test_an_untrained_network_is_told_apart():
    """Zero output layers: every comparison would pass, which the variation shows."""
    denoiser = Denoiser(networks.build("adm", {**SMALL, **TINY, "num_classes": 3}).eval(), Preconditioning())
    expected = parity.Expected(1, 1, 8, 3, False, "fp32")
    assert parity.variation(Program(denoiser, [80.0], classes=3), expected) < parity.VARIATION
    assert parity.variation(Program(tiny_denoiser(), [80.0], classes=3), expected) > parity.VARIATION


@pytest.mark.slow
def test_a_newer_opset(tmp_path, exported):
    done = export_onnx(tiny_denoiser(), {}, out=tmp_path / "x.onnx", opset=23)
    old, new = ({node.op_type for node in onnx.load(path).graph.node} for path in (exported.path, done.path))
    assert done.opset == 23 and "GroupNormalization" in new - old and "InstanceNormalization" in old - new


def test_a_teacher_is_not_exported_as_a_one_step_generator(tmp_path):
    with pytest.raises(InputError, match="a diffusion teacher in MODEL.*--method cd --teacher"):
        export_onnx(tiny_denoiser(), {"training": {"method": "edm"}}, out=tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": 17}, "opset out of range in --opset: 17"),
        ({"steps": 0}, "illegal value in steps"),
        ({"sigmas": (80.0, 90.0)}, "noise level out of range in sigmas: 90"),
        ({"steps": 2, "sigmas": (80.0,)}, "both steps and sigmas"),
    ],
)
def test_bad_options_create_nothing(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        export_onnx(tiny_denoiser(), {}, out=tmp_path / "sub" / "x.onnx", **options)
    with pytest.raises(InputError, match="a folder in --onnx"):
        export_onnx(tiny_denoiser(), {}, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
