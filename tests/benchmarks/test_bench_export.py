"""The benchmark of exports: a row has what the export really took, and a failure is a row that says why."""

import json
import subprocess

import pytest

from fastcm.benchmarks.latency import exports as bench_export


@pytest.mark.long
def test_a_row_says_what_the_export_took(tmp_path):
    out = tmp_path / "rows.json"
    assert bench_export.main(["--model", "digits", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["bench"] == "export" and row["model"] == "digits" and row["parameters"] == 426_865
    assert 0.001 < row["file_gb"] < 4 * row["parameters"] / 1e9  # the noise embedding is folded away
    assert row["peak_gb"] > 0.1 and row["seconds"] > 1
    assert 0 < row["max_error"] < 1e-4


def test_a_failure_is_told(tmp_path, monkeypatch):
    def failing(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: no room\n")

    monkeypatch.setattr(bench_export.subprocess, "run", failing)
    row = bench_export.measure("digits", "fp32")
    assert row["error"] == "MemoryError: no room" and "seconds" not in row
