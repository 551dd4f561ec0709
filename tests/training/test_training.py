"""Runs: what they write, that they resume to the bit, what they refuse, and the losses of twenty steps."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import SMALL, small_run, stop_after

import fastcm
from fastcm import runs
from fastcm.errors import InputError, RunError
from fastcm.training.checkpoint import complete_steps
from fastcm.training.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden" / "losses.json"


def weights(out):
    """Every tensor of the newest checkpoint, by part."""
    newest = sorted((out / "checkpoints").iterdir())[-1]
    return {(path.stem, name): tensor for path in newest.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different[:3]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    small_run(out, method="edm")
    return str(out)


def test_a_run_leaves_the_folders_of_the_contract(tmp_path):
    result = small_run(tmp_path / "run", drawn=True)
    out = tmp_path / "run"
    assert result.nimg == result.total_nimg == 160 and result.signal is None
    config = json.loads((out / "config.json").read_text())
    assert config["format"] == "fastcm-run" and config["method"] == "ict" and config["dataset"]["images"] == 1797
    model = json.loads((out / "model" / "config.json").read_text())
    assert model["classes"] == [str(i) for i in range(10)] and model["preconditioning"]["sigma_max"] == 80.0
    assert len(list((out / "samples").glob("*.png"))) == 1 and complete_steps(out / "checkpoints") == [10]
    rows = [row for line in (out / "log.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    assert rows[-1]["nimg"] == 160 and np.isfinite(rows[-1]["loss"]) and rows[-1]["skipped"] == 0
    assert 0 <= rows[-1]["waited"] < 1
    images = fastcm.load(out)(range(4), labels=3)
    assert images.shape == (4, 8, 8, 1) and images.std() > 0


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) for m in ("edm", "ct", "cd")] + ["ict"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, request, method):
    teacher = request.getfixturevalue("teacher") if method == "cd" else None
    changes = {"objective.curriculum": "progressive", "objective.s0": 2, "objective.s1": 12} if method in ("cd", "ct") else {}
    if method == "cd":
        changes |= {"objective.mu0": 0.9}
    small_run(tmp_path / "whole", method=method, teacher=teacher, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after(4))
        stopped = small_run(tmp_path / "parts", method=method, teacher=teacher, **changes)
    assert stopped.signal == signal.SIGINT and stopped.nimg == 64
    resumed = small_run(tmp_path / "parts", method=method, teacher=teacher, **changes)
    assert resumed.nimg == 160
    whole = weights(tmp_path / "whole")
    assert_same(weights(tmp_path / "parts"), whole)
    assert any(part == "weights" and tensor.abs().sum() > 0 for (part, _), tensor in whole.items())
    files = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_twenty_steps_give_the_recorded_losses(tmp_path, teacher):
    """Regenerated only when the numbers are meant to change: delete the file, run this test twice, and say why in the commit."""
    losses = {}
    for method in ("edm", "ct", "cd", "ict"):
        seen = losses[method] = []
        original = Trainer.train_step

        def step(self, seen=seen, original=original):
            values = original(self)
            seen.append(float(self.loss))
            return values

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train_step", step)
            small_run(tmp_path / method, kimg=0.32, method=method, teacher=teacher if method == "cd" else None)
        assert len(seen) == 20
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} written; run again")
    golden = json.loads(GOLDEN.read_text())
    for method, seen in losses.items():
        np.testing.assert_allclose(seen, golden[method], rtol=2e-3, err_msg=method)


@pytest.mark.slow
def test_training_may_be_extended_and_nothing_else_may_change(tmp_path, capsys):
    out = tmp_path / "run"
    small_run(out)
    longer = small_run(out, kimg=0.24)
    assert longer.nimg == 240 and "duration 0.16 -> 0.24 kimg" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"batch: 16 -> 32; seed: 0 -> 1"):
        small_run(out, kimg=0.24, batch=32, seed=1)
    with pytest.raises(InputError, match=r"network.channels: 8 -> 16"):
        small_run(out, kimg=0.24, **{"network.channels": 16, "network.head_channels": 8})
    with pytest.raises(InputError, match="0.24 -> 0.16"):
        small_run(out)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes.txt"):
        small_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_one_trainer_per_folder(tmp_path):
    def intrude(progress, trainer):
        with pytest.raises(InputError, match=r"another trainer .*pid"):
            small_run(tmp_path / "run")
        seen.append(progress.nimg)

    seen = []
    small_run(tmp_path / "run", callbacks=[intrude])
    assert seen[-1] == 160


@pytest.mark.slow
def test_a_nonfinite_step_changes_nothing_and_ten_stop_the_run(tmp_path):
    out = tmp_path / "run"
    small_run(out)
    before = weights(out)
    original = Trainer.losses

    def poisoned(self, batch):
        return original(self, batch) * float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "losses", poisoned)
        small_run(out, kimg=0.24)  # five steps
    after = weights(out)
    for key, tensor in before.items():
        if key[0] != "counters" or key[1] == "steps_taken":
            assert torch.equal(after[key], tensor), key
    rows = [row for line in (out / "log.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    assert rows[-1]["skipped"] == 5
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="10 steps in a row"):
        patch.setattr(Trainer, "losses", poisoned)
        small_run(out, kimg=0.48)
    assert_same(weights(out), after)


class Mine(nn.Module):
    """A stranger's network: the smallest that can learn a class's mean picture."""

    def __init__(self):
        super().__init__()
        self.label = nn.Parameter(torch.zeros(10, 64))
        self.mix = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x, c_noise, labels):
        one_hot = nn.functional.one_hot(labels, 10).to(self.label.dtype)
        return self.mix(torch.cat([x, (one_hot @ self.label).view(-1, 1, 8, 8)], 1))


def test_train_takes_any_module_and_any_array(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    seen = []
    generator = fastcm.train(
        network=Mine(),
        data=(images, np.arange(50) % 10),
        out=tmp_path / "run",
        duration_kimg=0.32,
        batch=16,
        precision="fp32",
        device="cpu",
        callbacks=[lambda progress, trainer: seen.append(progress.loss)],
    )
    assert generator(range(3), labels=[1, 2, 3]).shape == (3, 8, 8, 1) and seen
    with pytest.raises(InputError, match="network of your own"):
        fastcm.load(tmp_path / "run")
    again = fastcm.load(tmp_path / "run", network=Mine())
    np.testing.assert_array_equal(again(range(3)), generator(range(3)))


def test_modules_whose_result_is_not_a_function_of_the_sample_are_refused(tmp_path):
    for layer, words in ((nn.Dropout(0.1), "dropout outside the noise stream"), (nn.BatchNorm2d(1), "batch statistics")):
        network = Mine()
        network.extra = layer
        with pytest.raises(InputError, match=words):
            runs.plan(network=network, data="digits", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "digit"}, "Did you mean 'digits'"),
        ({"method": "icd"}, "--method: icd"),
        ({"method": "cd"}, "--teacher"),
        ({"changes": {"optimizer.lr": float("nan")}}, "--lr: nan"),
        ({"changes": {"lr": -1.0}}, "--lr: -1"),
        ({"changes": {"batch": 0}}, "--batch: 0"),
        ({"changes": {"duration_kimg": 0.0}}, "--duration: 0"),
        ({"changes": {"noise.sigma_min": 90.0}}, "noise.sigma_min: 90"),
        ({"changes": {"network.chanels": 64}}, "Did you mean 'network.channels'"),
        ({"changes": {"network.channels": 25}}, "network.channels: 25"),
        ({"changes": {"objective.s1": 5}}, "objective.s1: 5"),
        ({"changes": {"optimizer.betas": (0.9, 2.0)}}, "optimizer.betas"),
        ({"data": "nowhere/at/all"}, "nowhere/at/all"),
        ({"changes": {"init": "nowhere.pt"}}, "nowhere.pt"),
    ],
)
def test_bad_settings_name_themselves_and_create_nothing(tmp_path, arguments, words):
    with pytest.raises(InputError) as caught:
        ready = runs.plan(**{"preset": "digits", "out": tmp_path / "run", **arguments})
        runs.start(ready)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_teacher_must_fit(tmp_path, teacher):
    with pytest.raises(InputError, match="not a diffusion model in --teacher"):
        small_run(tmp_path / "ict")
        small_run(tmp_path / "cd", method="cd", teacher=str(tmp_path / "ict"))
    with pytest.raises(InputError, match="another architecture in --teacher"):
        small_run(tmp_path / "cd", method="cd", teacher=teacher, **{"network.channels": 16})
    with pytest.raises(InputError, match="another sigma_max in --teacher"):
        small_run(tmp_path / "cd", method="cd", teacher=teacher, **{"noise.sigma_max": 100.0})
    assert not (tmp_path / "cd").exists()


@pytest.mark.long
def test_resume_with_a_compiled_network(tmp_path, monkeypatch):
    compiled = {**SMALL, "compile": "on"}
    small_run(tmp_path / "whole", **{k: v for k, v in compiled.items() if k not in SMALL or SMALL[k] != v})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after(4))
        small_run(tmp_path / "parts", compile="on")
    small_run(tmp_path / "parts", compile="on")
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_model_folder_has_a_card_and_equal_runs_equal_bytes(tmp_path):
    for name in ("a", "b"):
        small_run(tmp_path / name, kimg=0.032)
    card = (tmp_path / "a" / "model" / "README.md").read_text()
    assert "consistency model" in card and "| images seen | 32 |" in card and "| classes | 10: 0, 1," in card
    for file in sorted(p.name for p in (tmp_path / "a" / "model").iterdir()):
        assert (tmp_path / "a" / "model" / file).read_bytes() == (tmp_path / "b" / "model" / file).read_bytes(), file
