"""Settings from a file mean what options and --set mean; what is written wrong is named."""

import json

import pytest

from fastcm import cli, runs
from fastcm.errors import InputError
from fastcm.training.config_file import read_config_file

TOML = """
preset = "digits"
method = "ct"
lr = 1e-3
batch = 32
"network.channels" = 32
[objective]
s1 = 20
[optimizer]
betas = [0.9, 0.98]
"""
CHANGES = {"lr": 1e-3, "batch": 32, "network.channels": 32, "objective.s1": 20, "optimizer.betas": (0.9, 0.98)}


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_file_options_and_set_mean_the_same(tmp_path):
    file = write(tmp_path, "run.toml", TOML)
    by_file = runs.plan(config_file=file, changes={"network.head_channels": 32}).config
    by_changes = runs.plan("digits", method="ct", changes={**CHANGES, "network.head_channels": 32}).config
    assert by_file == by_changes and by_file.objective.s1 == 20
    as_json = write(tmp_path, "run.json", json.dumps({"preset": "digits", "method": "ct", **{k: v for k, v in CHANGES.items()}}))
    assert runs.plan(config_file=as_json, changes={"network.head_channels": 32}).config == by_changes


def test_options_override_the_file(tmp_path):
    file = write(tmp_path, "run.toml", 'preset = "digits"\nmethod = "ct"\nbatch = 32\nseed = 3\n')
    config = runs.plan(config_file=file, method="ict", changes={"batch": 16}).config
    assert (config.method, config.batch, config.seed) == ("ict", 16, 3)


def test_a_runs_own_config_repeats_it(tmp_path):
    from training_runs import small_run

    small_run(tmp_path / "run", method="edm", kimg=0.032)
    again = runs.plan(config_file=tmp_path / "run" / "config.json", out=tmp_path / "again").config
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert all(written[name] == value for name, value in again.as_dict().items())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "lr = = 3", "broken file in --config"),
        ("a.json", "[1]", "list at the top"),
        ("a.json", '{"network": {"chanels": 3}}', "Did you mean 'network.channels'"),
        ("a.toml", "duratio = 3", "unknown setting in --config: duratio"),
        ("a.toml", 'preset = "digit"', "Did you mean 'digits'"),
    ],
)
def test_mistakes_are_named(tmp_path, name, text, words):
    with pytest.raises(InputError) as caught:
        runs.plan(config_file=write(tmp_path, name, text))
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="unreadable file in --config"):
        read_config_file(tmp_path / "none.toml")


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_creates_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, "run.toml", TOML.replace("32", "24"))
    assert cli.main(["train", "--config", str(file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "426,865 parameters" in out and '"s1": 20' in out and "radam 0.001" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("     ") and "kimg" not in line and "," not in line]
    assert [row[2] for row in rows[:9]][0] == "2" and [row[2] for row in rows[:9]][-1] == "21"
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


def test_a_plan_to_look_at_needs_no_teacher():
    assert runs.plan("digits", method="scd", complete=False).config.method == "scd"
    with pytest.raises(InputError, match="--teacher"):
        runs.plan("digits", method="scd")
