"""The network benchmark writes the rows of the contract."""

import dataclasses
import json

import numpy as np
import pytest

from fastcm.benchmarks.latency import networks as bench_networks
from fastcm.errors import InputError
from fastcm.weights import diffusers as diffusers_weights


@pytest.mark.slow
def test_rows_and_file(tmp_path, monkeypatch, capsys):
    """The real networks, shrunk, give the same outputs; the figures are those of times that are known."""
    digits = bench_networks.ADM["digits"]
    small = dataclasses.replace(digits, options={**digits.options, "channels": 8, "head_channels": 8})
    monkeypatch.setitem(bench_networks.ADM, "digits", small)
    monkeypatch.setattr(bench_networks, "QUICK", ("digits",))
    milliseconds = {"fastcm": [2.0, 1.0, 4.0, 3.0, 5.0], "diffusers": [4.0, 2.0, 12.0, 9.0, 5.0], "diffusers_channels_last": [2.0] * 5}
    monkeypatch.setattr(bench_networks, "rounds", lambda calls, limits: {name: np.array(milliseconds[name]) for name in calls})
    assert bench_networks.main(["--quick", "--batch", "2", "--json", str(tmp_path / "rows.json")]) == 0
    content = json.loads((tmp_path / "rows.json").read_text())
    assert {"processor", "torch", "diffusers", "commit", "date", "threads"} <= content["machine"].keys()
    rows = {row["backend"]: row for row in content["rows"]}
    assert set(rows) == set(milliseconds)
    assert all((row["bench"], row["model"], row["batch"]) == ("forward", "digits", 2) for row in rows.values())
    found = {name: rows["fastcm"][name] for name in ("p50_ms", "images_per_s", "speedup_over_diffusers", "rounds")}
    assert found == {"p50_ms": 3.0, "images_per_s": 666.7, "speedup_over_diffusers": 2.0, "rounds": 5}
    assert rows["diffusers"]["speedup_over_diffusers"] == 1.0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert bench_networks.main(["--quick", "--batch", "2", "--json", str(tmp_path / "rows.json")]) == 0
    assert capsys.readouterr().out == ""  # what the file holds is not measured again
    monkeypatch.setattr(bench_networks, "rounds", lambda calls, limits: {name: np.ones(5) for name in calls})
    assert bench_networks.main(["--quick", "--batch", "1", "--backend", "fastcm"]) == 0
    assert [json.loads(line)["backend"] for line in capsys.readouterr().out.splitlines()] == ["fastcm", "diffusers"]


@pytest.mark.slow
def test_other_outputs_are_not_timed(monkeypatch):
    monkeypatch.setattr(bench_networks, "rounds", lambda calls, limits: pytest.fail("timed"))
    to_state = diffusers_weights.to_state
    monkeypatch.setattr(diffusers_weights, "to_state", lambda network: {name: 1.01 * value for name, value in to_state(network).items()})
    with pytest.raises(RuntimeError, match="outputs differ by .* in digits"):
        bench_networks.main(["--model", "digits", "--batch", "1"])


def test_another_device_is_refused():
    with pytest.raises(InputError, match="a comparison of CPUs in --device: cuda"):
        bench_networks.main(["--device", "cuda"])
