"""The first quarter of an hour on a GPU: stages within their time, rows at once, going on, nothing twice."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fastcm.benchmarks.first_hour import stages
from fastcm.benchmarks.first_hour.stages import Command, Stage, run_stage
from fastcm.benchmarks.results_file import ResultsFile
from fastcm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(tmp_path):
    return ResultsFile(tmp_path / "stages.json", identity=stages.IDENTITY)


def run(stage, results, seconds=60.0):
    return list(run_stage(stage, results, stages.environment(dry=False), time.monotonic() + seconds, 1))


def python(name, text):
    return Command(name, ["-c", text])


def test_commands_are_done_once_and_told_at_once(results, tmp_path, capsys):
    marks = tmp_path / "marks"
    note = f"open({str(marks)!r}, 'a').write('x'); print('one'); print('two')"
    stage = Stage("try", 60, [python("good", note), python("bad", note + "; raise SystemExit(3)")])
    good, bad = run(stage, results)
    assert (good["outcome"], good["last"], good["seconds"] >= 0) == ("passed", "two", True)
    assert (bad["outcome"], bad["code"], bad["output"]) == ("failed", 3, ["one", "two"])
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in told] == [["try", "good", "passed"], ["try", "bad", "failed"]]
    again = ResultsFile(results.path, identity=stages.IDENTITY)
    assert run(stage, again) == [good, bad] and marks.read_text() == "xx" and capsys.readouterr().out == ""


def test_what_runs_out_of_time_goes_on_in_the_next_call(results, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LEAST_S", 0.5)
    slow = f"import os, time\nif not os.path.exists({str(tmp_path / 'warm')!r}): open({str(tmp_path / 'warm')!r}, 'w'); time.sleep(99)"
    stage = Stage("try", 2, [python("slow", slow), python("after", "")])
    began = time.monotonic()
    cut, later = run(stage, results)
    assert time.monotonic() - began < 30 and cut["outcome"] == "out of time" and later["outcome"] == "not started"
    assert [row["command"] for row in json.loads(results.path.read_text())["rows"]] == ["slow"]
    assert stages.summary([cut, later]) == ["1 out of time, 1 not started", "The same command goes on where this one stopped."]
    again = run(Stage("try", 60, stage.commands), ResultsFile(results.path, identity=stages.IDENTITY))
    assert [row["outcome"] for row in again] == ["passed", "passed"]


def test_the_plan(tmp_path):
    planned = stages.planned(tmp_path, dry=False)
    assert [stage.name for stage in planned] == ["start", "tests", "kernels", "latency", "train"]
    assert sum(stage.seconds for stage in planned) == stages.ALL_SECONDS == 720
    words = {stage.name: " ".join(word for command in stage.commands for word in command.arguments) for stage in planned}
    assert "--once" in words["kernels"] and "--batch 1 " in words["latency"] and "imagenet64" in words["latency"] + words["train"]
    assert all((ROOT / path).exists() for _, files in stages.TESTS for path in files.split())
    rehearsed = [command.arguments[1] for stage in stages.planned(tmp_path, dry=True) for command in stage.commands]
    assert set(rehearsed) == {"rehearsal", "pytest"}
    assert stages.environment(dry=True)["PYTHONPATH"].split(":")[0] == str(ROOT / "tests" / "pretend_cuda")


def test_the_auto_table_is_written_from_the_rows(tmp_path):
    row = {"bench": "kernels", "op": "perturb", "variant": "", "shape": [2, 3], "regime": "resident"}
    rows = [row | {"backend": backend, "p50_ms": ms} for backend, ms in (("eager", 3.0), ("compile", 2.0), ("fastcm", 1.0))]
    (tmp_path / "kernels.json").write_text(json.dumps({"machine": {}, "rows": rows}))
    stages.write_auto_table(tmp_path)
    assert json.loads((tmp_path / "auto-table.json").read_text()) == {"perturb": [[6, True]]}


def test_options_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device for STAGE=all.*ARGS=--dry"):
        stages.main(["--out", str(tmp_path)])
    with pytest.raises(InputError, match="unknown stage in --only: kernel. .*Did you mean 'kernels'"):
        stages.main(["--out", str(tmp_path), "--dry", "--only", "kernel"])
    monkeypatch.setattr(stages, "PRETENDED", tmp_path / "none")
    with pytest.raises(InputError, match="no pretended device for --dry"):
        stages.main(["--out", str(tmp_path), "--dry"])


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("STAGE=all ARGS=--dry OUT=x", '-m fastcm.benchmarks.first_hour.stages --out "${OUT:-benchmarks/results}/rehearsal" --dry'),
        ("STAGE=all", '-m fastcm.benchmarks.first_hour.stages --out "${OUT:-benchmarks/results}/gpu"'),
        ("STAGE=test ARGS=-x", "-m pytest -m gpu -p no:cacheprovider -x"),
        ("STAGE=train ARGS=--quick", '-m fastcm bench train --json "${OUT:-benchmarks/results}/train.json" --quick'),
    ],
)
def test_make_gpu_keeps_what_is_on_the_path(words, command):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}  # tests run under make themselves
    made = subprocess.run(["make", "-n", "gpu", *words.split()], cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    lines = made.stdout.splitlines()
    assert lines[-1].rstrip().endswith(command) and '/build/layout${PYTHONPATH:+:$PYTHONPATH}"' in lines[-1]
