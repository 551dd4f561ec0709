"""A run is known by its pictures, weights and arithmetic, not by how they were named; what makes another run of it is refused by option."""

import json
import shutil

import numpy as np
import pytest
import torch
from training_runs import SMALL

from fastcm import runs
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.training.resumed_settings import check_resumed, fingerprint, settings
from fastcm.training.run import build_network

PICTURES = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
LABELS = np.arange(24) % 3


def train(out, data, *, kimg=0.032, **options):
    return runs.start(runs.plan(data=data, out=out, changes={**SMALL, "duration_kimg": kimg, **options}))


def save(path, pictures=PICTURES, labels=LABELS):
    path.parent.mkdir(exist_ok=True)
    np.savez(path, arr_0=pictures, arr_1=labels)
    return path


@pytest.mark.slow
def test_data_elsewhere_and_settings_spelt_otherwise_are_the_same_run(tmp_path, monkeypatch, capsys):
    out, first = tmp_path / "run", save(tmp_path / "a" / "x.npz")
    train(out, str(first), kimg=0.016)
    monkeypatch.chdir(tmp_path)
    other = shutil.move(first, tmp_path / "y.npz")
    same = {"device": "auto", "network.dropout": 0, "network.checkpoint": False, "compile": "auto", "bad_images": "skip"}
    assert train(out, "y.npz", **same).nimg == 32
    assert json.loads((out / "config.json").read_text())["data"] == "y.npz" and other.is_file()
    assert "resumed at 0.016" in capsys.readouterr().err


def described(data, *, precision="fp32", device="cpu", weights=None, **changes):
    """What config.json holds of the run that a plan describes."""
    ready = runs.plan(data=data, changes={**SMALL, **changes})
    given = {name: denoiser_of(value) for name, value in (weights or {}).items()}
    network = build_network(ready.config)
    return settings(ready.config, ready.dataset, network, precision=precision, device=device, weights=given)


def denoiser_of(value):
    """A denoiser of one weight."""
    network = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(network.weight, value)
    torch.nn.init.zeros_(network.bias)
    return Denoiser(network, Preconditioning())


def refused(old, new) -> str:
    with pytest.raises(InputError) as error:
        check_resumed(old, new, "runs/x")
    assert "\n" not in str(error.value)
    return str(error.value)


DATA = (PICTURES, LABELS)


def test_the_same_run_in_other_words(tmp_path):
    first, other = (str(save(tmp_path / name / "x.npz")) for name in "ab")
    same = {"network.dropout": 0, "network.checkpoint": False, "compile": "auto", "bad_images": "skip"}
    assert check_resumed(described(first), described(other, **same), "x") == []


def test_other_pictures_are_named_as_data():
    message = refused(described(DATA), described((PICTURES[:20], LABELS[:20])))
    assert "--data: array (24 -> 20 pictures" in message


def test_another_precision_names_the_option_that_goes_on():
    began = described(DATA, precision="bf16", device="cuda")
    assert "Add --precision bf16" in refused(began, described(DATA))
    asked = {**described(DATA, precision="bf16"), "precision": "bf16"}
    assert check_resumed(began, asked, "x") == ["resumed on cpu, not cuda: sums differ in the last bits"]


def test_weights_are_compared_by_what_they_are():
    old = described(DATA, weights={"teacher": 1.0, "init": 2.0})
    assert check_resumed(old, {**described(DATA, weights={"teacher": 1.0, "init": 2.0}), "teacher": "elsewhere"}, "x") == []
    for name, weights in (("--teacher", {"teacher": 3.0, "init": 2.0}), ("--init", {"teacher": 1.0})):
        assert f"other weights than the run's in {name}" in refused(old, described(DATA, weights=weights))
    assert "weights" in refused(described(DATA), old)
    assert fingerprint(denoiser_of(1.0)) != fingerprint(Denoiser(denoiser_of(1.0).network, Preconditioning(sigma_max=40.0)))


def test_a_change_of_settings_is_still_refused():
    old = described(DATA)
    assert "seed: 0 -> 1" in refused(old, described(DATA, seed=1))
    assert "network.dropout: 0.0 -> 0.1" in refused(old, described(DATA, **{"network.dropout": 0.1}))
    assert "optimizer.ema_rampup: 0.1 -> None" in refused(old, described(DATA, **{"optimizer.ema_rampup": None}))
    assert "may grow, not shrink" in refused(old, described(DATA, duration_kimg=1.0))
