"""What `fastcm train` says of the data, and refuses, before it trains."""

import json

import numpy as np
import pytest
from PIL import Image
from random_pictures import random_pixels, write_folder

from fastcm.cli import main

SMALL = ("--dry-run", "--set", "network.channels=8", "--set", "network.head_channels=8")


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """(exit code, stdout, stderr) of a dry run on `source`."""
    monkeypatch.setenv("FASTCM_CACHE", str(tmp_path / "cache"))
    for measured in ("print_memory", "print_time"):  # seconds of a step; test_memory.py and test_config_file.py read them
        monkeypatch.setattr(f"fastcm.cli.train.{measured}", lambda *arguments: None)

    def run(source, *options):
        code = main(["train", "--data", str(source), "--out", str(tmp_path / "run"), *SMALL, *map(str, options)])
        return code, *capsys.readouterr()

    return run


def test_the_plan_counts_pictures_by_class(tmp_path, plan):
    write_folder(tmp_path / "set", [(8, 8)] * 2, classes=("cat", "big, dog"))
    (tmp_path / "set" / "notes.txt").write_text("")
    _, told, _ = plan(tmp_path / "set")
    assert "4 pictures, 3x8x8, 2 classes\n" in told
    assert '         classes by sub-folder\n         passed over: 1 .txt\n         "big, dog" 2, cat 2\n' in told


def test_the_plan_names_classes_without_pictures(tmp_path, plan):
    np.savez(tmp_path / "x.npz", random_pixels(6, 8, 8), np.array([0, 3, 3, 0, 0, 5]))
    _, told, _ = plan(tmp_path / "x.npz")
    assert "6 classes\n         0 3, 3 2, 5 1\n         no picture of 3 classes: 1, 2, 4\n" in told
    np.savez(tmp_path / "y.npz", random_pixels(26, 8, 8), np.r_[np.arange(13), np.full(13, 4)])
    assert "13 classes\n         1 to 14 pictures a class\n" in plan(tmp_path / "y.npz")[1]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "unlabelled data with --evaluate-every: the judge is a classifier of the data."),
        (np.zeros(8, int), "too little data for --evaluate-every: 8 images, 1 classes."),
        (np.arange(8), "too little data for --evaluate-every: 8 images, 8 classes."),
    ],
)
def test_data_that_no_judge_can_learn_from_are_refused_before_training(tmp_path, plan, labels, words):
    np.savez(tmp_path / "x.npz", random_pixels(8, 8, 8), *([] if labels is None else [labels]))
    code, _, told = plan(tmp_path / "x.npz", "--evaluate-every", "1kimg")
    assert code == 2 and words in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_folders_with_bytes_that_are_not_utf8(tmp_path):
    """Paths may have them: what bears them is written as JSON that reads back to the same bytes, and no temporary file is left."""
    from fastcm.generation.pictures import save_png
    from fastcm.weights.model_folder import read_json, write_json

    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    (tmp_path / name).mkdir()
    write_json(tmp_path / name / "config.json", {"data": name, "letters": "é"})
    assert read_json(tmp_path / name / "config.json") == {"data": name, "letters": "é"}
    assert json.loads((tmp_path / name / "config.json").read_bytes())["data"] == name
    save_png(tmp_path / name / "x.png", Image.new("L", (8, 8)), text={"fastcm:model": name})
    assert Image.open(tmp_path / name / "x.png").text["fastcm:model"] == "caf\\udce9"
    with pytest.raises(TypeError):
        write_json(tmp_path / name / "y.json", {"x": object()})
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["config.json", "x.png"]


def test_weights_are_not_kept_where_no_library_finds_them(tmp_path, plan, capsys):
    """Said before anything is trained."""
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    code, _, told = plan("digits", "--out", tmp_path / name)
    assert code == 2 and "a path that is not UTF-8 in --out: " in told and not (tmp_path / name).exists()
    assert main(["sample", str(tmp_path / name)]) == 2 and "a path that is not UTF-8 in MODEL: " in capsys.readouterr().err
