"""The shipped model: a name stands for it wherever no such path exists, and nothing is written into it."""

import json

import numpy as np
import pytest
from PIL import Image

import fastcm
from fastcm import api
from fastcm.cli import main
from fastcm.cli.export import output_path
from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError

FOLDER = api.BUILT_IN / "mnist"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def generator():
    return fastcm.load("mnist", device="cpu", precision="fp32")


def test_it_draws_digits_of_every_class_in_one_step(generator):
    """Each drawn digit is nearer to the mean picture of its own class than to most others': a model of noise would not be."""
    held_out = open_dataset("mnist:held-out")
    means = np.stack([held_out.images[held_out.labels == label].mean(axis=0).ravel() for label in range(10)])
    labels = np.arange(60) % 10
    images = generator(seeds=range(60), labels=labels.tolist())
    assert images.shape == (60, 28, 28, 1) and generator.classes == [str(digit) for digit in range(10)]
    distances = ((images.reshape(60, 1, -1) - means.astype(np.float32)) ** 2).sum(axis=2)
    assert np.mean(distances.argmin(axis=1) == labels) > 0.6
    assert len({image.tobytes() for image in images}) == 60


def test_it_is_small_and_says_where_it_comes_from():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3.1e6
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["training"]["dataset"] == open_dataset("mnist").for_training().fingerprint
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for words in ("fastcm train mnist", "commit", "recognised", "Fréchet", "CC BY-SA 3.0"):
        assert words in card, words


def test_a_path_of_that_name_comes_first(elsewhere):
    assert api.resolve_model("mnist") == ("folder", FOLDER) and api.is_built_in("mnist")
    (elsewhere / "mnist").mkdir()
    assert not api.is_built_in("mnist")
    with pytest.raises(InputError, match="no model in MODEL: mnist"):
        fastcm.load("mnist")


def test_other_names_get_a_suggestion(elsewhere):
    with pytest.raises(InputError, match=r"no such file or folder in MODEL: mnst\..* Did you mean 'mnist'\?"):
        fastcm.load("mnst")


def test_commands_take_the_name(elsewhere, capsys):
    assert main(["sample", "mnist", "--seeds", "0-3", "--out", "x.png"]) == 0
    assert Image.open("x.png").width >= 56
    assert (
        main(["edit", "superres", "mnist", "--image", "x.png", "--labels", "3", "--seeds", "1", "--out", "y.png", "--sigmas", "80,2"]) == 0
    )
    assert Image.open("y.png").size == (28, 28)
    assert main(["info", "mnist"]) == 0 and "758,020" in capsys.readouterr().out


def test_its_export_goes_to_the_current_folder():
    assert str(output_path(True, api.Path("mnist"))) == "mnist.onnx"


def test_nothing_is_written_into_it(elsewhere, capsys):
    before = sorted(path.name for path in FOLDER.iterdir())
    assert main(["train", "mnist", "--out", str(FOLDER)]) == 2
    assert main(["evaluate", "mnist", "--data", "mnist", "--search-steps", "2", "--save"]) == 2
    assert "a shipped model for --save: mnist. Copy it first: fastcm convert mnist DIR." in capsys.readouterr().err
    assert sorted(path.name for path in FOLDER.iterdir()) == before
