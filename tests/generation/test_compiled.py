"""Compiled levels: one piece of code per kind of batch, the same images, and eager mode with one line where torch.compile fails."""

import logging

import numpy as np
import pytest
import torch
from test_generator import small_denoiser

from fastcm import api, cli
from fastcm.errors import InputError
from fastcm.generation import compiled
from fastcm.generation import generator as generator_module
from fastcm.generation.compiled import CompiledLevel
from fastcm.generation.frozen import FrozenLevel
from fastcm.generation.generator import Generator
from fastcm.networks.inference import UpsampledConv
from fastcm.weights.model_folder import save_model


def generator(compile="on", device="cpu", **options):
    return Generator(small_denoiser(), {}, device=device, compile=compile, **options)


@pytest.fixture
def compilations(monkeypatch):
    """What torch.compile was asked for, in the place of compiling."""
    asked = []

    def compile(level, **options):
        asked.append(options)
        return lambda x, labels: level(x, labels)

    monkeypatch.setattr(torch, "compile", compile)
    return asked


@pytest.mark.slow
def test_one_piece_of_code_for_one_image_and_one_for_more(compilations):
    ours, eager = generator(), generator("off")
    for seeds in (range(1), range(3), range(5), range(1)):
        np.testing.assert_allclose(ours(seeds, output="float"), eager(seeds, output="float"), atol=1e-5)
    assert [options["dynamic"] for options in compilations] == [False, True] and ours.level(80.0).compiled
    assert all(options["options"] == compiled.OPTIONS["cpu"] for options in compilations)
    assert any(isinstance(layer, UpsampledConv) for layer in ours.level(80.0)._level.modules())
    ours(range(2), sigmas=(80.0, 2.0))
    assert len(compilations) == 3  # the second level's own


def test_auto_and_off_do_not_compile(compilations):
    for choice in ("auto", "off"):
        generator(choice).warm((1, 2))
        assert isinstance(generator(choice).level(80.0), FrozenLevel)
    assert not compilations
    assert generator().warm((1, 3)) > 0 and len(compilations) == 2


def test_a_failure_is_one_line_and_eager_images(monkeypatch, caplog):
    def broken(level, **options):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    ours = generator()
    with caplog.at_level(logging.WARNING, logger="fastcm"):
        images = [ours(range(1), output="float") for _ in range(2)]
    assert [record.message for record in caplog.records] == ["torch.compile failed for sigma 80: no compiler. Images are drawn without it."]
    np.testing.assert_allclose(images[1], generator("off")(range(1), output="float"), atol=1e-5)
    assert not ours.level(80.0).compiled


def test_a_graph_that_cannot_be_captured_is_one_line(monkeypatch, caplog):
    def refuse(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA error")

    uncaptured = generator("off")
    uncaptured._pool = uncaptured._stream = None  # what a generator on a device has
    monkeypatch.setattr(generator_module, "CapturedBatch", refuse)
    with caplog.at_level(logging.WARNING, logger="fastcm"):
        assert uncaptured._captured(None, np.arange(4), None) is None
    assert caplog.records[0].message.startswith("no CUDA graph for batches of 4: operation not permitted when stream is capturing. Images")

    def no_room(*arguments, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(generator_module, "CapturedBatch", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        uncaptured._captured(None, np.arange(4), None)


def test_choices_are_checked(tmp_path, compilations):
    with pytest.raises(InputError, match="unknown value in --compile: yes. Use auto, on, off"):
        generator("yes")
    save_model(tmp_path / "model", small_denoiser(), {})
    loaded = api.load(tmp_path / "model", device="cpu", compile="on")
    assert isinstance(loaded.level(80.0), CompiledLevel)
    graph = tmp_path / "x.onnx"
    graph.write_bytes(b"")
    with pytest.raises(InputError, match="torch.compile for an exported file in --compile"):
        api.load(graph, compile="on")
    assert cli.main(["serve", str(graph), "--compile", "on"]) == 2


@pytest.mark.slow
def test_every_level_of_a_process_is_compiled(monkeypatch):
    """torch gives up on a function after eight variants, of which each level of each generator is one."""
    compile, pieces = torch.compile, []

    def counted(level, *, dynamic, options):
        return compile(level, dynamic=dynamic, backend=lambda module, inputs: pieces.append(module) or module.forward)

    monkeypatch.setattr(torch, "compile", counted)
    torch.compiler.reset()
    ours = Generator(small_denoiser(None, channel_mult=(1,), attention_resolutions=()), {}, device="cpu", compile="on")
    sigmas = [80.0 / 2**number for number in range(10)]
    ours([0], sigmas=sigmas)
    assert all(ours.level(sigma).compiled for sigma in sigmas) and len(pieces) >= len(sigmas)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        pytest.param({}, id="two levels", marks=pytest.mark.long),
        pytest.param({"channel_mult": (1,), "channels": 8, "head_channels": 8}, id="one"),
    ],
)
def test_compiled_images_are_the_same(network):
    ours, eager = (Generator(small_denoiser(**network), {}, device="cpu", compile=choice) for choice in ("on", "off"))
    for seeds in (range(1), range(3)):
        np.testing.assert_allclose(ours(seeds, output="float"), eager(seeds, output="float"), atol=1e-4)
    assert ours.level(80.0).compiled


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "levels"), [("fp32", 1), ("bf16", 4)])
def test_compiled_on_cuda(precision, levels):
    """Compiled, then captured in the generator's own graph; batches between powers of two are padded."""
    cpu, cuda = generator("off"), generator(device="cuda", precision=precision)
    cuda.warm((1, 4))
    for seeds in (range(1), range(3)):
        assert np.abs(cpu(seeds).astype(int) - cuda(seeds).astype(int)).max() <= levels
    assert cuda.level(80.0).compiled and all(cuda._graphs.values())
