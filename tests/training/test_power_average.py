"""Power-function averages: the profile they follow, and widths made afterwards from stored snapshots."""

import json

import numpy as np
import pytest
import torch
from training_runs import recorded_losses, small_run, stop_after

import fastcm
from fastcm import cli
from fastcm.errors import InputError
from fastcm.training.power_average import combination, gamma_of, power_decay
from fastcm.training.snapshots import reconstruct, snapshot_steps
from fastcm.training.trainer import Trainer

STEP = 0.016  # kimg of a step of `small_run`
STORED = {"optimizer.ema_widths": [0.05, 0.1], "optimizer.snapshot_every_kimg": STEP, "lr": 1e-3}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run of 40 steps with a snapshot after each."""
    out = tmp_path_factory.mktemp("runs") / "stored"
    small_run(out, kimg=40 * STEP, **STORED)
    return out


def weights(folder):
    return fastcm.load(folder).denoiser.network.state_dict()


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_weights_of_the_steps_are_the_profile_and_its_width(width):
    steps, shares = 3000, np.zeros(3000)
    for step in range(1, steps + 1):
        decay = power_decay(width, step)
        shares *= decay
        shares[step - 1] = 1 - decay
    edges = np.linspace(0, 1, steps + 1)
    assert np.allclose(shares, np.diff(edges ** (gamma_of(width) + 1)), rtol=1e-9, atol=1e-15) and abs(shares.sum() - 1) < 1e-12
    middle = (edges[1:] + edges[:-1]) / 2
    assert np.sqrt(shares @ (middle - shares @ middle) ** 2) == pytest.approx(width, rel=1e-3)


def test_published_pairs_of_width_and_gamma():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01) and gamma_of(0.1) == pytest.approx(6.94, abs=0.01)


def test_a_stored_average_is_its_own_combination_and_the_error_is_the_profiles_distance():
    steps, widths = np.repeat(np.arange(10, 101, 10), 2), np.tile([0.05, 0.1], 10)
    own, error = combination(steps, widths, step=100, width=0.1)
    assert np.allclose(own, np.eye(20)[19], atol=1e-6) and error < 1e-6
    shares, error = combination(steps, widths, step=100, width=0.13)
    t = (np.arange(200_000) + 0.5) / 200_000

    def profile(width, step):
        gamma, end = gamma_of(width), step / 100
        return np.where(t < end, (gamma + 1) * t**gamma / end ** (gamma + 1), 0)

    wanted = profile(0.13, 100)
    made = sum(share * profile(width, step) for share, width, step in zip(shares, widths, steps, strict=True))
    assert error == pytest.approx(np.linalg.norm(made - wanted) / np.linalg.norm(wanted), rel=1e-3) and 1e-3 < error < 0.03


@pytest.mark.slow
def test_a_reconstructed_average_is_the_one_trained_directly(stored, tmp_path):
    widths = [0.075, 0.085]
    small_run(tmp_path / "direct", kimg=40 * STEP, **{"optimizer.ema_halflife_kimg": [], "optimizer.ema_widths": widths, "lr": 1e-3})
    stored_one = weights(stored / "model-ema-width-0.05")
    for width, name in zip(widths, ("model", "model-ema-width-0.085"), strict=True):
        facts = reconstruct(stored, width, tmp_path / f"made-{width}")
        assert facts["least_squares_error"] < 1e-3 and facts["snapshots"] == 40 and facts["nimg"] == 640
        made, direct = weights(tmp_path / f"made-{width}"), weights(tmp_path / "direct" / name)
        assert max((made[key] - direct[key]).abs().max() for key in direct) < 1e-5
        assert max((stored_one[key] - direct[key]).abs().max() for key in direct) > 3e-5
        training = fastcm.load(tmp_path / f"made-{width}").info["training"]
        assert training["ema_width"] == width and "ema_halflife_kimg" not in training and training["method"] == "ict"


@pytest.mark.slow
def test_a_width_that_was_stored_comes_back_as_its_model(stored, tmp_path):
    reconstruct(stored, 0.1, tmp_path / "made")
    made, own = weights(tmp_path / "made"), weights(stored / "model-ema-width-0.1")
    assert all(torch.allclose(made[name], own[name], atol=1e-6) for name in own)
    assert fastcm.load(stored / "model-ema-width-0.1").info["training"]["ema_width"] == 0.1


@pytest.mark.slow
def test_a_resumed_run_stores_the_same_bytes(stored, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, recorded_losses():
        patched.setattr(Trainer, "train_step", stop_after(17))
        small_run(tmp_path / "run", kimg=40 * STEP, **STORED)
    assert snapshot_steps(tmp_path / "run" / "snapshots") == list(range(1, 18))
    (tmp_path / "run" / "snapshots" / "step-000000030.safetensors").write_bytes(b"of a future that is taken again")
    small_run(tmp_path / "run", kimg=40 * STEP, **STORED)
    for step in range(1, 41):
        name = f"snapshots/step-{step:09d}.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (stored / name).read_bytes(), step


@pytest.mark.slow
def test_the_command_says_the_error_and_refuses_in_one_line(stored, tmp_path, capsys):
    assert cli.main(["average", str(stored), "--width", "0.07", "--out", str(tmp_path / "made")]) == 0
    assert "the average of width 0.07 at 0.64 kimg, from 40 snapshots; least-squares error" in capsys.readouterr().out
    small_run(tmp_path / "plain", kimg=2 * STEP)
    capsys.readouterr()
    refused = {
        "least-squares error 35.0%, 5% at most). Give 0.02 to 0.26.": [stored, "--width", "0.005"],
        "illegal value in --width: 0.3": [stored, "--width", "0.3"],
        "no snapshots of averages in RUN": [tmp_path / "plain", "--width", "0.05"],
        "no run in RUN": [tmp_path, "--width", "0.05"],
    }
    for message, words in refused.items():
        assert cli.main(["average", *map(str, words), "--out", str(tmp_path / "none")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "none").exists()
    assert cli.main(["average", str(stored), "--width", "0.07", "--out", str(tmp_path / "made")]) == 2
    assert "--out exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_snapshot_is_named(stored, tmp_path):
    (tmp_path / "snapshots").mkdir()
    for name in ("config.json", "model"):
        (tmp_path / name).symlink_to(stored / name)
    for step in snapshot_steps(stored / "snapshots"):
        name = f"snapshots/step-{step:09d}.safetensors"
        (tmp_path / name).write_bytes((stored / name).read_bytes()[: 1000 if step == 3 else None])
    with pytest.raises(InputError, match=r"unreadable snapshot: .*step-000000003\.safetensors"):
        reconstruct(tmp_path, 0.07, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_settings_and_disk(tmp_path, capsys):
    words = ["train", "digits", "--out", str(tmp_path / "run"), "--dry-run", "--set", "optimizer.snapshot_every_kimg=10"]
    assert cli.main(words) == 2
    assert "nothing to store in optimizer.snapshot_every_kimg: 10" in capsys.readouterr().err
    assert cli.main([*words, "--set", "optimizer.ema_widths=0.05,0.1", "--duration", "500kimg"]) == 0
    out = capsys.readouterr().out
    assert "disk     50 snapshots of 0.00341 GB, 0.171 GB in all" in out
    settings = json.loads(out[out.index("\n{") :])
    assert settings["optimizer"]["ema_widths"] == [0.05, 0.1]
