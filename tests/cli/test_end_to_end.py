"""The README's commands, one after the other, in an empty folder: the first as a stranger runs it, in a process of its own."""

import contextlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastcm import cli

pytestmark = pytest.mark.slow

SMALL = ("--set", "network.channels=8", "--set", "network.head_channels=8", "--batch", "32", "--device", "cpu", "--precision", "fp32")


def fastcm(folder, *arguments, code=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = cli.main(arguments)
    assert found == code, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An empty folder in which `fastcm train` has run for forty steps."""
    folder = tmp_path_factory.mktemp("stranger")
    command = [sys.executable, "-m", "fastcm", "train", "digits", "--duration", "1280img", *SMALL]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_train_sample_evaluate_export_and_sample_again(trained):
    fastcm(trained, "sample", "runs/digits", "--seeds", "0-9", "--labels", "0,1,2,3,4,5,6,7,8,9", "--out", "torch.npz")
    evaluated = fastcm(trained, "evaluate", "runs/digits", "--data", "digits", "--seeds", "100000-100449", "--json", "evaluation.json")
    assert "accuracy" in evaluated.stdout and json.loads((trained / "evaluation.json").read_text())
    exported = fastcm(trained, "export", "runs/digits", "--onnx", "digits.onnx")
    assert "digits.onnx" in exported.stdout
    fastcm(trained, "sample", "digits.onnx", "--seeds", "0-9", "--labels", "0,1,2,3,4,5,6,7,8,9", "--out", "onnx.npz")
    a, b = (np.load(trained / f"{name}.npz") for name in ("torch", "onnx"))
    assert a["arr_0"].shape == (10, 8, 8, 1) and a["arr_0"].std() > 5 and a["arr_1"].tolist() == list(range(10))
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"].astype(int)).max() <= 1
    assert [p.name for p in trained.rglob("*.onnx")] == ["digits.onnx"]


def test_the_same_command_goes_on_and_other_settings_are_refused(trained):
    again = fastcm(trained, "train", "digits", "--duration", "1600img", *SMALL)
    assert "resumed at 1.28 of 1.6 kimg" in again.stderr
    refused = fastcm(trained, "train", "digits", "--duration", "1600img", *SMALL, "--seed", "5", code=2)
    assert refused.stderr.startswith("fastcm: error: ") and "seed: 0 -> 5" in refused.stderr and refused.stderr.count("\n") == 1


def test_info_names_the_run(trained):
    told = fastcm(trained, "info", "runs/digits").stdout
    assert "80" in told and "10" in told and "adm" in told


def test_distillation_from_a_trained_teacher(trained):
    fastcm(trained, "train", "digits", "--method", "edm", "--duration", "320img", *SMALL)
    fastcm(trained, "train", "digits", "--method", "cd", "--teacher", "runs/digits-edm", "--duration", "320img", *SMALL)
    fastcm(trained, "sample", "runs/digits-cd", "--steps", "2", "--out", "cd.png")
    assert Image.open(trained / "cd.png").size[0] > 64


def test_a_folder_and_an_npz_train(trained):
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (trained / "pictures" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(trained / "pictures" / name / f"{i}.png")
    small = ("--duration", "16img", "--batch", "4", *SMALL[:4], "--precision", "fp32")
    told = fastcm(trained, "train", "--data", "pictures", "--out", "from-folder", *small).stdout
    assert "3x16x16, 2 classes" in told
    np.savez(trained / "grey.npz", arr_0=rng.integers(0, 256, (10, 8, 8, 1), dtype=np.uint8))
    fastcm(trained, "train", "--data", "grey.npz", "--out", "from-npz", *small)
    fastcm(trained, "sample", "from-npz", "--seeds", "0-3", "--out", "npz-samples")
    assert len(list((trained / "npz-samples").glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "digist"), "Did you mean 'digits'"),
        (("train", "--lrr", "1"), "Did you mean '--lr'"),
        (("train", "--method", "ictt"), "Did you mean 'ict'"),
        (("train", "--data", "nowhere"), "nowhere"),
        (("train", "--lr", "nan"), "--lr"),
        (("train", "--batch", "0"), "--batch"),
        (("train", "--set", "noise.sigma_min=90"), "noise.sigma_min"),
        (("train", "--duration", "soon"), "soon"),
        (("sample", "nowhere"), "nowhere"),
        (("export", "nowhere", "--onnx"), "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(tmp_path, arguments, words):
    done = fastcm(tmp_path, *arguments, code=2)
    assert done.stderr.startswith("fastcm: error: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
