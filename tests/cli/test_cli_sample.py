"""`fastcm sample`, `export` and `info` from the command line: files as promised, one line for what cannot be done."""

import shutil

import numpy as np
import pytest
import torch
from analytic import gaussian_teacher
from PIL import Image
from test_export import tiny_denoiser
from test_generator import randomised

from fastcm import cli, networks
from fastcm.cli.sample import seed_list
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.generation.generator import Generator
from fastcm.weights.model_folder import save_model, write_json

INFO = {"classes": ["ant", "bee", "cat"], "resolution": 8, "channels": 1, "licence": "MIT", "sampling": {"2": [80.0, 0.9]}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, tiny_denoiser(), INFO)
    return folder


@pytest.fixture
def model(tmp_path, monkeypatch, saved):
    """A run folder `run` with its model, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "run" / "model")
    write_json(tmp_path / "run" / "config.json", {"format": "fastcm-run"})
    (tmp_path / "run" / "log.jsonl").write_text('{"nimg": 640, "loss": 0.25}\n{"nimg": 1280, "lo')
    return "run"


@pytest.fixture
def expected():
    return Generator(tiny_denoiser(), INFO, device="cpu", precision="fp32")


def fastcm(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_classes_that_have_numbers_for_names(tmp_path, monkeypatch):
    """`all` draws each class once; text is a name, an int a number."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", tiny_denoiser(), {**INFO, "classes": ["1", "2", "10"]})
    assert fastcm("sample", "model", "--seeds", "5", "--labels", "all", "--out", "x.npz", "--device", "cpu") == 0
    assert np.load("x.npz")["arr_1"].tolist() == [0, 1, 2]
    assert fastcm("sample", "model", "--seeds", "5,6", "--labels", "10,1", "--out", "x.npz", "--device", "cpu") == 0
    assert np.load("x.npz")["arr_1"].tolist() == [2, 0]
    assert fastcm("sample", "model", "--report", "--seeds", "5", "--out", "x.png", "--device", "cpu") == 0
    assert Image.open("x.png").text["fastcm:labels"] == "0,1,2"
    generator = Generator(tiny_denoiser(), {**INFO, "classes": ["1", "2", "10"]}, device="cpu")
    assert np.array_equal(generator([5], 1), generator([5], "2")) and not np.array_equal(generator([5], 1), generator([5], "1"))


def test_names_with_commas_are_quoted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", tiny_denoiser(), {**INFO, "classes": ["dog", "dog, big", 'a "dog"']})
    asked = ("--labels", '"dog, big", "a ""dog""",0', "--seeds", "0-2")
    assert fastcm("sample", "model", *asked, "--out", "x.npz", "--device", "cpu") == 0
    assert np.load("x.npz")["arr_1"].tolist() == [1, 2, 0]
    assert fastcm("edit", "interpolate", "model", "--labels", '"dog, big"', "--frames", "2", "--out", "way.png", "--device", "cpu") == 0
    assert Image.open("way.png").text["fastcm:labels"] == "1"
    capsys.readouterr()
    for text, words in (('"dog', "not a list of classes in --labels"), ("dog,,dog", "an empty class in --labels: dog,,dog")):
        assert fastcm("sample", "model", "--labels", text) == 2 and words in capsys.readouterr().err


def test_a_model_with_names_that_no_line_can_hold(tmp_path, capsys):
    save_model(tmp_path / "model", tiny_denoiser(), {**INFO, "classes": ["ant", "be\ne", "cat"]})
    for command in ("sample", "info"):
        assert fastcm(command, tmp_path / "model") == 2
        assert "a class name with a control character in" in capsys.readouterr().err


def test_seeds_of_64_bits_with_and_without_sign(model, expected):
    asked = f"{2**64 - 1},{2**63},-1"
    assert fastcm("sample", model, "--seeds", asked, "--labels", "0", "--out", "x.npz", "--device", "cpu") == 0
    arrays = np.load("x.npz")
    assert arrays["seeds"].tolist() == [-1, -(2**63), -1] and np.array_equal(arrays["arr_0"], expected([-1, -(2**63), -1], 0))


def test_npz_holds_images_labels_and_seeds(model, tmp_path, expected, capsys):
    assert fastcm("sample", model, "--seeds", "3,7-9", "--labels", "bee,2", "--out", "x.npz", "--device", "cpu") == 0
    arrays = np.load("x.npz")
    assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (4, 8, 8, 1)
    assert arrays["seeds"].tolist() == [3, 7, 8, 9] and arrays["arr_1"].tolist() == [1, 2, 1, 2] and arrays["arr_1"].dtype == np.int64
    assert np.array_equal(arrays["arr_0"], expected([3, 7, 8, 9], [1, 2])) and arrays["arr_0"].std() > 5
    told = capsys.readouterr().out
    assert "4 pictures in x.npz (torch cpu, fp32" in told


def test_a_grid_is_enlarged_and_says_how_it_was_made(model, expected):
    assert fastcm("sample", model, "--seeds", "0-4", "--steps", "2", "--out", "sub/x.png", "--device", "cpu") == 0
    picture = Image.open("sub/x.png")
    assert picture.size == (2 + 3 * 66, 2 + 2 * 66) and picture.mode == "L"
    assert picture.text["fastcm:seeds"] == "0,1,2,3,4" and picture.text["fastcm:labels"] == "0,1,2,0,1"
    assert picture.text["fastcm:sampler"] == "sigmas 80,0.9"
    images = expected(range(5), sigmas=(80.0, 0.9))
    tile = np.array(picture)[2:66, 68:132]  # the second picture, each pixel a square of 8x8
    assert np.array_equal(tile, np.kron(images[1, ..., 0], np.ones((8, 8), np.uint8)))


def test_a_folder_gets_a_picture_per_seed(model, expected):
    for out in ("pictures/", "pictures-too"):
        assert fastcm("sample", model, "--seeds", "5,6", "--labels", "2", "--out", out, "--device", "cpu") == 0
    for folder in ("pictures", "pictures-too"):
        picture = Image.open(f"{folder}/seed-6-class-2.png")
        assert np.array_equal(np.array(picture), expected([6], 2)[0, ..., 0])
        assert picture.text["fastcm:seeds"] == "6" and picture.text["fastcm:labels"] == "2"


def test_all_crosses_labels_and_seeds(model, expected):
    assert fastcm("sample", model, "--seeds", "4,5", "--labels", "all", "--out", "x.npz", "--device", "cpu") == 0
    arrays = np.load("x.npz")
    assert arrays["seeds"].tolist() == [4, 4, 4, 5, 5, 5] and arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(arrays["arr_0"][4], expected([5], 1)[0])


def test_published_timesteps_are_noise_levels(model, expected):
    assert fastcm("sample", model, "--seeds", "0-2", "--timesteps", "0,22,39", "--grid", "40", "--out", "x.npz", "--device", "cpu") == 0
    assert np.array_equal(np.load("x.npz")["arr_0"], expected(range(3), sigmas=expected.timesteps(0, 22, 39, grid=40)))
    assert fastcm("sample", model, "--seeds", "0", "--timesteps", "0,22", "--out", "x.png", "--device", "cpu") == 0
    assert Image.open("x.png").text["fastcm:sampler"] == "sigmas 80,1.38237"


def test_a_report_has_seeds_by_classes(model, expected, tmp_path):
    assert fastcm("sample", model, "--report", "--device", "cpu") == 0
    report = Image.open(tmp_path / "run-report.png")
    assert report.text["fastcm:seeds"] == ",".join(f"{seed}" for seed in range(8) for _ in range(3))
    assert report.text["fastcm:labels"] == ",".join(["0,1,2"] * 8)
    assert report.height == 2 * 12 + 8 * 66 + 2
    tile = np.array(report)[24 + 2 + 66 : 24 + 66 + 66, -66 - 66 : -66 - 2]  # seed 1, the second of three classes
    assert np.array_equal(tile[::8, ::8], expected([1], "bee")[0, ..., 0])


def test_a_report_of_some_labels_has_captions(model, expected):
    assert fastcm("sample", model, "--report", "--seeds", "5,6", "--labels", "bee", "--out", "x.png", "--device", "cpu") == 0
    report = Image.open("x.png")
    assert report.size[1] == 12 + 66 + 12 + 2 and report.text["fastcm:labels"] == "1,1"
    assert np.array_equal(np.array(report)[14:78:8, 68:132:8], expected([6], "bee")[0, ..., 0])


def test_long_jobs_are_written_in_batches(model, expected, monkeypatch):
    monkeypatch.setattr("fastcm.generation.generator.CPU_ELEMENTS", 4 * 64)
    for out in ("x.npz", "folder/"):
        assert fastcm("sample", model, "--seeds", "0-9", "--out", out, "--device", "cpu") == 0
    images = expected(range(10))
    assert np.array_equal(np.load("x.npz")["arr_0"], images) and np.load("x.npz")["seeds"].tolist() == list(range(10))
    assert all(np.array_equal(np.array(Image.open(f"folder/seed-{seed}-class-{seed % 3}.png")), images[seed, ..., 0]) for seed in range(10))


def test_sixty_four_seeds_by_default(model, tmp_path):
    assert fastcm("sample", model, "--device", "cpu") == 0
    assert Image.open(tmp_path / "run-samples.png").size == (8 * 66 + 2, 8 * 66 + 2)


def test_a_teacher_is_sampled_by_its_solver(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = networks.build(
        "adm",
        {
            **dict.fromkeys(("in_channels", "out_channels", "blocks"), 1),
            "resolution": 8,
            "channels": 8,
            "head_channels": 8,
            "channel_mult": (1,),
            "attention_resolutions": (),
        },
    )
    denoiser = Denoiser(randomised(network), Preconditioning(form="edm"))
    save_model(tmp_path / "teacher", denoiser, {**INFO, "classes": None, "training": {"method": "edm"}})
    assert fastcm("sample", "teacher", "--seeds", "0", "--out", "x.png", "--device", "cpu") == 0
    assert Image.open("x.png").text["fastcm:sampler"] == "heun, 18 steps"
    assert fastcm("sample", "teacher", "--seeds", "0", "--sampler", "euler", "--steps", "3", "--out", "y.png", "--device", "cpu") == 0
    assert Image.open("y.png").text["fastcm:sampler"] == "euler, 3 steps"
    churn = ("--sampler", "heun", "--steps", "5", "--churn", "40,0.05,50,1.003")
    assert fastcm("sample", "teacher", "--seeds", "0", *churn, "--out", "z.png", "--device", "cpu") == 0
    assert Image.open("z.png").text["fastcm:sampler"] == "heun, 5 steps, churn 40,0.05,50,1.003"
    for arguments, words in ((("--sampler", "euler", "--churn", "3"), "churn for a sampler without it"), (("--churn", "-1"), "in churn")):
        capsys.readouterr()
        assert fastcm("sample", "teacher", "--seeds", "0", *arguments, "--device", "cpu") == 2 and words in capsys.readouterr().err


def test_equal_commands_give_equal_files(model):
    for out in ("a.png", "b.png"):
        fastcm("sample", model, "--seeds", "0-3", "--out", out, "--device", "cpu")
    assert open("a.png", "rb").read() == open("b.png", "rb").read()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "nowhere"), "no such file or folder in MODEL: nowhere"),
        (("sample", "run", "--seeds", "5-"), "--seeds: 5-"),
        (("sample", "run", "--seeds", "9-5"), "empty range in --seeds: 9-5"),
        (("sample", "run", "--seeds", "a"), "--seeds: a"),
        (("sample", "run", "--seeds", str(2**64)), "seed out of range"),
        (("sample", "run", "--labels", "3"), "class out of range in labels: 3"),
        (("sample", "run", "--labels", "bea"), "Did you mean 'bee'"),
        (("sample", "run", "--steps", "0"), "illegal value in steps: 0"),
        (("sample", "run", "--steps", "two"), "--steps: two"),
        (("sample", "run", "--steps", "2", "--sigmas", "80,1"), "--sigmas and --steps"),
        (("sample", "run", "--sigmas", "80,x"), "--sigmas: 80,x"),
        (("sample", "run", "--sigmas", "80,0.0001"), "noise level out of range in sigmas: 0.0001"),
        (("sample", "run", "--timesteps", "0,40"), "timestep out of range in timesteps: 40"),
        (("sample", "run", "--timesteps", "22,0", "--grid", "40"), "timesteps out of order in timesteps: 22,0"),
        (("sample", "run", "--timesteps", "39"), "no timestep before the last"),
        (("sample", "run", "--timesteps", "0,x"), "not a list of whole numbers in --timesteps: 0,x"),
        (("sample", "run", "--timesteps", "0", "--grid", "1"), "illegal value in grid: 1"),
        (("sample", "run", "--timesteps", "0", "--steps", "1"), "--steps and --timesteps"),
        (("sample", "run", "--grid", "40"), "missing option beside --grid: --timesteps"),
        (("sample", "run", "--churn", "3"), "churn for a sampler without it in churn: consistency"),
        (("sample", "x.onnx", "--churn", "3"), "a solver's option for an exported graph in --churn: x.onnx"),
        (("sample", "run", "--report", "--out", "x.npz"), "A report is a picture"),
        (("sample", "run", "--out", "x.jpg"), "unknown kind of file in --out: x.jpg"),
        (("sample", "run", "--device", "cpuu"), "--device: cpuu"),
        (("sample", "run", "--precision", "fp33"), "--precision: fp33"),
        (("sample", "run", "--provider", "rocm"), "--provider: rocm"),
        (("sample", "run", "--provider", "tensorrt"), "Export it first"),
        (("sample", "run", "--sampler", "heum"), "Did you mean 'heun'"),
        (("sample", "empty"), "no model in MODEL: empty"),
        (("sample", "started"), "no model yet in started"),
        (("sample", "x.txt"), "unknown kind of file in MODEL: x.txt"),
        (("sample", "x.plan"), "a program in MODEL: x.plan. Loading it runs its code: give --trust"),
        (("export", "run"), "no target"),
        (("export", "run", "--onnx", "x.pt"), "unknown kind of file in --onnx: x.pt"),
        (("export", "run", "--onnx", "--opset", "9"), "opset out of range in --opset: 9"),
        (("export", "nowhere", "--onnx"), "no such file or folder in MODEL: nowhere"),
        (("export", "x.onnx", "--onnx"), "an exported graph in MODEL: x.onnx"),
        (("info", "nowhere"), "no such file or folder in MODEL: nowhere"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(model, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "started").mkdir()
    write_json(tmp_path / "started" / "config.json", {"format": "fastcm-run"})
    for name in ("x.txt", "x.plan", "x.onnx"):
        (tmp_path / name).write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    assert fastcm(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcm: error: ") and words in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_info_describes_a_run(model, capsys):
    assert fastcm("info", model) == 0
    told = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in tiny_denoiser().network.parameters())
    for words in ("adm", f"{parameters:,}", "ant, bee, cat", "0.002 to 80", "8x8, 1 channels", "nimg 640, loss 0.25", "MIT", "kernels"):
        assert words in told, words
    assert len(next(line for line in told.splitlines() if "sha256 model.safetensors" in line).split()[-1]) == 64


@pytest.mark.slow
def test_export_and_sample_again(model, tmp_path, expected, capsys):
    assert fastcm("export", model, "--onnx") == 0
    told = capsys.readouterr().out
    assert "max error" in told and "run/model.onnx" in told and "note:" not in told
    assert fastcm("sample", "run/model.onnx", "--seeds", "0-5", "--out", "x.npz") == 0
    assert "ONNX Runtime CPUExecutionProvider" in capsys.readouterr().out
    arrays = np.load("x.npz")
    assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]
    assert np.abs(arrays["arr_0"].astype(int) - expected(range(6)).astype(int)).max() <= 1
    assert fastcm("info", "run/model.onnx") == 0
    assert "sigmas 80, fp32" in capsys.readouterr().out
    assert fastcm("sample", "run/model.onnx", "--steps", "2", "--out", "y.npz") == 2
    assert "other noise levels than the graph's" in capsys.readouterr().err and not (tmp_path / "y.npz").exists()


def test_seed_lists():
    assert seed_list("0-3,7,-2,-5--4") == [0, 1, 2, 3, 7, -2, -5, -4] and seed_list("-1") == [-1]


def test_the_gaussian_teacher_is_not_a_folder_model(tmp_path):
    """A network of the user's own is saved by its name and loaded into the module that the user hands over."""
    from fastcm import InputError, load

    save_model(tmp_path / "own", gaussian_teacher(), {"resolution": 4, "channels": 1})
    with pytest.raises(InputError, match="a network of your own .*GaussianNetwork"):
        load(tmp_path / "own")
    generator = load(tmp_path / "own", network=gaussian_teacher().network, device="cpu")
    assert torch.is_tensor(generator.denoiser(torch.zeros(1, 1, 4, 4), torch.tensor([1.0])))
