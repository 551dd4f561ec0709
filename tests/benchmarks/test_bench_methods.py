"""The comparison of methods: what a row holds, what the table says of it, and that a verdict follows from the rows."""

import json
import shlex

import pytest

from fastcm import cli
from fastcm.benchmarks.quality import methods as bench_methods

MACHINE = {"cores": 2, "processor": "P", "torch": "2", "date": "2026-01-01", "commit": "c", "gpu": None}


def row(cell, seed, fd, *, steps=1, accuracy=0.9, preset=None):
    return {
        "bench": "methods",
        **({} if preset is None else {"preset": preset}),
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
    assert text.startswith("a\n") and text.endswith("b\n") and "Slowest run 80 s" in text and "### digits" in text


def test_tables_of_several_files_have_a_part_per_data_set():
    """A cell is the last file's that has it; files from before there were presets are of digits; a first stage is said first."""
    old = [row("ict", 0, 10), row("ect", 0, 20), row("of the future", 0, 30)]
    tcm = {**row("tcm, from ect", 0, 15), "preset": "digits", "first_kimg": 10.0, "first_calls": 2, "kimg": 20 / 3, "calls": 3}
    new = [tcm, row("ict", 0, 40, preset="digits"), row("ect", 0, 50, preset="mnist")]
    text = bench_methods.tables([{"rows": old, "machine": MACHINE}, {"rows": new, "machine": {**MACHINE, "processor": "Q"}}])
    digits, mnist = text[text.index("### digits") :].split("### mnist")
    assert [line.split(" | ")[0] for line in digits.splitlines() if line.endswith("0.100 |")] == [
        "| ict",
        "| ect",
        "| tcm, from ect",
        "| of the future",
    ]
    assert "| ict | 15 kimg | 4 | 90.0% | 4.00 |" in digits and "| tcm, from ect | 10 and 6.67 kimg | 2 and 3 |" in digits
    assert "| ect | 15 kimg | 4 | 90.0% | 5.00 |" in mnist and "of P" in mnist and "of Q" in mnist


def test_a_second_stage_follows_its_first_within_one_budget(tmp_path, monkeypatch):
    """Half of the network calls each; teachers that are trained otherwise lie in folders of their own."""
    calls = []
    monkeypatch.setattr(bench_methods, "call", calls.append)
    (cell,) = [cell for cell in bench_methods.CELLS if cell.name == "tcm, from ect"]
    with pytest.raises(FileNotFoundError):  # of the evaluation that nobody wrote
        bench_methods.measure(cell, 3, "mnist", tmp_path, 24.0)
    first, second = (f"{tmp_path}/tcm-from-ect-{name}" for name in ("first-3", "3"))
    assert calls == [
        f"fastcm train mnist --method ect --init {tmp_path}/teacher --duration 6kimg --seed 3 --out {first}",
        f"fastcm train mnist --method tcm --init {first} --duration 4kimg --seed 3 --out {second}",
        f"fastcm evaluate {second} --data mnist --metrics accuracy,fd --json {second}/evaluation.json",
    ]


@pytest.mark.slow
def test_a_command_that_fails_ends_the_benchmark(tmp_path):
    bench_methods.call("fastcm --version")
    with pytest.raises(SystemExit, match="quality.methods: fastcm info .* ended with 2: fastcm: error: "):
        bench_methods.call(f"fastcm info {tmp_path / 'none'}")


@pytest.mark.slow
def test_a_cell_is_trained_measured_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_methods, "call", lambda command: cli.main(shlex.split(command)[1:]) and pytest.fail(command))
    file, runs = tmp_path / "m.json", tmp_path / "runs"
    arguments = ["--json", str(file), "--runs", str(runs), "--budget", "0.256", "--teacher-kimg", "0.064", "--seeds", "0", "--only", "ect"]
    assert bench_methods.main(arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(r["cell"], r["steps"], r["kimg"]) for r in rows] == [("ect", 1, 0.128), ("ect", 2, 0.128)]
    assert all(r["fd_mean"] > 0 and 0 <= r["accuracy"] <= 1 and r["self_consistency"] > 0 for r in rows)
    assert "--init" in rows[0]["command"]
    monkeypatch.setattr(bench_methods, "call", lambda *a, **k: pytest.fail("run again"))
    assert bench_methods.main(arguments) == 0
