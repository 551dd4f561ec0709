"""Exported files as generators: the same call as torch's, on the provider that is really active."""

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_models import INFO, LEVELS, exported, tiny_denoiser
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from fastcm import api, cli
from fastcm.errors import InputError, RunError
from fastcm.export.operators import ORT_CPU
from fastcm.export.quiet import quiet
from fastcm.export.translations import translations
from fastcm.generation import onnx_binding
from fastcm.generation.generator import Generator
from fastcm.generation.onnx_generator import OnnxGenerator
from fastcm.kernels.philox import philox_words

pytestmark = pytest.mark.slow  # each file that they read takes seconds to export

SEEDS = [0, 5, -1, 2**63 - 1, -(2**63)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    copy = tmp_path_factory.mktemp("onnx") / "with spaces é.onnx"
    copy.write_bytes(exported("plain").path.read_bytes())
    return copy


@pytest.fixture(scope="module")
def torch_generator():
    return Generator(tiny_denoiser(), INFO, device="cpu")


def test_the_same_images_as_torch(path, torch_generator):
    onnx_generator = api.load(path, device="cpu")
    assert isinstance(onnx_generator, OnnxGenerator)
    for labels in (None, 2, "bee", [0, "cat"]):
        ours, theirs = (generator(SEEDS, labels, output="float") for generator in (onnx_generator, torch_generator))
        assert ours.shape == (5, 8, 8, 1) and ours.std() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        difference = onnx_generator(SEEDS, labels).astype(int) - torch_generator(SEEDS, labels).astype(int)
        assert np.abs(difference).max() <= 1
    assert onnx_generator.resolution == 8 and onnx_generator.channels == 1 and onnx_generator.classes == INFO["classes"]
    assert onnx_generator.precision == "fp32" and len(onnx_generator(SEEDS, output="pil")) == 5 and onnx_generator([]).shape == (0, 8, 8, 1)


@pytest.mark.parametrize(("form", "atol"), [("seeded", 2e-5), ("batch", 2e-5), ("tensorrt", 2)])
def test_every_form_draws_the_same_images(torch_generator, form, atol):
    """Seeds in the graph, a fixed batch that the last images do not fill, two steps of half precision to bytes."""
    generator = OnnxGenerator(exported(form).path)
    output, sigmas = ("uint8" if form == "tensorrt" else "float"), (LEVELS if form == "tensorrt" else None)
    theirs = torch_generator([*SEEDS, 7, 8], sigmas=sigmas, output=output).astype(np.float64)
    np.testing.assert_allclose(generator([*SEEDS, 7, 8], output=output), theirs, atol=atol)
    assert theirs.std() > (10 if form == "tensorrt" else 0.1)


def test_a_seed_gives_its_image_in_any_batch(path):
    generator = OnnxGenerator(path)
    together = generator(SEEDS, 1, output="float")
    generator.batch_size = 2
    np.testing.assert_allclose(generator(SEEDS, 1, output="float"), together, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([generator(seed, 1, output="float") for seed in SEEDS]), together, atol=1e-5)


class Words(nn.Module):
    """The first words of seeds, as the noise stream has them."""

    def forward(self, seeds):
        return philox_words(seeds, torch.zeros_like(seeds), torch.arange(6), stream=16)


def test_words_in_a_graph_are_the_streams(tmp_path):
    """Bit for bit, in the operators of opset 18, without a division; for the key of zeros Random123's own words."""
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 12345])
    with quiet(), torch.no_grad():
        program = torch.export.export(Words(), (seeds[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        table = translations(18, ORT_CPU)
        done = torch.onnx.export(program, dynamo=True, dynamic_shapes=({0: "batch"},), opset_version=18, custom_translation_table=table)
    done.save(tmp_path / "words.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "words.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        words = session.run(None, {session.get_inputs()[0].name: seeds[:batch].numpy()})[0]
        assert np.array_equal(words, Words()(seeds[:batch]).numpy()) and words.max() >= 2**31
    used = {node.op_type for node in onnx.load(tmp_path / "words.onnx").graph.node}
    assert "BitShift" in used and not used & {"Div", "Mod", "Floor"}


def test_a_k_step_graph_knows_its_levels():
    generator = OnnxGenerator(exported("tensorrt").path)
    assert generator.sigmas() == LEVELS == generator.sigmas(2) == generator.sigmas(sigmas=(80, 3))
    for options in ({"steps": 1}, {"steps": 3}, {"sigmas": (80.0, 0.9)}):
        with pytest.raises(InputError, match="other noise levels than the graph's .* has 80,3"):
            generator(SEEDS, **options)
    with pytest.raises(InputError, match="a solver for an exported graph"):
        generator(SEEDS, sampler="heun")
    with pytest.raises(InputError, match="float images from a uint8 graph"):
        generator(SEEDS, output="float")


def picture(size=8):
    return np.random.default_rng(0).integers(0, 256, (size, size, 1), dtype=np.uint8)


def test_inpainting_by_a_graph(torch_generator):
    generator = OnnxGenerator(exported("inpaint").path)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 1:5] = 255
    ours = generator.inpaint(picture(), mask, SEEDS, 1, output="float")
    np.testing.assert_allclose(ours, torch_generator.inpaint(picture(), mask, SEEDS, 1, sigmas=LEVELS, output="float"), atol=2e-5)
    images = generator.inpaint(picture(), mask, [3, 4], sigmas=LEVELS)
    assert np.array_equal(images[:, mask == 0], np.stack([picture()[mask == 0]] * 2)) and not np.array_equal(images[0], images[1])
    for call, words in (
        (lambda: generator([0]), "a graph that edits pictures in MODEL"),
        (lambda: generator.superres(picture()), "no superres in an exported graph .* Export it with --task superres"),
        (lambda: generator.inpaint(picture(), mask, sigmas=(80.0,)), "other noise levels than the graph's"),
        (lambda: generator.inpaint(picture(7), mask), "wrong size in image: 7x7x1"),
        (lambda: generator.inpaint(picture(), mask * 0), "an all-black mask"),
        (lambda: generator.inpaint(np.full((8, 8, 1), np.nan, np.float32), mask), "non-finite pixels in image"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_super_resolution_by_a_graph(torch_generator):
    generator = OnnxGenerator(exported("superres").path)
    sigmas = exported("superres").sigmas
    for image in (picture(), picture(4)):
        ours, theirs = generator.superres(image, 2, SEEDS, 1), torch_generator.superres(image, 2, SEEDS, 1, sigmas=sigmas)
        assert np.abs(ours.astype(int) - theirs).max() <= 1 and ours.std() > 10
    with pytest.raises(InputError, match="another factor than the graph's in factor: 4. .* enlarges 2 times"):
        generator.superres(picture(), 4)


def test_edit_command_with_a_graph(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture()[..., 0]).save("in.png")
    model = str(exported("inpaint").path)
    assert cli.main(["edit", "inpaint", model, "--image", "in.png", "--box", "1,1,5,5", "--labels", "2", "--out", "out.png"]) == 0
    mask = np.zeros((8, 8), bool)
    mask[1:5, 1:5] = True
    out = np.array(Image.open("out.png").convert("L"))
    assert np.array_equal(out[~mask], picture()[..., 0][~mask]) and (out[mask] != picture()[..., 0][mask]).mean() > 0.5
    assert cli.main(["edit", "colorize", model, "--image", "in.png"]) == 2
    assert "no colorize in an exported graph" in capsys.readouterr().err


def test_inputs_are_checked(path):
    generator = OnnxGenerator(path)
    noise, labels = np.zeros((2, 1, 8, 8), np.float32), np.array([0, 2])
    assert generator.run({"noise": noise, "labels": labels}).shape == (2, 1, 8, 8)
    assert generator.run({"labels": labels[:0], "noise": noise[:0]}).shape == (0, 1, 8, 8)
    spoiled = noise.copy()
    spoiled[1, 0, 3, 3] = np.nan
    for feeds, words in (
        ({"noise": noise}, "other inputs than the graph's in inputs: noise. It takes noise, labels"),
        ({"noise": noise, "labels": labels, "x": noise}, "other inputs"),
        ({"noise": noise.astype(np.float64), "labels": labels}, "wrong type in input noise: float64. The graph takes float32"),
        ({"noise": noise[:, :, :7], "labels": labels}, r"wrong shape in input noise: \[2, 1, 7, 8\]. The graph takes \[batch, 1, 8, 8\]"),
        ({"noise": noise[0], "labels": labels}, "wrong shape in input noise"),
        ({"noise": noise, "labels": labels[:1]}, "wrong shape in input noise"),
        ({"noise": noise, "labels": labels.astype(np.int32)}, "wrong type in input labels: int32"),
        ({"noise": spoiled, "labels": labels}, "non-finite numbers in input noise: NaN or infinity"),
        ({"noise": noise, "labels": labels + 1}, "class out of range in input labels: 1 to 3"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            generator.run(feeds)
        assert "\n" not in str(caught.value)


def test_a_label_that_is_no_class_is_none_in_every_runtime(path):
    """The graph itself, as other programs run it: below -1 and from the number of classes on as -1."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    noise = np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32).repeat(7, axis=0)
    labels = np.array([-1, -2, -(2**63), 3, 2**62, 0, 2])
    (images,) = session.run(None, {"noise": noise, "labels": labels})
    assert np.abs(images[1:5] - images[0]).max() < 1e-6 and np.abs(images[5:] - images[0]).reshape(2, -1).max(1).min() > 1e-2


def test_buffers_are_kept_and_results_are_their_own(path):
    generator = OnnxGenerator(path)
    first = generator.run({"noise": np.ones((2, 1, 8, 8), np.float32), "labels": np.array([0, 1])})
    before = first.copy()
    generator.run({"noise": -np.ones((2, 1, 8, 8), np.float32), "labels": np.array([0, 1])})
    assert np.array_equal(first, before)  # not a view of a buffer that the second call wrote
    assert [bound.batch for bound in generator._buffers._idle] == [2]
    for count in range(1, 8):
        generator(range(count))
    assert len(generator._buffers._idle) == onnx_binding.KEPT


def test_on_a_gpu_batches_are_padded_to_powers_of_two(path):
    """The way of CUDA, where a size is a captured graph, walked through with the CPU's buffers."""
    generator = OnnxGenerator(path)
    expected = generator(range(5), output="float")
    buffers = generator._buffers
    buffers._device, buffers._idle, make = "cuda", [], onnx_binding.BoundBatch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_binding, "BoundBatch", lambda session, contract, size, device: make(session, contract, size, "cpu"))
        np.testing.assert_allclose(generator(range(5), output="float"), expected, atol=1e-5)
        np.testing.assert_allclose(generator(range(3), output="float"), expected[:3], atol=1e-5)
    assert sorted(bound.batch for bound in buffers._idle) == [4, 8]


def foreign_model():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def with_future_opset(model):
    model.opset_import[0].version = 99
    return model


def with_escaping_data(model):
    """Weights in a file outside the model's folder."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    return model


def with_property(model, name, **changes):
    """One of the file's own statements changed."""
    [entry] = [entry for entry in model.metadata_props if entry.key == f"fastcm.{name}"]
    entry.value = json.dumps({**json.loads(entry.value), **changes})
    return model


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("graph", {"classes": "abc"}),
        ("graph", {"steps": 2}),
        ("graph", {"batch": "x"}),
        ("graph", {"task": "paint"}),
        ("graph", {"precision": 3}),
        ("graph", {"factor": 0, "task": "superres"}),
        ("graph", {"unheard": 1}),
        ("config", {"preconditioning": {"sigma": 1}}),
        ("config", {"preconditioning": {"sigma_data": "x"}}),
        ("config", {"classes": ["one"]}),
    ],
)
def test_statements_that_cannot_be_true_are_refused(tmp_path, path, name, changes):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(with_property(onnx.load(path), name, **changes).SerializeToString())
    with pytest.raises(InputError, match="not a generator exported by this fastcm in .*broken.onnx"):
        OnnxGenerator(broken)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: whole[: len(whole) // 2], "not a complete ONNX file"),
        (lambda whole: b"garbage", "not a complete ONNX file"),
        (lambda whole: b"", "not a complete ONNX file"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (lambda whole: whole.replace(b"fastcm.config", b"fastcm.c\xf7nfig"), "not a generator exported by this fastcm in .*: inputs noise"),
        (lambda whole: whole.replace(b"noise", b"n\xf7ise"), "not a generator exported by this fastcm in .*: names that are not UTF-8"),
        (lambda whole: foreign_model().SerializeToString(), "not a generator exported by this fastcm in .*: inputs x"),
        (lambda whole: with_future_opset(onnx.load_from_string(whole)).SerializeToString(), "ONNX Runtime refuses"),
        (lambda whole: with_escaping_data(onnx.load_from_string(whole)).SerializeToString(), "ONNX Runtime refuses"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(tmp_path, path, content, words, capfd):
    broken = tmp_path / "broken.onnx"
    (tmp_path.parent / "secret.bin").write_bytes(b"0" * 10_000)
    broken.write_bytes(content(path.read_bytes()))
    with pytest.raises(InputError, match=words) as caught:
        OnnxGenerator(broken)
    assert "\n" not in str(caught.value) and "broken.onnx" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        OnnxGenerator(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="no such file or folder in MODEL"):
        api.load(tmp_path / "none.onnx")


def test_nan_weights_give_an_error_not_a_picture(tmp_path, path):
    model = onnx.load(path)
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [4] and tensor.data_type == TensorProto.FLOAT)
    bias.raw_data = np.full(4, np.nan, np.float32).tobytes()
    broken = tmp_path / "nan.onnx"
    broken.write_bytes(model.SerializeToString())
    with pytest.raises(RunError, match="non-finite pixels in the image of seed 0"):
        OnnxGenerator(broken)(SEEDS)


def test_many_threads_share_a_session(path):
    generator, results = OnnxGenerator(path), {}
    expected = {seed: generator([seed]) for seed in range(8)}

    def work(seed):
        results[seed] = generator([seed])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[seed], expected[seed]) for seed in range(8))


FUZZ = """
import sys
from pathlib import Path
from fastcm.errors import InputError, RunError
from fastcm.generation.onnx_generator import OnnxGenerator
outcomes = {"refused": 0, "ran": 0}
for file in sorted(Path(sys.argv[1]).glob("*.onnx")):
    try:
        OnnxGenerator(file)([0])
        outcomes["ran"] += 1
    except (InputError, RunError):
        outcomes["refused"] += 1
print(outcomes["refused"], outcomes["ran"])
"""


def test_mutated_files_never_crash(tmp_path, path):
    whole, rng = bytearray(path.read_bytes()), random.Random(0)
    for index in range(100):
        copy = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            copy[rng.randrange(len(copy))] = rng.randrange(256)
        (tmp_path / f"{index:03}.onnx").write_bytes(copy)
    done = subprocess.run([sys.executable, "-c", FUZZ, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, ran = map(int, done.stdout.split())
    assert refused + ran == 100 and refused > 10
    assert Path(path).read_bytes() == bytes(whole)
