"""Where a run's figures go: TensorBoard's files, wandb offline, an object of one's own; watching; train() as Python is written."""

import json
import time

import numpy as np
import pytest
from PIL import Image
from training_runs import SMALL, small_run

import fastcm
from fastcm import runs
from fastcm.cli import main
from fastcm.errors import InputError
from fastcm.training.run_logs import RunLogs, TensorBoard, Trackio, WandB, chosen_logs

FIGURES = {"loss", "grad_norm", "lr", "steps", "mu", "images_per_s"}


class Recorder:
    """A log of a user's own."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def _note(self, name, *values):
        self.calls.append((name, *values))
        if name == self.fails_at:
            raise ConnectionError("no\nroute")

    def begin(self, *, folder, config, nimg):
        self._note("begin", folder, config, nimg)

    def scalars(self, values, nimg):
        self._note("scalars", values, nimg)

    def picture(self, path, nimg):
        self._note("picture", path, nimg)

    def end(self):
        self._note("end")


@pytest.mark.slow
def test_a_log_of_ones_own(tmp_path, capsys):
    """begin once with the run's settings, figures at each line, each grid, the end; one that fails is left out and the run goes on."""
    whole, failing = Recorder(), Recorder(fails_at="scalars")
    options = {"duration": "0.064kimg", "out": tmp_path / "run", "log": [whole, failing, object()], "checkpoint_every": "1h"}
    fastcm.train("digits", network={"channels": 8, "head_channels": 8}, batch=16, device="cpu", precision="fp32", **options)
    names = [name for name, *_ in whole.calls]
    assert names[0] == "begin" and names[-1] == "end" and {"scalars", "picture"} <= set(names)
    assert whole.calls[0][1] == tmp_path / "run" and whole.calls[0][2]["network"]["channels"] == 8 and whole.calls[0][3] == 0
    figures = [(values, nimg) for name, *rest in whole.calls if name == "scalars" for values, nimg in [rest]]
    assert any(set(values) == FIGURES for values, _ in figures) and figures[-1][1] == 64
    [picture] = [path for name, *rest in whole.calls if name == "picture" for path in rest[:1]]
    assert picture == tmp_path / "run" / "samples" / "nimg-000000064.png" and picture.is_file()
    assert [name for name, *_ in failing.calls] == ["begin", "scalars"]
    assert "fastcm: Recorder failed at scalars (no route); the run goes on without it" in capsys.readouterr().err


@pytest.mark.slow
def test_tensorboard_has_figures_grids_and_settings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small_run(tmp_path / "run", kimg=0.032, drawn=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= FIGURES and tags["images"] == ["samples"] and events.Images("samples")[-1].step == 32
    assert b'"preset": "digits"' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    """A run in offline mode by the command's names; a resumed one keeps its id."""
    pytest.importorskip("wandb")
    places = {"WANDB_CACHE_DIR": tmp_path / "cache", "WANDB_CONFIG_DIR": tmp_path / "config"}
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **places}.items():
        monkeypatch.setenv(name, str(value))
    settings = [word for name, value in SMALL.items() if name.startswith("network.") for word in ("--set", f"{name}={json.dumps(value)}")]
    command = ["train", "digits", "--out", str(tmp_path / "run"), "--batch", "16", "--device", "cpu", "--log", "wandb", *settings]
    for duration in ("32img", "64img"):
        assert main([*command, "--duration", duration]) == 0
    written = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    identity = (tmp_path / "run" / "wandb" / "run-id.txt").read_text()
    assert len(written) == 2 and all(path.stem == f"run-{identity}" for path in written)
    ends = time.monotonic() + 30  # wandb's own process may still be writing
    while not all(b"images_per_s" in path.read_bytes() for path in written):
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/samples_*.png"))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_trackio_gets_its_calls(tmp_path, monkeypatch):
    """Trackio's interface, recorded by a module of its name."""
    import sys
    import types

    calls = []
    module = types.SimpleNamespace(Image=lambda path: ("image", path))
    for name in ("init", "log", "finish"):
        setattr(module, name, lambda *values, _name=name, **named: calls.append((_name, values, named)))
    monkeypatch.setitem(sys.modules, "trackio", module)
    logs = RunLogs([Trackio()])
    logs.begin(folder=tmp_path / "run", config={"seed": 1}, nimg=0)
    logs.scalars({"loss": 0.5}, 16)
    logs.picture(tmp_path / "x.png", 16)
    logs.end()
    assert calls == [
        ("init", (), {"project": "fastcm", "name": "run", "config": {"seed": 1}, "resume": "allow"}),
        ("log", ({"loss": 0.5, "nimg": 16},), {}),
        ("log", ({"samples": ("image", str(tmp_path / "x.png")), "nimg": 16},), {}),
        ("finish", (), {}),
    ]


def test_names_of_logs(monkeypatch, capsys, tmp_path):
    own = Recorder()
    assert [type(log) for log in chosen_logs("tensorboard")] == [TensorBoard] and chosen_logs("none") == [] and chosen_logs(own) == [own]
    assert [type(log) for log in chosen_logs(None)] == [TensorBoard]
    monkeypatch.setattr("fastcm.training.run_logs.find_spec", lambda name: None if name == "trackio" else object())
    assert [type(log) for log in chosen_logs("tensorboard, wandb")] == [TensorBoard, WandB]
    for value, message in (("trackio", "missing package for --log: trackio. pip install trackio."), ("wandbb", "Did you mean 'wandb'?")):
        assert main(["train", "digits", "--log", value, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


# Watching


def test_info_watch(tmp_path, capsys, monkeypatch):
    """A finished run is drawn once; one that trains, again until it ends."""
    from fastcm.cli import info_watch

    small_run(tmp_path / "run", kimg=0.032, drawn=True)
    assert main(["info", str(tmp_path / "run"), "--watch"]) == 0
    out = capsys.readouterr().out
    assert f"run      {tmp_path / 'run'} (finished)" in out and "0.032 of 0.032 kimg, 100.0%" in out
    assert "images/s, 0:00:00 left" in out and str(tmp_path / "run" / "samples" / "nimg-000000032.png") in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "duration_kimg": 10.0}))
    waits = []
    monkeypatch.setattr(info_watch.time, "sleep", lambda seconds: waits.append(seconds) or (tmp_path / "run" / ".lock").write_text(""))
    assert main(["info", str(tmp_path / "run"), "--watch"]) == 0
    out = capsys.readouterr().out
    assert waits == [info_watch.EVERY_S] and out.count("(trains)") == 1 and "stopped; the same train command resumes it" in out
    assert main(["info", "digits", "--watch"]) == 2
    assert "no run to watch in fastcm info --watch: digits" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00:00"), (59.6, "0:01:00"), (7384, "2:03:04")])
def test_durations(seconds, shown):
    from fastcm.cli.info_watch import duration

    assert duration(seconds) == shown


# Python as people write it


def test_python_takes_the_command_lines_names_and_dictionaries():
    """Nested dictionaries, options and dotted keys mean the same."""
    dotted = {"network.channels": 48, "objective.P_mean": 0.7, "optimizer.lr": 1e-3}
    expected = runs.plan("digits", changes={**dotted, "duration_kimg": 2000.0, "checkpoint_every_s": 600.0}).config
    sections = {"network": {"channels": 48}, "objective": {"P_mean": 0.7}}
    assert runs.plan("digits", changes={**sections, "lr": 1e-3, "duration": "2Mimg", "checkpoint_every": "10m"}).config == expected
    mixed = {"network": {"channels": 48}, "objective.P_mean": 0.7, "optimizer": {"lr": 1e-3}, "duration": 2000.0, "checkpoint_every": 600}
    assert runs.plan("digits", changes=mixed).config == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": {"chanels": 3}}, "unknown setting in fastcm.train: network.chanels. Did you mean 'network.channels'?"),
        ({"bach": 3}, "unknown setting in fastcm.train: bach. Did you mean 'batch'?"),
        ({"batch": -1}, "illegal value in batch: -1. Give a whole number of at least 1."),
        ({"objective": {"solver": "heun"}}, "unused setting in fastcm.train: objective.solver."),
        ({"duration": "two"}, "not a number of images: two."),
        ({"method": "cd"}, "missing option for method cd: teacher."),
        ({"log": "wandbb"}, "unknown value in log: wandbb."),
        ({"settings": {"network.channels": "x"}}, "illegal value in network.channels: x."),
    ],
)
def test_errors_of_python_name_what_was_given(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        fastcm.train("digits", **options)
    assert message in str(caught.value) and "--set" not in str(caught.value) and not list(tmp_path.iterdir())


def test_grids_of_a_log_are_the_pictures_on_disk(tmp_path):
    """Grey and RGBA grids go to TensorBoard as they are."""
    for shape in ((4, 4), (4, 4, 4)):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "x.png")
        log = TensorBoard()
        log.begin(folder=tmp_path, config={}, nimg=0)
        log.picture(tmp_path / "x.png", 1)
        log.end()
