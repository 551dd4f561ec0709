"""The methods beyond the four of the paper's own family: they resume to the bit, start from what they should, and compile once."""

import pytest
import torch
from safetensors.torch import load_file
from test_training import assert_same, stop_after, weights
from training_runs import after_the_first_steps, small_run  # noqa: F401

from fastcm import load, runs
from fastcm.errors import InputError
from fastcm.training.trainer import Trainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    small_run(out, method="edm")
    return str(out)


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "run"
    small_run(out, method="ict")
    return str(out)


class Deaf(torch.nn.Module):
    """A network of a user's own that knows one time."""

    def forward(self, x, c_noise, labels=None):
        return x


CASES = {
    "ect": {"objective.s1": 3},
    "tcm": {"network.dropout": 0.2},
    "scd": {"objective.tangent_warmup_kimg": 0.1},
    "sct": {"objective.tangent_warmup_kimg": 0.1, "noise.c_noise": "arctan(sigma / sigma_data)"},
    "sct-difference": {"objective.tangent": "finite-difference", "objective.adaptive_weight": False},
    "meanflow": {},
    "meanflow-improved": {"objective.velocity": "network", "objective.flow_share": 0.5},
    "meanflow-guided": {"objective.omega": 1.5, "objective.kappa": 0.5, "label_drop": 0.25},
    "cd-classifier": {"objective.distance": "classifier", "objective.loss_weight": "uniform"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, request, case):
    method = case.partition("-")[0]
    options = {"method": method, "teacher": request.getfixturevalue("teacher") if method in ("cd", "scd") else None, **CASES[case]}
    if method == "tcm":
        options["init"] = request.getfixturevalue("first_stage")
    small_run(tmp_path / "whole", drawn=True, **options)
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
def test_a_first_stage_stays_as_it_is_and_gives_no_gradient_room(tmp_path, first_stage):
    """Images of a tcm model are its own network's, which begins as the first stage; config.json says from which level on."""
    seen = []

    def look(progress, trainer):
        frozen = trainer.method_loss.first_stage
        seen.append((frozen, [p.requires_grad or p.grad is not None for p in frozen.parameters()]))

    small_run(tmp_path / "tcm", method="tcm", init=first_stage, kimg=0.048, callbacks=[look])
    (frozen, touched), *_ = seen
    before = load_file(runs.Path(first_stage) / "model" / "model.safetensors")
    assert all(torch.equal(frozen.network.state_dict()[name], tensor) for name, tensor in before.items()) and not any(touched)
    after = load_file(tmp_path / "tcm" / "model" / "model.safetensors")
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    made = load(tmp_path / "tcm", device="cpu")
    assert made.preconditioning.transition == 1.0 and made(seeds=[0], steps=2).shape == (1, 8, 8, 1)
    with pytest.raises(InputError, match="trained from 1 to 80"):
        made(seeds=[0], sigmas=(80.0, 0.5))
    with pytest.raises(InputError, match=f"not a first stage in --init: {tmp_path / 'tcm'}"):
        small_run(tmp_path / "third", method="tcm", init=str(tmp_path / "tcm"))


@pytest.mark.slow
def test_a_first_stage_is_a_consistency_model_of_the_runs_network_and_classes(tmp_path, teacher, first_stage):
    for options, words in (
        ({"init": teacher}, f"not a first stage in --init: {teacher}"),
        ({"init": first_stage, "network.channels": 16}, "another architecture in --init"),
        ({"init": first_stage, "network.num_classes": None}, "another number of classes in --init: 10 (the run has 0)"),
    ):
        with pytest.raises(InputError) as caught:
            small_run(tmp_path / "run", method="tcm", **options)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


PLAIN = {"network.channel_mult": (1,), "network.attention_resolutions": (), "batch": 2}


@pytest.mark.slow
def test_no_recompilation_after_the_first_steps(tmp_path, no_recompilation):
    """200 steps across changes of N, mu and the learning rate."""
    options = {"objective.curriculum": "doubling", "objective.s0": 4, "objective.s1": 16}
    small_run(tmp_path / "run", method="ct", kimg=0.4, **options, **PLAIN, compile="on")
    seen = no_recompilation
    assert len(seen) == 200 and len({n for n, _, _ in seen}) == 3 and len({mu for _, mu, _ in seen}) == 3
    assert len({lr for _, _, lr in seen}) == 200


@pytest.mark.slow
def test_no_recompilation_of_a_second_stage(tmp_path, no_recompilation):
    small_run(tmp_path / "first", method="ict", kimg=0.002, **PLAIN)
    small_run(tmp_path / "second", method="tcm", init=str(tmp_path / "first"), kimg=0.02, **PLAIN, compile="on")
    assert len(no_recompilation) == 11


@pytest.mark.slow
@pytest.mark.parametrize("tangent", ["jvp", "finite-difference"])
def test_no_recompilation_of_meanflow(tmp_path, no_recompilation, tangent):
    """The network's pass, its velocity at t and its derivative have one graph each."""
    options = {"objective.tangent": tangent, "objective.velocity": "network"}
    small_run(tmp_path / "run", method="meanflow", kimg=0.02, **options, **PLAIN, compile="on")
    assert len(no_recompilation) == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "scd"}, "--method scd: --teacher"),
        ({"method": "sct", "teacher": "x"}, "unused option with --method sct: --teacher x"),
        ({"method": "sct", "changes": {"objective.s1": 3}}, "unused setting in --set: objective.s1. sct reads P_mean"),
        ({"method": "ect", "changes": {"noise.form": "boundary"}}, "noise.form: boundary"),
        ({"method": "ect", "changes": {"objective.pairs": "uniform"}}, "Pairs of ect take stages"),
        ({"method": "tcm"}, "missing option for --method tcm: --init"),
        ({"method": "tcm", "changes": {"noise.transition": None}}, "noise.transition: None. Give the level"),
        ({"method": "ict", "changes": {"noise.transition": 1.0}}, "noise.transition: 1.0. Only tcm has one"),
        ({"method": "ect", "changes": {"objective.tcm_nu": 2.0}}, "unused setting in --set: objective.tcm_nu"),
        ({"method": "tcm", "changes": {"objective.tcm_share": 1.0}}, "objective.tcm_share: 1.0. Give a finite number of at least 0 and"),
        ({"method": "ict", "changes": {"objective.pairs": "ect", "objective.curriculum": "stages"}}, "objective.pairs: ect"),
        ({"method": "ect", "changes": {"objective.ect_q": 1.0}}, "objective.ect_q: 1"),
        ({"method": "sct", "changes": {"objective.tangent": "jpv"}}, "Did you mean 'jvp'"),
        ({"method": "ict", "changes": {"lpips_weights": "vgg.pth"}}, "--lpips-weights vgg.pth"),
        ({"method": "meanflow", "changes": {"network.second_time": None}}, "network.second_time: None. Pass --set network.second_time=gap"),
        ({"method": "meanflow", "changes": {"objective.velocity": "netwrok"}}, "Did you mean 'network'"),
        ({"method": "meanflow", "changes": {"objective.flow_share": 1.5}}, "objective.flow_share: 1.5"),
        ({"method": "meanflow", "changes": {"objective.omega": 2.0}}, "omega, kappa: 2, 0. Pass --label-drop 0.1"),
        ({"method": "meanflow", "changes": {"objective.kappa": 0.5, "network.num_classes": None}}, "guidance without classes"),
        ({"method": "meanflow", "network": Deaf()}, "no second time in network: Deaf. Let its forward take end=None"),
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
