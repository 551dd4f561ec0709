"""Exported files as generators: the same call as torch's, on the provider that is really active."""

import logging
import random
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from test_export import tiny_denoiser

from fastcm import api
from fastcm.errors import InputError, RunError
from fastcm.export.to_onnx import export_onnx
from fastcm.generation import onnx_session
from fastcm.generation.generator import Generator
from fastcm.generation.onnx_generator import OnnxGenerator

pytestmark = pytest.mark.slow  # each file that they read takes seconds to export

INFO = {"classes": ["ant", "bee", "cat"]}
SEEDS = [0, 5, -1, 2**63 - 1, -(2**63)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return export_onnx(tiny_denoiser(), INFO, out=tmp_path_factory.mktemp("onnx") / "with spaces é.onnx").path


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    return export_onnx(tiny_denoiser(), INFO, out=tmp_path_factory.mktemp("onnx") / "two.onnx", sigmas=(80.0, 0.8)).path


def test_the_same_images_as_torch(path):
    onnx_generator, torch_generator = api.load(path, device="cpu"), Generator(tiny_denoiser(), INFO, device="cpu")
    assert isinstance(onnx_generator, OnnxGenerator)
    for labels in (None, 2, "bee", [0, "cat"]):
        ours, theirs = (generator(SEEDS, labels, output="float") for generator in (onnx_generator, torch_generator))
        assert ours.shape == (5, 8, 8, 1) and ours.std() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        difference = onnx_generator(SEEDS, labels).astype(int) - torch_generator(SEEDS, labels).astype(int)
        assert np.abs(difference).max() <= 1
    assert onnx_generator.resolution == 8 and onnx_generator.channels == 1 and onnx_generator.classes == INFO["classes"]
    assert onnx_generator.precision == "fp32" and len(onnx_generator(SEEDS, output="pil")) == 5 and onnx_generator([]).shape == (0, 8, 8, 1)


def test_a_seed_gives_its_image_in_any_batch(path):
    generator = OnnxGenerator(path)
    together = generator(SEEDS, 1, output="float")
    generator.batch_size = 2
    np.testing.assert_allclose(generator(SEEDS, 1, output="float"), together, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([generator(seed, 1, output="float") for seed in SEEDS]), together, atol=1e-5)


def test_a_k_step_graph_knows_its_levels(two_steps):
    generator = OnnxGenerator(two_steps)
    assert generator.sigmas() == (80.0, 0.8) == generator.sigmas(2) == generator.sigmas(sigmas=(80, 0.8))
    expected = Generator(tiny_denoiser(), INFO, device="cpu")(SEEDS, sigmas=(80.0, 0.8), output="float")
    np.testing.assert_allclose(generator(SEEDS, steps=2, output="float"), expected, atol=2e-5)
    for options in ({"steps": 1}, {"steps": 3}, {"sigmas": (80.0, 0.9)}):
        with pytest.raises(InputError, match="other noise levels than the graph's .* has 80,0.8"):
            generator(SEEDS, **options)
    with pytest.raises(InputError, match="a solver for an exported graph"):
        generator(SEEDS, sampler="heun")


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: whole[: len(whole) // 2], "not a complete ONNX file"),
        (lambda whole: b"garbage", "not a complete ONNX file"),
        (lambda whole: b"", "not a complete ONNX file"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (lambda whole: foreign_model().SerializeToString(), "not a generator exported by fastcm in .*: inputs x"),
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
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [1] and tensor.data_type == TensorProto.FLOAT)
    bias.raw_data = np.array([np.nan], np.float32).tobytes()
    broken = tmp_path / "nan.onnx"
    broken.write_bytes(model.SerializeToString())
    with pytest.raises(RunError, match="non-finite pixels in the image of seed 0"):
        OnnxGenerator(broken)(SEEDS)


def test_a_uint8_graph_has_no_float_output(tmp_path):
    done = export_onnx(tiny_denoiser(), INFO, out=tmp_path / "bytes.onnx", uint8=True)
    generator = OnnxGenerator(done.path)
    expected = Generator(tiny_denoiser(), INFO, device="cpu")(SEEDS)
    assert np.abs(generator(SEEDS).astype(int) - expected.astype(int)).max() <= 1
    with pytest.raises(InputError, match="float images from a uint8 graph"):
        generator(SEEDS, output="float")


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
