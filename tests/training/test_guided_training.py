"""Labels that a teacher is not told, and students of a guided teacher: what is drawn, to the bit, and what is refused."""

import json

import numpy as np
import pytest
import torch
from test_training import assert_same, stop_after, weights
from training_runs import after_the_first_steps, recorded_losses, small_run  # noqa: F401

from fastcm import kernels, presets, runs
from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError
from fastcm.generation.generator import Generator
from fastcm.training.memory import estimate
from fastcm.training.method_loss import MethodLoss
from fastcm.training.resumed_settings import check_resumed
from fastcm.training.trainer import Trainer
from fastcm.weights.model_folder import load_model

PICTURES = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
LABELS = np.arange(24) % 3
TINY = {"network.channel_mult": (1,), "network.attention_resolutions": ()}


def tiny_run(out, **options):
    return small_run(out, **{**TINY, **options})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    tiny_run(out, method="edm", label_drop=0.25, kimg=0.032)
    return str(out)


@pytest.fixture
def batches(monkeypatch):
    """What the loss sees, and what it has drawn for the student: batches in the order of their steps."""
    seen, call = [], MethodLoss.__call__
    monkeypatch.setattr(MethodLoss, "__call__", lambda self, batch, *rest: seen.append(batch) or call(self, batch, *rest))
    return seen


@pytest.mark.parametrize("method", [pytest.param("edm", marks=pytest.mark.slow), "ict"])
def test_labels_are_dropped_by_the_stream(tmp_path, batches, method):
    tiny_run(tmp_path / "run", method=method, label_drop=0.25, kimg=0.032)
    told = {"label_drop": json.loads((tmp_path / "run/model/config.json").read_text())["training"]["label_drop"]}
    labels, positions = torch.cat([batch.labels for batch in batches]), torch.cat([batch.position for batch in batches])
    dropped = kernels.uniform(torch.tensor([0]), positions, stream=3) < 0.25
    assert torch.equal(labels == -1, dropped) and 0 < dropped.sum() < len(dropped) and told == {"label_drop": 0.25}


def test_a_student_of_a_range_is_told_its_weights(tmp_path, batches, teacher, monkeypatch):
    told = []
    original = Trainer.losses

    def losses(self, batch):
        hook = self.optimizer.student.guidance_embed.register_forward_pre_hook(lambda _, given: told.append(given[1]))
        try:
            return original(self, batch)
        finally:
            hook.remove()

    monkeypatch.setattr(Trainer, "losses", losses)
    tiny_run(tmp_path / "run", method="cd", teacher=teacher, guidance=(1, 3), kimg=0.016, batch=16, **{"objective.mu_schedule": "zero"})
    expected = 1 + 2 * kernels.uniform(torch.tensor([0]), batches[0].position, stream=5)
    assert len(told) == 2 and all(torch.equal(weight, expected) for weight in told)  # target and student, the same
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["network"]["default_guidance"] == 2.0 and config["training"]["guidance"] == [1.0, 3.0]
    model = Generator(*load_model(tmp_path / "run/model"), device="cpu")
    assert model(range(2), guidance=3).shape == (2, 8, 8, 1) and model.denoiser.network.guidance_embed.weight.abs().max() > 0
    with pytest.raises(InputError, match="weight out of range in guidance: 4"):
        model(range(2), guidance=4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cd", "scd"])
def test_a_weight_of_one_is_no_guidance_to_the_bit_and_has_no_second_half(tmp_path, teacher, monkeypatch, method):
    sizes, forward, losses = [], Denoiser.forward, {}
    monkeypatch.setattr(Denoiser, "forward", lambda self, x, *rest: sizes.append(len(x)) or forward(self, x, *rest))
    for name, guidance in (("none", {}), ("one", {"guidance": 1}), ("two", {"guidance": 2})):
        sizes.clear()
        with recorded_losses() as losses[name]:
            tiny_run(tmp_path / name, method=method, teacher=teacher, kimg=0.048, **guidance)
        assert max(sizes) == (32 if name == "two" else 16), "images of one of the teacher's calls"
    assert losses["one"] == losses["none"] != losses["two"]
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "none"))


CASES = {
    "edm": {},
    "cd": {"guidance": (1, 4)},
    "scd": {"guidance": (1, 4), "guidance_interval": (0.2, 5), "objective.tangent_warmup_kimg": 0.1},
    "cd-guide": {"guidance": 2.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, teacher, case):
    method = case.partition("-")[0]
    options = {"method": method, "teacher": None if method == "edm" else teacher, "label_drop": 0.25, **CASES[case]}
    options |= {"guide": teacher} if case == "cd-guide" else {}
    tiny_run(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after(4))
        assert tiny_run(tmp_path / "parts", **options).nimg == 64
    tiny_run(tmp_path / "parts", **options)
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cd", "scd"])
def test_no_recompilation_after_the_first_steps(tmp_path, no_recompilation, teacher, method):
    options = {"guidance": (1, 4), "guidance_interval": (0.2, 5), "label_drop": 0.25, "compile": "on", "batch": 2}
    assert tiny_run(tmp_path / "run", method=method, teacher=teacher, kimg=0.02, **options).nimg == 20
    assert len(no_recompilation) == 10


@pytest.mark.slow
def test_the_estimates_of_a_guided_run_count_what_guides(teacher):
    changes = {"batch": 4, "guidance": 2}
    plain, guided = (
        estimate(runs.plan("digits", method="cd", teacher=teacher, changes=changes | more).config) for more in ({}, {"guide": teacher})
    )
    assert guided["teacher and distance"] == 2 * plain["teacher and distance"] > 0 and guided["weights"] == plain["weights"]


def test_the_preset_makes_a_teacher_that_can_be_guided():
    ready = runs.plan(data=(PICTURES, LABELS), method="cd", changes={"guidance": (1, 3)})
    assert ready.first.config.label_drop == 0.1 and ready.first.config.network.get("default_guidance") is None
    assert ready.config.network["default_guidance"] == 2.0 and ready.config.label_drop == 0
    with pytest.raises(InputError, match="the model always saw its labels. .*--label-drop 0.1"):
        runs.plan(data=(PICTURES, LABELS), method="cd", changes={"guidance": (1, 3), "label_drop": 0})
    with pytest.raises(InputError, match="no unconditional half in --guidance: the model has no classes"):
        runs.plan(data=PICTURES, method="cd", changes={"guidance": 2})


def test_the_usual_distillation_is_guided_where_its_teacher_is_made_for_it():
    for given, weight, drop in (({}, 2.5, 0.1), ({"guidance": 1}, 1, 0), ({"guidance": 3, "label_drop": 0.3}, 3, 0.3)):
        ready = runs.plan("mnist", changes=given)
        assert (ready.config.method, ready.config.objective.guidance, ready.first.config.label_drop) == ("cd", weight, drop)
    assert runs.plan("mnist", network=torch.nn.Identity()).config.method == "ict"
    ready = runs.plan("mnist", changes={"network.num_classes": None})
    assert (ready.config.objective.guidance, ready.first.config.label_drop, ready.first.config.network["num_classes"]) == (1, 0, None)
    ready = runs.plan(data=(PICTURES, LABELS), method="cd")
    assert (ready.config.objective.guidance, ready.first.config.label_drop) == (1.5, 0.1)
    assert runs.plan(data=PICTURES, method="cd").config.objective.guidance == 1
    assert presets.preset("mnist", method="cd", teacher="somebody's").objective.guidance == 1


def test_a_teacher_is_not_trained_for_a_folder_of_something_else(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(runs, "run", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(InputError, match=r"folder of something else in --out: .* \(holds notes.txt\)"):
        runs.start(runs.plan("mnist", out=tmp_path))


def test_a_run_of_an_earlier_version_goes_on():
    config = runs.plan("digits").config.as_dict()
    facts = {"dataset": {"images": 1}, "computed_in": "fp32", "computed_on": "cpu", "weights": {}}
    old = json.loads(json.dumps({**config, **facts}))
    for section, name in ((old, "label_drop"), (old, "guide"), (old["objective"], "guidance"), (old["objective"], "guidance_interval")):
        del section[name]
    assert check_resumed(old, {**config, **facts}, "out") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "cd", "guidance": (3, 1), "label_drop": 0.1}, "illegal value in --guidance: (3, 1)"),
        ({"method": "cd", "guidance": 2, "guidance_interval": (3, 1)}, "illegal value in --guidance-interval: (3, 1)"),
        ({"method": "cd", "guidance_interval": (1, 3)}, "unused option: --guidance-interval"),
        ({"method": "ict", "guidance": 2}, "unused setting in --set: objective.guidance. ict reads"),
        ({"method": "ict", "guide": "TEACHER"}, "unused option: --guide"),
        ({"label_drop": 1.5}, "illegal value in --label-drop: 1.5"),
        ({"label_drop": 0.1, "network.num_classes": None}, "no labels to drop in --label-drop: 0.1"),
        ({"network.default_guidance": -1}, "network.default_guidance: -1"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path, teacher, options, words):
    options = {name: teacher if value == "TEACHER" else value for name, value in options.items()}
    with pytest.raises(InputError) as caught:
        runs.start(runs.plan("digits", method=options.pop("method", None), out=tmp_path / "run", changes=options))
    assert words in str(caught.value) and "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_guide_must_fit(tmp_path, teacher):
    tiny_run(tmp_path / "three", method="edm", kimg=0.016)
    config = json.loads((tmp_path / "three/model/config.json").read_text())
    (tmp_path / "three/model/config.json").write_text(
        json.dumps({**config, "preconditioning": {**config["preconditioning"], "sigma_max": 40}})
    )
    with pytest.raises(InputError, match="fewer noise levels in --guide: 0.002 to 40"):
        tiny_run(tmp_path / "run", method="cd", teacher=teacher, guidance=2, guide=str(tmp_path / "three"))


@pytest.mark.parametrize("options", [{"network": torch.nn.Conv2d(1, 1, 1)}, {"kind": "edm2"}])
def test_a_range_needs_a_network_that_is_told(options):
    changes = {"guidance": (1, 2), "label_drop": 0.1} | ({"network.kind": options.pop("kind")} if "kind" in options else {})
    with pytest.raises(InputError, match="a range for a network that is not told its weight in --guidance"):
        runs.plan("digits", method="cd", changes=changes, complete=False, **options)
