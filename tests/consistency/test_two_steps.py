"""The evidence of the search: after a short training of the real digits two searched steps beat one, on seeds the search never saw."""

import json

import pytest

from fastcm import cli, runs


@pytest.mark.long
def test_two_searched_steps_beat_one_on_digits(tmp_path):
    out = tmp_path / "digits"
    changes = {"duration_kimg": 6.4, "device": "cpu", "precision": "fp32", "checkpoint_every_s": 1e9}
    runs.start(runs.plan("digits", out=out, changes=changes))
    options = ["--data", "digits", "--seeds", "500000-500898", "--metrics", "fid", "--search-steps", "2", "--save"]
    assert cli.main(["evaluate", str(out), *options, "--json", str(tmp_path / "r.json"), "--report", str(tmp_path / "page")]) == 0
    one, two = json.loads((tmp_path / "r.json").read_text())["sets"]
    assert (one["nfe"], two["nfe"]) == (1, 2)
    assert two["fid"]["mean"] + two["fid"]["std"] < one["fid"]["mean"] - one["fid"]["std"]
    assert json.loads((out / "model" / "config.json").read_text())["sampling"]["2"][0] == 80.0
    assert "by network calls" in (tmp_path / "page" / "index.html").read_text()
