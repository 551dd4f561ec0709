"""The comparison of methods: what a row holds, what the table says of it, and that a verdict follows from the rows."""

import json

import pytest

from fastcm.benchmarks.quality import methods as bench_methods

MACHINE = {"cores": 2, "processor": "P", "torch": "2", "date": "2026-01-01", "commit": "c", "gpu": None}


def row(cell, seed, fd, *, steps=1, accuracy=0.9):
    return {
        "bench": "methods",
        "cell": cell,
        "seed": seed,
        "steps": steps,
        "kimg": 15.0,
        "calls": 4,
        "train_s": 80.0,
        "accuracy": accuracy,
        "fd_mean": fd,
        "fd_ratio": fd / 10,
        "self_consistency": 0.1,
    }


def test_verdicts_follow_from_the_rows():
    rows = [row("cd, Heun", s, 10 + s) for s in range(3)] + [row("ct, adaptive N and mu", s, 20 + s) for s in range(3)]
    rows += [row("cd, Euler", s, 9 + 2 * s) for s in range(3)] + [row("ict", s, 40 + s) for s in range(3)]
    verdicts = {line.partition(":")[0]: line for line in bench_methods.orderings(rows)}
    assert "**shown**" in verdicts["- distillation from a good teacher beats training from data"]
    assert "**not told apart here**" in verdicts["- Heun beats Euler"]
    assert "**reversed here** (Fréchet 41.0 against 21.0)" in verdicts["- iCT beats CT"]
    assert len(verdicts) == 3, "an ordering without rows has no verdict"


def test_the_table_gives_mean_and_deviation_over_seeds(tmp_path, monkeypatch):
    rows = [row("ict", s, fd, accuracy=a) for s, fd, a in ((0, 10, 0.9), (1, 12, 0.92), (2, 14, 0.94))] + [row("ict", 0, 8, steps=2)]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- methods -->\nold\n<!-- methods -->\nb\n")
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": rows, "machine": MACHINE}))
    monkeypatch.setattr(bench_methods, "DOCS", page)
    assert bench_methods.main(["--docs", str(file)]) == 0
    text = page.read_text()
    assert "| ict | 15 kimg | 4 | 92.0% ± 2.0% | 1.20 ± 0.20 | 90.0% | 0.80 | 0.100 ± 0.000 |" in text and "old" not in text
    assert text.startswith("a\n") and text.endswith("b\n") and "slowest run 80 s" in text


@pytest.mark.slow
def test_a_cell_is_trained_measured_and_not_run_again(tmp_path, monkeypatch):
    file, runs = tmp_path / "m.json", tmp_path / "runs"
    arguments = ["--json", str(file), "--runs", str(runs), "--budget", "0.256", "--teacher-kimg", "0.064", "--seeds", "0", "--only", "ect"]
    assert bench_methods.main(arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(r["cell"], r["steps"], r["kimg"]) for r in rows] == [("ect", 1, 0.128), ("ect", 2, 0.128)]
    assert all(r["fd_mean"] > 0 and 0 <= r["accuracy"] <= 1 and r["self_consistency"] > 0 for r in rows)
    assert "--init" in rows[0]["command"]
    monkeypatch.setattr(bench_methods, "call", lambda *a, **k: pytest.fail("run again"))
    assert bench_methods.main(arguments) == 0
