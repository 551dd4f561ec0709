"""What a run takes from the model that it starts from: its network, and its weights but for a class table of another size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import small_run, undrawn

from fastcm import cli, runs
from fastcm.api import load_denoiser
from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError
from fastcm.training.starting_point import copy_weights
from fastcm.weights.model_folder import network_config, save_model

PICTURES = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
QUICK = {"batch": 16, "precision": "fp32", "device": "cpu", "duration_kimg": 0.016}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A diffusion model of the digits on a network that no preset has."""
    return small_run(tmp_path_factory.mktemp("teacher") / "edm", method="edm", kimg=0.032, **{"network.blocks": 2}).model


def test_a_student_has_its_teachers_network(teacher):
    for arguments in ({"preset": "digits"}, {"data": "digits"}):
        ready = runs.plan(method="cd", teacher=str(teacher), **arguments)
        assert ready.config.network == network_config(load_denoiser(teacher)[0].network)
        assert (ready.config.network["blocks"], ready.config.network["channels"]) == (2, 8)
    assert runs.plan("digits", method="cd", teacher=str(teacher), changes={"network.dropout": 0.1}).config.network["dropout"] == 0.1
    with pytest.raises(InputError, match="another architecture in --teacher.*taken from the model"):
        runs.start(runs.plan("digits", method="cd", teacher=str(teacher), changes={**QUICK, "network.blocks": 1}, out="none"))


def test_pictures_are_brought_to_the_teachers_form(teacher, tmp_path):
    large = np.repeat(np.repeat(np.repeat(PICTURES, 2, 1), 2, 2), 3, 3)
    ready = runs.plan(data=(large, np.arange(24) % 10), method="cd", teacher=str(teacher))
    assert (ready.dataset.resolution, ready.dataset.channels) == (8, 1)


@pytest.mark.slow
def test_init_of_another_number_of_classes(teacher, tmp_path, capsys):
    theirs = load_denoiser(teacher)[0].network.state_dict()
    options = {"method": "ect", "out": tmp_path / "run", "changes": {**QUICK, "init": str(teacher)}}
    assert runs.plan(data=PICTURES, **options).config.network["num_classes"] is None
    ready = runs.plan(data=(PICTURES, np.arange(24) % 3), **options)
    assert (ready.config.network["num_classes"], ready.config.network["blocks"]) == (3, 2)
    runs.start(ready)
    assert "class table starts anew" in capsys.readouterr().err
    network = load_denoiser(tmp_path / "run")[0].network
    assert network.label_emb.weight.shape[0] == 3
    assert (network.middle_block[0].in_layers[2].weight - theirs["middle_block.0.in_layers.2.weight"]).abs().max() < 0.1  # one step away


def test_every_other_weight_is_copied(teacher):
    source = load_denoiser(teacher)[0].network
    ready = runs.plan(data=(PICTURES, np.arange(24) % 3), method="ect", changes={**QUICK, "init": str(teacher)})
    network = runs.networks.build("adm", {k: v for k, v in ready.config.network.items() if k != "kind"})
    table = network.label_emb.weight.clone()
    assert "--init" in copy_weights(network, source, "--init")
    assert torch.equal(network.label_emb.weight, table)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in network.state_dict().items() if not k.startswith("label_emb"))
    assert copy_weights(source, source, "--init") is None


@pytest.mark.parametrize(
    ("c_noise", "tangent", "second_time"),
    [
        ("sigma / (1 + sigma)", "jvp", "gap"),
        pytest.param("250 ln sigma", "finite-difference", "end", marks=pytest.mark.slow),
        pytest.param("arctan(sigma / sigma_data)", "jvp", "end", marks=pytest.mark.slow),
    ],
)
def test_a_diffusion_model_is_where_meanflow_starts(teacher, tmp_path, c_noise, tangent, second_time):
    given, info = load_denoiser(teacher)
    theirs = Denoiser(given.network, replace(given.preconditioning, c_noise=c_noise))
    save_model(tmp_path / "edm", theirs, info)
    ready = runs.plan("digits", method="meanflow", out=tmp_path / "run", changes={**QUICK, "lr": 1e-12, "init": str(tmp_path / "edm")})
    assert (ready.config.noise, ready.config.objective.tangent) == (theirs.preconditioning, tangent)
    assert ready.config.network == {**network_config(theirs.network), "second_time": second_time}
    with undrawn():
        runs.start(ready)
    ours = load_denoiser(tmp_path / "run")[0]
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 20.0]), torch.tensor([1, 2, 3])
    torch.testing.assert_close(ours(x, sigma, labels), theirs(x, sigma, labels), rtol=1e-4, atol=1e-5)
    c = ours.coefficients(sigma)
    F_x = ours.network(c.c_in[:, None, None, None] * x, c.c_noise, labels, end=sigma / (1 + sigma))  # r = t
    D_x = c.c_skip[:, None, None, None] * x + c.c_out[:, None, None, None] * F_x
    torch.testing.assert_close(D_x, theirs(x, sigma, labels), rtol=1e-4, atol=1e-5)


def test_a_teacher_of_other_classes_is_refused(teacher):
    with pytest.raises(InputError, match="another number of classes in --teacher: 10"):
        runs.plan(data=(PICTURES, np.arange(24) % 3), method="cd", teacher=str(teacher))


@pytest.mark.parametrize("where", ["changes", "file", "option"])
def test_none_is_a_value(where, tmp_path, capsys, monkeypatch):
    if where == "changes":
        config = runs.plan("digits", changes={"optimizer.ema_rampup": None}).config
        assert runs.plan("digits").config.optimizer.ema_rampup == 0.1
    elif where == "file":
        (tmp_path / "x.json").write_text('{"preset": "digits", "optimizer": {"ema_rampup": null}}')
        config = runs.plan(config_file=tmp_path / "x.json").config
    else:
        args = cli.build_parser("train").parse_args(["train", "digits", "--set", "optimizer.ema_rampup=none", "--lr", "0.5"])
        from fastcm.cli.train import changes

        assert changes(args) == {"optimizer.ema_rampup": None, "lr": 0.5}
        config = runs.plan("digits", changes=changes(args)).config
    assert config.optimizer.ema_rampup is None
    with pytest.raises(InputError, match="--batch: None"):
        runs.plan("digits", changes={"batch": None})


def test_labelled_pictures_train_without_classes():
    for arguments in ({"preset": "digits"}, {"data": "digits"}):
        ready = runs.plan(**arguments, changes={"network.num_classes": None})
        assert ready.dataset.labels is None and ready.config.network["num_classes"] is None


EMPTY = [
    lambda: runs.plan(data=""),
    lambda: runs.plan("digits", out=" "),
    lambda: runs.plan("digits", method="cd", teacher=""),
    lambda: runs.plan("digits", changes={"init": ""}),
    lambda: runs.plan("digits", changes={"labels_file": ""}),
    lambda: runs.plan("digits", changes={"network.kind": ""}),
    lambda: runs.open_dataset(""),
    lambda: runs.load(""),
    lambda: runs.train(data=""),
]


@pytest.mark.parametrize("call", EMPTY)
def test_empty_values_in_python(call):
    with pytest.raises(InputError, match="empty value in"):
        call()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "--data", ""], "--data"),
        (["train", "--out="], "--out"),
        (["train", "digits", "--set", ""], "--set"),
        (["train", "digits", "--set", "init="], "--set"),
        (["train", ""], "PRESET"),
        (["sample", ""], "MODEL"),
        (["sample", "x", "--out", ""], "--out"),
        (["sample", "x", "--labels", " "], "--labels"),
        (["convert", "x", ""], "DST"),
        (["evaluate", "x", "--data", ""], "--data"),
        (["export", "x", "--onnx", ""], "--onnx"),
        (["serve", "x", "--host", ""], "--host"),
        (["edit", "inpaint", "x", "--image", ""], "--image"),
        (["info", ""], "MODEL"),
    ],
)
def test_empty_values_on_the_command_line(words, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert ("empty value in" in error or "no value in" in error) and named in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_numbers_with_commas_are_a_list():
    settings = {"optimizer.betas": "0.9,0.98", "network.channel_mult": "1,2"}
    args = cli.build_parser("train").parse_args(["train", *[w for k, v in settings.items() for w in ("--set", f"{k}={v}")]])
    from fastcm.cli.train import changes

    config = runs.plan("digits", changes=changes(args)).config
    assert config.optimizer.betas == (0.9, 0.98) and tuple(config.network["channel_mult"]) == (1, 2)


@pytest.mark.parametrize("name", ["data", "out", "method", "teacher", "preset"])
def test_options_of_their_own_are_no_settings(name):
    with pytest.raises(InputError, match="an option of its own in --set"):
        runs.plan("digits", changes={name: "x"})
