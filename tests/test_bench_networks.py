"""The network benchmark writes the rows of the contract."""

import json

from fastcm.benchmarks import bench_networks


def test_rows_and_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_networks.MODELS, "digits", {**bench_networks.MODELS["digits"], "channels": 8, "head_channels": 8})
    monkeypatch.setattr(bench_networks, "QUICK", ("digits",))
    monkeypatch.setattr(bench_networks, "in_turns", lambda calls, seconds: {name: [2.0, 1.0, 4.0, 3.0, 5.0] for name in calls})
    assert bench_networks.main(["--quick", "--batch", "2", "--json", str(tmp_path / "rows.json")]) == 0
    content = json.loads((tmp_path / "rows.json").read_text())
    assert {"processor", "torch", "commit", "date", "threads"} <= content["machine"].keys()
    assert [row["backend"] for row in content["rows"]] == ["fastcm", "diffusers"]
    for row in content["rows"]:
        assert (row["bench"], row["model"], row["batch"]) == ("forward", "digits", 2)
        assert (row["p20_ms"], row["p50_ms"], row["p99_ms"], row["images_per_s"], row["ratio_to_diffusers"]) == (
            2.0,
            3.0,
            5.0,
            2000 / 3,
            1.0,
        )
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_calls_take_turns():
    order = []
    times = bench_networks.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0)
    assert order == ["a", "b"] * 5 and len(times["a"]) == 5
