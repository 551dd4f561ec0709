"""`fastcm evaluate` on models, files and folders, and what it refuses."""

import json
from importlib import resources

import numpy as np
import pytest
import torch
from evaluated_models import judged_quickly, model_folder, run  # noqa: F401

from fastcm import cli
from fastcm.cli.evaluate_sets import CALLS
from fastcm.consistency.betas import Betas
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.data.dataset import open_dataset
from fastcm.generation import pictures
from fastcm.generation.generator import Generator

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def digits():
    with resources.as_file(resources.files("fastcm.data") / "builtin" / "digits.npz") as path, np.load(path) as file:
        return file["arr_0"].reshape(-1, 8, 8, 1), file["arr_1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("random") / "model")


@pytest.mark.slow
def test_a_model_is_measured_with_one_and_two_steps(tmp_path, capsys, model):
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


def test_the_samples_are_those_of_the_seeds(tmp_path, capsys, digits, model):
    """Evaluating a model and evaluating the file of its samples give one set of figures."""
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

    p = Preconditioning(form="epsilon", c_noise="interpolated step", betas=Betas(), sigma_min=0.01)
    generator = Generator(Denoiser(Network(), p), {"resolution": 8, "channels": 1}, device="cpu")
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


def test_a_folder_that_sample_wrote(tmp_path, capsys, digits):
    """Its pictures' names have the numbers of their classes, whatever the names of the data's."""
    images, labels = digits
    for index in range(60):
        pictures.save_png(tmp_path / "samples" / f"seed-{index}-class-{labels[index]}.png", pictures.to_pil(images[index]))
        pictures.save_png(tmp_path / "real" / f"x{labels[index]}" / f"{index}.png", pictures.to_pil(images[index]))
    command = (tmp_path / "samples", "--metrics", "accuracy", "--json", tmp_path / "r.json")
    for data in ("digits", tmp_path / "real"):
        code, _, err = run(capsys, *command, "--data", data)
        assert (code, err) == (0, "") and json.loads((tmp_path / "r.json").read_text())["sets"][0]["accuracy"] > 0.6


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
        (
            ("--sampler", "huen"),
            "unknown value in --sampler: huen. Use one of consistency, heun, euler, dpm, ancestral, ddim. Did you mean",
        ),
        (("--json", "nowhere/r.json"), "no such folder for --json"),
        (("--device", "gpu"), "unknown device in --device: gpu."),
    ],
)
def test_bad_options_get_one_line(capsys, model, options, words):
    code, out, err = run(capsys, model, "--data", "digits", *options)
    assert code == 2 and out == "" and err.startswith("fastcm: error: ") and words in err and err.count("\n") == 1


def test_bad_data_get_one_line(tmp_path, capsys, digits, model):
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


def test_statistics_of_the_data_go_out_and_come_in_again(tmp_path, capsys, digits):
    """ADM's format both ways: the saved statistics give the figure of the images that they were made of, without the images."""
    (tmp_path / "pixels.py").write_text("import torch\nnet = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Flatten())\n")
    np.savez(tmp_path / "samples.npz", arr_0=digits[0][:200])
    options = ("--features", "pixels:net", "--metrics", "fid")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        samples, reference = tmp_path / "samples.npz", tmp_path / "ref.npz"
        code, out, err = run(capsys, samples, "--data", "digits", *options, "--save-reference", reference, "--json", tmp_path / "a")
        assert (code, err) == (0, "") and "FID [pixels:net]" in out
        code, out, err = run(capsys, samples, "--reference", reference, *options, "--json", tmp_path / "b", "--debug")
        assert (code, err) == (0, "") and "statistics from a file" in out
        a, b = (json.loads((tmp_path / name).read_text()) for name in "ab")
        assert a["sets"] == b["sets"] and a["sets"][0]["fid"]["mean"] > 0
        _, _, err = run(capsys, samples, "--reference", reference, *options[:2], "--metrics", "kid")
        assert "a file of statistics with --metrics kid: it serves fid alone." in err
    with np.load(tmp_path / "ref.npz") as file:
        pooled = (digits[0][..., 0] / 127.5 - 1).reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
        np.testing.assert_allclose(file["sigma"], np.cov(pooled.T), atol=1e-6)


@pytest.mark.slow
def test_self_consistency_follows_the_teacher_that_is_named(tmp_path, capsys, model):
    teacher = model_folder(tmp_path / "teacher", method="edm")
    options = ("--data", "digits", "--seeds", "0-9", "--steps", "1", "--metrics", "consistency", "--json", tmp_path / "r.json")
    code, out, _ = run(capsys, model, *options)
    plain = json.loads((tmp_path / "r.json").read_text())["sets"][0]["consistency"]
    assert code == 0 and "self-consistency [data paths x0 + sigma z]" in out and plain["n"] == 64 and plain["mean"] > 0
    code, out, _ = run(capsys, model, *options, "--teacher", teacher)
    led = json.loads((tmp_path / "r.json").read_text())["sets"][0]["consistency"]
    assert code == 0 and "self-consistency [the teacher's ODE, Heun]" in out and led["mean"] != plain["mean"]
    _, _, err = run(capsys, model, *options, "--teacher", model)
    assert "not a diffusion model in --teacher" in err and err.count("\n") == 1


def test_a_report_of_a_run_has_its_curves(tmp_path, capsys):
    folder = tmp_path / "run"
    model_folder(folder / "model")
    (folder / "config.json").write_text(json.dumps({"format": "fastcm-run", "version": 1}))
    (folder / "log.jsonl").write_text("".join(json.dumps({"nimg": i * 1000, "loss": 1 / i}) + "\n" for i in range(1, 5)) + '{"nimg": 5')
    out = tmp_path / "page"
    options = ("--data", "digits", "--seeds", "500000-500049", "--metrics", "fid,neighbours", "--report", out)
    code, said, err = run(capsys, folder, *options)
    text = (out / "index.html").read_text()
    assert (code, err) == (0, "") and f"report in {out / 'index.html'}" in said and [p.name for p in out.iterdir()] == ["index.html"]
    assert "training loss by images seen" in text and text.count("<svg") == 2 and "2 steps" in text and "Nearest training images" in text


def test_lpips_needs_weights_and_names_itself(tmp_path, capsys, monkeypatch, model):
    options = ("--data", "digits", "--seeds", "500000-500059", "--steps", "1", "--metrics", "lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    code, _, err = run(capsys, model, *options)
    assert code == 2 and "no VGG16 weights for LPIPS in --lpips-weights" in err and err.count("\n") == 1
    asked = []

    def fake(weights, *, pooling, resize):
        asked.append((weights, pooling, resize))
        return lambda x, y: (x - y).square().mean((1, 2, 3))

    monkeypatch.setattr("fastcm.weights.lpips_weights.load_lpips", fake)
    code, out, _ = run(capsys, model, *options, "--lpips-weights", "vgg.pth", "--json", tmp_path / "r.json")
    figure = json.loads((tmp_path / "r.json").read_text())["sets"][0]["lpips"]
    assert code == 0 and "diversity [LPIPS]" in out and asked == [("vgg.pth", "max", False)]
    # 60 seeds of ten classes make five neighbouring pairs of each.
    assert figure["n"] == 50 and figure["mean"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--save",), "nothing to save in --save"),
        (("--search-grid", "9"), "no search for --search-grid: 9."),
        (("--metrics", "fid", "--teacher", "x"), "no metric for --teacher: x."),
        (("--teacher", "none"), "no such file or folder in MODEL: none."),
        (("--metrics", "fid", "--lpips-weights", "x"), "no metric for --lpips-weights"),
        (("--features", "judge", "--inception-weights", "x"), "weights of another network than --features judge"),
        (("--search-steps", "1"), "illegal number of steps in --search-steps: 1."),
        (("--search-steps", "2", "--sigmas", "80,1"), "levels given beside a search"),
        (("--search-steps", "2", "--search-grid", "2"), "illegal number of levels in --search-grid: 2."),
        (("--search-steps", "2", "--metrics", "kid"), "a metric that is not measured in --search-metric: fid."),
        (("--search-steps", "2", "--sampler", "heun"), "a diffusion sampler with --search-steps"),
        (("--search-metric", "fdi"), "unknown search-metric in --search-metric: fdi"),
        (("--features", "judg"), "unknown value in --features: judg."),
        (("--features", "inception"), "no Inception weights in --features inception"),
        (("--features", "none.onnx"), "no such file in --features"),
        (("--reference", "none.npz"), "no such file in --reference"),
        (("--metrics", "neighbours", "--save-reference", "x.npz"), "no statistics for --save-reference"),
        (("--metrics", "fid,kid", "--reference", "ref.npz"), "a file of statistics with --metrics fid,kid: it serves fid alone."),
        (("--metrics", "fid", "--reference", "ref.npz"), "other features than the reference's: 64 and 4"),
        (("--report", "nowhere/page"), "no such folder for --report"),
        (("--seeds", "1-3", "--metrics", "precision"), "too few samples in features"),
        (("--seeds", "1-3", "--metrics", "fid", "--features", "nan_net:net"), "non-finite features in --features: nan_net:net"),
    ],
)
def test_more_bad_options_get_one_line(tmp_path, capsys, monkeypatch, model, options, words):
    (tmp_path / "nan_net.py").write_text(
        "import torch\nclass N(torch.nn.Module):\n    def forward(self, x):\n        return x.flatten(1) * float('nan')\nnet = N()\n"
    )
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    code, out, err = run(capsys, model, "--data", "digits", *options)
    assert code == 2 and out == "" and err.startswith("fastcm: error: ") and words in err and err.count("\n") == 1


def test_what_only_a_torch_model_can_do_is_refused_for_samples(tmp_path, capsys, digits):
    np.savez(tmp_path / "samples.npz", arr_0=digits[0][:90], arr_1=digits[1][:90])
    for options, words in (
        (("--metrics", "consistency"), "no torch model for --metrics consistency"),
        (("--search-steps", "2"), "an option of models beside samples: --search-steps"),
        (("--teacher", "x"), "an option of models beside samples: --teacher"),
    ):
        code, out, err = run(capsys, tmp_path / "samples.npz", "--data", "digits", *options)
        assert code == 2 and out == "" and words in err and err.count("\n") == 1
