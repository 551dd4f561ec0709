"""Training on EDM2's network: rows set back after each step, resumed to the bit, compiled once, drawn, exported."""

import json

import numpy as np
import pytest
import torch
from test_training import assert_same, weights
from training_runs import after_the_first_steps, small_run, stop_after  # noqa: F401

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.export.to_onnx import export_onnx
from fastcm.generation.generator import Generator
from fastcm.generation.onnx_generator import OnnxGenerator
from fastcm.training.trainer import Trainer

NETWORK = {"network.kind": "edm2", "network.channels": 8, "network.head_channels": 8, "network.attention_resolutions": (4,)}
NETWORK |= {"network.channel_mult": (1, 2), "network.blocks": 1}


def edm2_run(out, **options):
    return small_run(out, **{**NETWORK, **options})


CASES = {"edm": {"objective.adaptive_weight": True, "lr": 1e-2}, "ict": {}, "sct": {"noise.c_noise": "arctan(sigma / sigma_data)"}}


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, method):
    options = {"method": method, **CASES[method]}
    edm2_run(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after(4))
        edm2_run(tmp_path / "parts", **options)
    edm2_run(tmp_path / "parts", **options)
    whole = weights(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert settings["noise"]["c_noise"] == CASES[method].get("noise.c_noise", "ln sigma / 4")
    assert_same(weights(tmp_path / "parts"), whole)
    rows = whole["weights", "enc.8x8_block0.conv_res0.weight"].flatten(1)
    torch.testing.assert_close(rows.square().mean(1), torch.ones(len(rows)), rtol=1e-3, atol=0)
    assert whole["weights", "out_conv.gain"] != 0


def grown() -> Denoiser:
    """A network as training might leave it: gains that are not zero."""
    torch.manual_seed(0)
    options = {name.removeprefix("network."): value for name, value in NETWORK.items() if name.startswith("network.")}
    kind = options.pop("kind")
    network = networks.build(kind, {**options, "resolution": 8, "in_channels": 1, "out_channels": 1, "num_classes": 3})
    for name, parameter in network.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, 1.0)
    return Denoiser(network, Preconditioning(form="boundary", c_noise="ln sigma / 4"))


@pytest.mark.slow
def test_images_by_a_generator_and_by_an_onnx_file_are_equal(tmp_path):
    info = {"classes": ["ant", "bee", "cat"]}
    generator = Generator(grown(), info, device="cpu")
    images = generator(range(4), labels=2, output="float")
    assert images.std() > 0.2
    export_onnx(grown(), info, out=tmp_path / "edm2.onnx", seeded=True)
    drawn = OnnxGenerator(tmp_path / "edm2.onnx", provider="cpu")(range(4), labels=2, output="float")
    np.testing.assert_allclose(drawn, images, atol=1e-4)
    low = Generator(grown(), info, device="cpu", precision="bf16")(range(4), labels=2, output="float")
    assert np.abs(low - images).mean() < 0.02 and np.abs(generator(range(4), labels=1, output="float") - images).max() > 0.1


@pytest.mark.slow
def test_compiled_without_recompilation(tmp_path, no_recompilation):
    assert edm2_run(tmp_path / "run", method="ict", kimg=0.02, compile="on", batch=2).nimg == 20
    assert len(no_recompilation) == 10
