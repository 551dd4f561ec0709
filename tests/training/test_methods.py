"""The methods beyond the four of the paper's own family: they resume to the bit, start from what they should, and compile once."""

import contextlib
import functools

import pytest
import torch
from safetensors.torch import load_file
from test_training import assert_same, stop_after, weights
from training_runs import small_run

from fastcm import runs
from fastcm.errors import InputError
from fastcm.training.trainer import Trainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    small_run(out, method="edm")
    return str(out)


CASES = {
    "ect": {"objective.s1": 3},
    "scd": {"objective.tangent_warmup_kimg": 0.1},
    "sct": {"objective.tangent_warmup_kimg": 0.1, "noise.c_noise": "arctan(sigma / sigma_data)"},
    "sct-difference": {"objective.tangent": "finite-difference", "objective.adaptive_weight": False},
    "cd-classifier": {"objective.distance": "classifier", "objective.loss_weight": "uniform"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, teacher, case):
    method = case.partition("-")[0]
    options = {"method": method, "teacher": teacher if method in ("cd", "scd") else None, **CASES[case]}
    small_run(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after(4))
        assert small_run(tmp_path / "parts", **options).nimg == 64
    small_run(tmp_path / "parts", **options)
    whole = weights(tmp_path / "whole")
    assert_same(weights(tmp_path / "parts"), whole)
    learned = [tensor for (part, name), tensor in whole.items() if part == "log_weight.weights" and "linear" in name]
    assert bool(learned) == (method in ("scd", "sct") and case != "sct-difference")
    assert all(tensor.abs().sum() > 0 for tensor in learned), "the weight of the noise levels did not learn"
    names = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert not any("linear.weight" in name and "log" in name for name in names), "the weight of the noise levels is in the model"


@pytest.mark.slow
def test_ect_starts_from_a_teachers_weights_and_its_first_images_are_the_teachers(tmp_path, teacher):
    before = weights(runs.Path(teacher))
    seen = {}
    small_run(
        tmp_path / "ect",
        method="ect",
        init=teacher,
        kimg=0.016,
        callbacks=[lambda progress, trainer: seen.update(trainer.optimizer.state_dict()["weights"])],
        lr=1e-12,
    )
    averages = load_file(runs.Path(teacher) / "model" / "model.safetensors")
    for name, tensor in averages.items():
        torch.testing.assert_close(seen[name], tensor, rtol=0, atol=1e-9)
    assert any(not torch.equal(before["weights", name], tensor) for name, tensor in averages.items())


@pytest.mark.slow
def test_no_recompilation_after_the_first_steps(tmp_path, monkeypatch):
    """200 steps across changes of N, mu and the learning rate. The graph is captured as for Inductor, and run as it is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    original, seen, warm = Trainer.train_step, [], contextlib.ExitStack()

    def step(self):
        if self.step == 2:
            warm.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
        values = original(self)
        seen.append((values.steps, values.mu, values.lr))
        return values

    monkeypatch.setattr(Trainer, "train_step", step)
    options = {"objective.curriculum": "doubling", "objective.s0": 4, "objective.s1": 16, "compile": "on", "batch": 2}
    plain = {"network.channel_mult": (1,), "network.attention_resolutions": ()}
    with warm:
        small_run(tmp_path / "run", method="ct", kimg=0.4, **options, **plain)
    assert len(seen) == 200 and len({n for n, _, _ in seen}) == 3 and len({mu for _, mu, _ in seen}) == 3
    assert len({lr for _, _, lr in seen}) == 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "scd"}, "--method scd: --teacher"),
        ({"method": "sct", "teacher": "x"}, "unused option with --method sct: --teacher x"),
        ({"method": "sct", "changes": {"objective.s1": 3}}, "unused setting in --set: objective.s1. sct reads P_mean"),
        ({"method": "ect", "changes": {"noise.form": "boundary"}}, "noise.form: boundary"),
        ({"method": "ect", "changes": {"objective.pairs": "uniform"}}, "Pairs of ect take stages"),
        ({"method": "ict", "changes": {"objective.pairs": "ect", "objective.curriculum": "stages"}}, "objective.pairs: ect"),
        ({"method": "ect", "changes": {"objective.ect_q": 1.0}}, "objective.ect_q: 1"),
        ({"method": "sct", "changes": {"objective.tangent": "jpv"}}, "Did you mean 'jvp'"),
        ({"method": "ict", "changes": {"lpips_weights": "vgg.pth"}}, "--lpips-weights vgg.pth"),
        ({"method": "sct", "changes": {"objective.tangent": "finite-difference", "precision": "bf16"}}, "--precision: bf16"),
    ],
)
def test_settings_that_contradict_the_method(tmp_path, options, words):
    with pytest.raises(InputError) as caught:
        runs.start(runs.plan(**{"preset": "digits", "out": tmp_path / "run", **options}))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_classifiers_distance_needs_classes(tmp_path):
    images = torch.randint(0, 256, (40, 8, 8, 1), dtype=torch.uint8).numpy()
    ready = runs.plan(data=images, out=tmp_path / "run", changes={"objective.distance": "classifier"})
    with pytest.raises(InputError, match="unlabelled data for objective.distance classifier"):
        runs.start(ready)
    assert list(tmp_path.iterdir()) == []
