"""The distillation of a diffusers DDPM: the commands are ones that fastcm has, and a report becomes the rows of the page."""

import json
import shlex

from fastcm import cli
from fastcm.benchmarks.pages.between_marks import TABLES
from fastcm.benchmarks.quality import teachers
from fastcm.cli.train import changes


def test_the_commands_are_fastcms_own_and_the_report_becomes_rows(tmp_path, monkeypatch):
    commands = []

    def call(command):
        words = shlex.split(command)
        args = cli.build_parser(words[1]).parse_args(words[1:])
        commands.append(args)
        if words[1] == "evaluate":
            measured = {"mean": 2.0, "std": 0.5, "ratio": 1.5}
            steps = args.steps
            sets = [
                {"name": f"{n} steps", "nfe": n, "count": 7, "fd": measured, "precision": {"mean": 0.9}, "recall": {"mean": 0.8}}
                for n in steps
            ]
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"sets": sets}))

    monkeypatch.setattr(teachers, "call", call)
    monkeypatch.setattr(teachers.ddpm, "main", lambda argv: commands.append(argv))
    monkeypatch.chdir(tmp_path)
    assert teachers.main(["--json", str(tmp_path / "teachers.json")]) == 0
    assert commands[0] == ["runs/mnist-ddpm", "--data", "mnist"]
    trained = {args.method: args for args in commands[1:] if args.command == "train"}
    assert trained["cd"].teacher == "runs/mnist-ddpm" == trained["ect"].init
    assert changes(trained["cd"])["objective.loss_weight"] == "1/gap"
    rows = json.loads((tmp_path / "teachers.json").read_text())["rows"]
    assert [(row["model"], row["nfe"]) for row in rows] == [
        ("DDPM by diffusers", 50),
        ("cd of it", 1),
        ("cd of it", 2),
        ("ect of it", 1),
        ("ect of it", 2),
    ]
    assert [cell(rows[0]) for cell in TABLES["teachers"].columns.values()][3:] == ["2.00 ± 0.50", "1.50", "0.90", "0.80"]
