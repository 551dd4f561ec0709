"""The data benchmark: both competitors decode the same pictures, and the rows say what they mean."""

import json

import pytest

from fastcm.benchmarks.training import data as bench_data
from fastcm.benchmarks.training.data import Kind
from fastcm.data import image_cache


@pytest.mark.slow
def test_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data, "KINDS", {"tiny": Kind(40, (20, 12), "png", 8)})
    monkeypatch.setattr(image_cache, "WATCHED_FILES", 100)
    path = tmp_path / "data.json"
    assert bench_data.main(["--op", "decode,open,wait", "--quick", "--seconds", "0", "--batch", "4", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    expected = [("decode", "pillow"), ("decode", "fastcm"), ("open", "fastcm"), ("wait", "fastcm")]
    assert [(row["op"], row["backend"]) for row in rows] == expected
    pillow, ours, opened, wait = rows
    assert pillow["count"] == ours["count"] == 4 and pillow["percent_of_pillow"] == 100 and pillow["rounds"] == ours["rounds"] == 3
    assert ours["percent_of_pillow"] == pytest.approx(100 * ours["images_per_s"] / pillow["images_per_s"], rel=0.01)
    assert opened["pictures"] == 100_000 and opened["p50_ms"] > 0 and 0 <= wait["percent_of_step"] <= 100 and wait["steps"] >= 3
