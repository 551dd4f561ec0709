"""NaN and infinity in the loss, the gradient or a batch, on fp32 and fp16: the step leaves no trace, and ten in a row end the run."""

import functools

import pytest
import torch
from test_training import assert_same, weights
from training_runs import run_out_of_memory, small_run

from fastcm.errors import RunError
from fastcm.training.loss_scale import LossScale
from fastcm.training.optimizer import FlatOptimizer
from fastcm.training.trainer import Trainer

VALUES = {"NaN": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def poison(monkeypatch, place, value, steps):
    """Puts the value in one place of the steps named (from 0)."""
    losses, next_batch, norm = Trainer.losses, Trainer.next_batch, FlatOptimizer.gradient_norm
    now = []

    def step(self, original=Trainer.train_step):
        now[:] = [self.step in steps]
        return original(self)

    def bad_losses(self, batch):
        result = losses(self, batch)
        return result + torch.where(torch.arange(len(result)) == 3, value, 0.0) if now[0] else result

    def bad_batch(self):
        batch = next_batch(self)
        if not now[0]:
            return batch
        images = batch.images.float() / 127.5 - 1
        images[3, 0, 2, 2] = value
        return batch._replace(images=images)

    def bad_norm(self):
        if now[0]:
            self.collected[len(self.collected) // 2] = value
        return norm(self)

    monkeypatch.setattr(Trainer, "train_step", step)
    if place == "loss":
        monkeypatch.setattr(Trainer, "losses", bad_losses)
    elif place == "batch":
        monkeypatch.setattr(Trainer, "next_batch", bad_batch)
    else:
        monkeypatch.setattr(FlatOptimizer, "gradient_norm", bad_norm)


QUICK = [("loss", "NaN"), ("gradient", "inf"), ("batch", "-inf")]
ALL = [(place, value) for place in ("loss", "gradient", "batch") for value in VALUES]


@pytest.mark.parametrize(("place", "value"), [pytest.param(*c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in ALL])
def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path, monkeypatch, place, value):
    """Weights, target, moments and averages after the bad step have the bits that they had before it; the next step is taken."""
    seen = []

    def watch(self, original=Trainer.train_step):
        values = original(self)
        seen.append({(role, index): buffer.clone() for index, (role, buffer) in enumerate(self.optimizer.buffers.items())})
        counts.append((int(self.optimizer.steps_taken), int(self.nonfinite[0])))
        return values

    counts = []
    poison(monkeypatch, place, VALUES[value], {1})
    monkeypatch.setattr(Trainer, "train_step", functools.partialmethod(watch, original=Trainer.train_step))
    small_run(tmp_path / "run", method="ct", kimg=0.048)
    assert counts == [(1, 0), (1, 1), (2, 0)]
    before, bad, after = seen
    assert {"weights", "target", "ema_0", "exp_avg", "exp_avg_sq"} <= {role for role, _ in before}
    assert_same(bad, before)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(after["weights", 0], bad["weights", 0]), "no step was taken after the bad one"


@pytest.mark.slow
def test_ten_in_a_row_end_the_run_and_the_checkpoint_stays(tmp_path, monkeypatch):
    out = tmp_path / "run"
    small_run(out, kimg=0.032)
    before = weights(out)
    poison(monkeypatch, "loss", VALUES["NaN"], range(4, 14))
    with pytest.raises(RunError, match=r"not finite in 10 steps in a row in --lr.*last checkpoint.*step-000000002"):
        small_run(out, kimg=0.32)
    assert_same(weights(out), before)


@pytest.mark.slow
def test_nine_in_a_row_do_not(tmp_path, monkeypatch):
    poison(monkeypatch, "gradient", VALUES["inf"], range(2, 11))
    assert small_run(tmp_path / "run", kimg=0.2).nimg == 208


@pytest.mark.slow
def test_fp16_that_fits_at_no_scale_ends_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, "gradient", VALUES["NaN"], range(100))
    with pytest.raises(RunError, match=r"loss scale of fp16 below 1 .*Use --precision bf16"):
        small_run(tmp_path / "run", kimg=0.4, precision="fp16")
    scale = LossScale(torch.device("cpu"))
    for _ in range(20):
        scale.update(torch.tensor([float("nan")]))
    scale.check()  # 2^0 may still fit
    scale.update(torch.tensor([float("inf")]))
    with pytest.raises(RunError):
        scale.check()


@pytest.mark.parametrize("fits", [4, 1])
@pytest.mark.slow
def test_memory_that_runs_out_halves_the_microbatch_alone(tmp_path, monkeypatch, capsys, fits):
    """What fits is found by halving; weights are those of a run that was told so, bit for bit."""
    small_run(tmp_path / "told", kimg=0.032, microbatch=fits)
    monkeypatch.setattr(Trainer, "losses", run_out_of_memory(above=fits))
    small_run(tmp_path / "found", kimg=0.032)
    assert f"out of memory: from here on {fits} images at a time (--microbatch {fits})" in capsys.readouterr().err
    assert_same(weights(tmp_path / "found"), weights(tmp_path / "told"))


@pytest.mark.slow
def test_no_memory_for_one_image_ends_the_run_and_the_checkpoint_stays(tmp_path, monkeypatch):
    out = tmp_path / "run"
    small_run(out, kimg=0.032)
    before = weights(out)
    monkeypatch.setattr(Trainer, "losses", run_out_of_memory(above=0))
    with pytest.raises(RunError, match=r"one image at a time in --microbatch: 1\. Use .*bf16"):
        small_run(out, kimg=0.064)
    assert_same(weights(out), before)
