"""`fastcm evaluate` on models, files and folders, and what it refuses."""

import json
from importlib import resources

import numpy as np
import pytest
import torch

from fastcm import cli, evaluation
from fastcm.cli.evaluate_sets import CALLS
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.evaluation import features, halves, train_judge
from fastcm.generation import pictures
from fastcm.generation.generator import Generator
from fastcm.networks.unet import UNet, UNetConfig
from fastcm.training.data import open_dataset
from fastcm.weights.model_folder import save_model


@pytest.fixture(scope="module")
def judge():
    """A judge of the digits that learned for a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STEPS", (40, 40))
        dataset = open_dataset("digits")
        return train_judge(dataset.images, dataset.labels)


@pytest.fixture(autouse=True)
def quick(monkeypatch, judge):
    monkeypatch.setattr(evaluation, "train_judge", lambda images, labels, *, seed, cache: judge)
    monkeypatch.setattr(halves, "SPLITS", 5)


@pytest.fixture(scope="module")
def digits():
    with resources.as_file(resources.files("fastcm") / "data" / "digits.npz") as path, np.load(path) as file:
        return file["arr_0"].reshape(-1, 8, 8, 1), file["arr_1"]


def model_folder(path, *, method="ict", num_classes=10, channels=1, **training):
    """A digits-sized model with random weights, its output layer included."""
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(
            resolution=8, in_channels=channels, out_channels=channels, channels=8, channel_mult=(1, 2), blocks=1,
            attention_resolutions=(4,), head_channels=8, num_classes=num_classes,
        )
    )  # fmt: skip
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    classes = [str(number) for number in range(num_classes)] if num_classes else None
    form = "edm" if method == "edm" else "boundary"
    info = {"classes": classes, "resolution": 8, "channels": channels, "training": {"method": method, **training}, "sampling": {}}
    save_model(path, Denoiser(network, Preconditioning(form=form)), info)
    return path


def run(capsys, *argv):
    code = cli.main(["evaluate", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_model_is_measured_with_one_and_two_steps(tmp_path, capsys):
    model = model_folder(tmp_path / "model")
    report = tmp_path / "report.json"
    code, out, err = run(capsys, model, "--data", "digits", "--seeds", "100000-100059", "--json", report)
    assert (code, err) == (0, "")
    result = json.loads(report.read_text())
    one, two = result["sets"]
    assert (one["name"], one["nfe"], two["name"], two["nfe"], one["count"]) == ("1 step", 1, "2 steps", 2, 60)
    assert one["accuracy"] < 0.4 and one["fd"]["ratio"] > 5, "a model that was never trained must score badly"
    assert one["fd"]["mean"] != two["fd"]["mean"]
    assert f"{one['fd']['mean']:.2f}" in out and "seeds 100000-100059, label = seed mod 10" in out
    assert result["protocol"]["sigmas"][0] == [80.0] and len(result["protocol"]["sigmas"][1]) == 2


def test_the_samples_are_those_of_the_seeds(tmp_path, capsys, digits):
    """Evaluating a model and evaluating the file of its samples give one set of figures."""
    model = model_folder(tmp_path / "model")
    options = ("--data", "digits", "--metrics", "accuracy,fd,neighbours")
    run(capsys, model, *options, "--seeds", "5,8,11-60", "--steps", "1", "--json", tmp_path / "a.json")
    seeds = [5, 8, *range(11, 61)]
    assert cli.main(["sample", str(model), "--seeds", "5,8,11-60", "--out", str(tmp_path / "x.npz")]) == 0
    assert run(capsys, tmp_path / "x.npz", *options, "--json", tmp_path / "b.json")[0] == 0
    a, b = (json.loads((tmp_path / name).read_text())["sets"][0] for name in ("a.json", "b.json"))
    assert a.pop("name") == "1 step" and b.pop("name") == "x.npz" and (a.pop("nfe"), b.pop("nfe")) == (1, None)
    assert a == b and a["count"] == len(seeds)


def test_a_teacher_is_sampled_with_heun_and_its_calls_are_counted(tmp_path, capsys):
    model = model_folder(tmp_path / "teacher", method="edm")
    code, out, _ = run(
        capsys, model, "--data", "digits", "--seeds", "0-9", "--steps", "2,3", "--metrics", "neighbours", "--json", tmp_path / "r.json"
    )
    assert code == 0 and "heun, 2 steps" in out
    assert [row["nfe"] for row in json.loads((tmp_path / "r.json").read_text())["sets"]] == [3, 5]


@pytest.mark.parametrize("sampler", sorted(set(CALLS) - {"consistency"}))
def test_the_counted_calls_are_the_real_ones(sampler):
    """The figure in the table is what a sampler asks of the network."""
    calls = []

    class Network(torch.nn.Module):
        def forward(self, x, c_noise, labels=None):
            calls.append(len(x))
            return torch.zeros_like(x)

    generator = Generator(Denoiser(Network(), Preconditioning(form="edm")), {"resolution": 8, "channels": 1}, device="cpu")
    generator([0], steps=4, sampler=sampler)
    assert len(calls) == CALLS[sampler](4)


def test_real_images_score_as_real_and_copies_are_named(tmp_path, capsys, digits):
    images, labels = digits
    pictures.save_npz(tmp_path / "copies.npz", images[::9], labels=labels[::9])
    code, out, _ = run(capsys, tmp_path / "copies.npz", "--data", "digits", "--json", tmp_path / "r.json")
    row = json.loads((tmp_path / "r.json").read_text())["sets"][0]
    assert code == 0 and row["accuracy"] > 0.6 and row["fd"]["ratio"] < 1.7
    assert row["neighbours"]["identical"] == 200 and "identical to a training image" in out


def test_a_folder_of_samples_with_classes(tmp_path, capsys, digits):
    images, labels = digits
    for index in range(60):
        pictures.save_png(tmp_path / "samples" / str(labels[index]) / f"{index}.png", pictures.to_pil(images[index]))
    code, _, err = run(capsys, tmp_path / "samples", "--data", "digits", "--metrics", "accuracy", "--json", tmp_path / "r.json")
    row = json.loads((tmp_path / "r.json").read_text())["sets"][0]
    assert (code, err) == (0, "") and row["accuracy"] > 0.6 and row["count"] == 60


def test_a_model_knows_its_training_data_and_the_rows_it_never_saw(tmp_path, capsys):
    fingerprint = open_dataset("digits").fingerprint
    held_out = list(range(0, 1797, 10))
    options = ("--data", "digits", "--seeds", "0-9", "--steps", "1", "--metrics", "neighbours", "--json", tmp_path / "r.json")
    _, out, _ = run(capsys, model_folder(tmp_path / "a", dataset=fingerprint, held_out=held_out), *options)
    row = json.loads((tmp_path / "r.json").read_text())["sets"][0]["neighbours"]
    assert "trained on these images" in out and (row["real_count"], row["train_count"]) == (len(held_out), 1797 - len(held_out))
    _, out, _ = run(capsys, model_folder(tmp_path / "b", dataset="0" * 64), *options)
    assert "trained on other images" in out and "leave-one-out" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--metrics", "fdi"), "unknown metric in --metrics: fdi."),
        (("--steps", "0"), "invalid number of steps in --steps: 0."),
        (("--steps", "1", "--sigmas", "80,0.8"), "two options that exclude each other"),
        (("--sigmas", "80,x"), "not a list of numbers in --sigmas"),
        (("--sigmas", "90"), "noise level out of range in sigmas: 90."),
        (("--seeds", "9-3"), "--seeds"),
        (("--seeds", "1"), "too few samples"),
        (("--sampler", "huen"), "unknown value in --sampler: huen. Use one of consistency, heun, euler, dpm, ancestral. Did you mean"),
        (("--json", "nowhere/r.json"), "no such folder for --json"),
        (("--device", "gpu"), "unknown device in --device: gpu."),
    ],
)
def test_bad_options_get_one_line(tmp_path, capsys, options, words):
    code, out, err = run(capsys, model_folder(tmp_path / "model"), "--data", "digits", *options)
    assert code == 2 and out == "" and err.startswith("fastcm: error: ") and words in err and err.count("\n") == 1


def test_bad_data_get_one_line(tmp_path, capsys, digits):
    model = model_folder(tmp_path / "model")
    np.savez(tmp_path / "unlabelled.npz", arr_0=digits[0][:90])
    np.savez(tmp_path / "colour.npz", arr_0=np.repeat(digits[0][:90], 3, axis=3), arr_1=digits[1][:90])
    np.savez(tmp_path / "samples.npz", arr_0=digits[0][:90], arr_1=digits[1][:90] + 5)
    for argv, words in (
        ((model, "--data", tmp_path / "none"), "no such file or folder in --data"),
        ((model, "--data", tmp_path / "colour.npz"), "images of another shape than --data"),
        ((model, "--data", tmp_path / "unlabelled.npz"), "no labels in --data"),
        ((tmp_path / "none", "--data", "digits"), "no such file or folder in MODEL"),
        ((tmp_path / "colour.npz", "--data", "digits"), "images of another shape than --data in colour.npz"),
        ((tmp_path / "samples.npz", "--data", "digits"), "label out of range in --data: samples"),
        ((tmp_path / "samples.npz", "--data", tmp_path / "unlabelled.npz"), "unlabelled data with --metrics"),
        ((tmp_path / "colour.npz", "--data", "digits", "--steps", "2"), "an option of models beside samples: --steps"),
        ((model,), "missing argument in fastcm evaluate: --data"),
    ):
        code, out, err = run(capsys, *argv)
        assert code == 2 and out == "" and words in err and err.count("\n") == 1, argv
