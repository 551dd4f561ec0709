"""A batch in pieces: equal gradients and losses, memory that runs out, the loss scale of fp16, activation checkpointing."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import SMALL, recorded_losses, run_out_of_memory, small_run, stop_after

import fastcm
from fastcm import runs
from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError, RunError
from fastcm.training.loss_scale import FIRST_EXPONENT, RISE, LossScale
from fastcm.training.method_loss import Guides
from fastcm.training.run import build_network, target_of
from fastcm.training.trainer import Trainer
from fastcm.training.trainer_parts import DTYPES, build_trainer


def trainer(*, method="ict", precision="fp32", **changes):
    """A trainer whose zero-initialised layers are randomised, so that every gradient is there."""
    changes = {**SMALL, "network.dropout": 0.2, "flip": True, **changes}
    config = runs.plan("digits", method=method, changes=changes, out="unused")
    network = build_network(config.config).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().sum() == 0:
                parameter.normal_(0, 0.05, generator=generator)
    first_stage = Denoiser(copy.deepcopy(network), config.config.noise) if method == "tcm" else None
    return build_trainer(
        config.config,
        network,
        target_of(network, config.config),
        config.dataset,
        device=torch.device("cpu"),
        precision=precision,
        compiled=False,
        guides=Guides(first_stage=first_stage),
    )


def gradient_and_loss(made):
    """The gradient that one step applied, fp32 in the order of the parameters' names, and the step's loss."""
    made.train_step()
    named = made.optimizer.layout.state_dict(made.optimizer.collected)
    return torch.cat([tensor.flatten() for tensor in named.values()]), float(made.loss)


@pytest.mark.parametrize("method", ["ict", "edm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sct", "meanflow", "tcm"))])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(method):
    whole, loss = gradient_and_loss(trainer(method=method))
    assert whole.abs().max() > 1e-3
    for images in (5, 1) if method == "ict" else (5,):
        gradient, pieces_loss = gradient_and_loss(trainer(method=method, microbatch=images))
        assert (gradient - whole).norm() < 2e-5 * whole.norm(), images
        assert pieces_loss == pytest.approx(loss, rel=2e-5)


def test_pieces_of_a_16_bit_batch_are_summed_in_fp32():
    made = trainer(precision="bf16", microbatch=1)
    gradient, _ = gradient_and_loss(made)
    assert made.optimizer.collected.dtype == torch.float32 and made.optimizer.gradient.dtype == torch.bfloat16
    whole, _ = gradient_and_loss(trainer())
    assert (gradient - whole).norm() < 0.02 * whole.norm()
    assert trainer(precision="bf16").optimizer.total is None


def test_recomputed_activations_give_the_same_gradient_with_dropout():
    whole, loss = gradient_and_loss(trainer())
    recomputed, loss_too = gradient_and_loss(trainer(**{"network.checkpoint": True}))
    assert torch.equal(recomputed, whole) and loss == loss_too
    without, _ = gradient_and_loss(trainer(**{"network.dropout": 0.0}))
    assert not torch.equal(without, whole)


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_microbatch_and_nothing_else(tmp_path, monkeypatch, capsys):
    with recorded_losses() as whole:
        small_run(tmp_path / "whole")
    monkeypatch.setattr(Trainer, "losses", run_out_of_memory(above=3))
    with recorded_losses() as pieces:
        small_run(tmp_path / "pieces")
    np.testing.assert_allclose(pieces, whole, rtol=1e-4)
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert [int(line.split("--microbatch ")[1].split(")")[0]) for line in told] == [8, 4, 2]
    assert json.loads((tmp_path / "pieces" / "config.json").read_text())["microbatch"] is None


def test_no_memory_for_one_image_ends_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after(3))
        small_run(tmp_path / "run")

    def refuse(self, batch):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..")

    monkeypatch.setattr(Trainer, "losses", refuse)
    with pytest.raises(RunError, match=r"one image at a time in --microbatch: 1\. Use .*checkpoint"):
        small_run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000003"]


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def fail(self, batch):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Trainer, "losses", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer().train_step()
    with pytest.raises(InputError, match="--microbatch: 0"):
        trainer(microbatch=0)


def test_a_scaled_gradient_is_the_unscaled_one():
    assert DTYPES["fp16"] == torch.float16
    scaled = trainer(precision="fp16")
    scaled.loss_scale.exponent.fill_(10.0)
    gradient, loss = gradient_and_loss(scaled)
    whole, plain_loss = gradient_and_loss(trainer())
    assert (gradient - whole).norm() < 5e-3 * whole.norm() and loss == pytest.approx(plain_loss, rel=0.01)
    assert float(scaled.loss_scale.exponent) == pytest.approx(10.0 + RISE)
    assert int(scaled.optimizer.steps_taken) == 1


def test_the_scale_reaches_the_gradient_before_fp16_rounds_it():
    """At a loss so small that its own gradient is below what fp16 holds."""
    small = 2.0**-24
    made = trainer(precision="fp16", **{"objective.loss_weight": "uniform"})
    made.share_of_batch.mul_(small)
    gradient, _ = gradient_and_loss(made)
    reference = trainer(**{"objective.loss_weight": "uniform"})
    whole, _ = gradient_and_loss(reference)
    assert (gradient / small - whole).norm() < 0.05 * whole.norm()


@pytest.mark.slow
def test_a_scale_that_is_too_large_falls_until_it_fits(tmp_path):
    made = trainer(precision="fp16")
    made.loss_scale.exponent.fill_(40.0)
    before = made.optimizer.buffers["weights"].clone()
    made.train_step()
    assert float(made.loss_scale.exponent) == 39.0 and torch.equal(made.optimizer.buffers["weights"], before)
    while int(made.optimizer.steps_taken) == 0:
        made.train_step()
    assert 5 < float(made.loss_scale.exponent) < 39 and not torch.equal(made.optimizer.buffers["weights"], before)


@pytest.mark.slow
def test_the_scale_is_resumed_and_its_underflow_ends_the_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after(4))
        small_run(tmp_path / "parts", precision="fp16")
    scales = {"parts": [], "whole": []}
    for run, seen in scales.items():
        note = [lambda progress, made, seen=seen: seen.append(float(made.loss_scale.exponent))]
        small_run(tmp_path / run, precision="fp16", callbacks=note)
    assert scales["parts"][-1] == scales["whole"][-1] != FIRST_EXPONENT
    models = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("parts", "whole")]
    assert models[0] == models[1]
    original = Trainer.losses
    monkeypatch.setattr(Trainer, "losses", lambda self, batch: original(self, batch) * float("nan"))
    with pytest.raises(RunError, match=r"--precision: fp16 .*Use --precision bf16"):
        small_run(tmp_path / "other", kimg=0.48, precision="fp16")


def test_the_scale_follows_on_the_device():
    scale = LossScale(torch.device("cpu"))
    assert float(scale.value) == 2**20
    scale.update(torch.tensor([1.0]))
    scale.update(torch.tensor([float("inf")]))
    assert float(scale.exponent) == pytest.approx(20 + 1e-3 - 1)
    scale.check()
    scale.exponent.fill_(-0.5)
    with pytest.raises(RunError, match="bf16"):
        scale.check()


@pytest.mark.slow
def test_every_average_is_a_model(tmp_path):
    out = tmp_path / "run"
    small_run(out, **{"optimizer.ema_halflife_kimg": [0.5, 0.01], "optimizer.ema_rampup": None})
    weights = {}
    for index, (name, halflife) in enumerate((("model", 0.5), ("model-ema-0.01kimg", 0.01))):
        assert fastcm.load(out / name).info["training"]["ema_halflife_kimg"] == halflife
        weights[index] = load_file(out / name / "model.safetensors")
        saved = load_file(next(out.glob("checkpoints/*")) / f"ema_{index}.safetensors")
        assert all(torch.equal(weights[index][key], tensor) for key, tensor in saved.items())
    assert not torch.equal(weights[0]["out.2.weight"], weights[1]["out.2.weight"])
    np.testing.assert_array_equal(fastcm.load(out)(range(2)), fastcm.load(out / "model")(range(2)))
