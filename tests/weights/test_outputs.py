"""Outputs are complete or absent, their errors name them, and nothing stands in the way of a second try."""

import contextlib
import errno
import resource
import signal

import numpy as np
import pytest
from PIL import Image
from test_convert import convert, make

from fastcm import cli
from fastcm.export import publish
from fastcm.generation import pictures
from fastcm.weights.model_folder import load_model, save_model, write_json, write_text
from fastcm.weights.outputs import complete_folder, complete_or_absent

INFO = {"resolution": 8, "channels": 3}


@contextlib.contextmanager
def largest_file(size):
    """Within, no file of this process grows beyond `size` bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("target", ["new/model", "new/theirs --to diffusers", "new/deep/x.pt"])
@pytest.mark.parametrize("size", [0, 50_000])
def test_convert_without_room_leaves_nothing_and_can_be_repeated(target, size, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "m", make(), INFO)
    before = sorted(tmp_path.rglob("*"))
    destination, *options = target.split()
    with largest_file(size):
        assert convert("m", destination, *options) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "file too large" in error and destination in error and ".tmp" not in error
    assert sorted(tmp_path.rglob("*")) == before
    assert convert("m", destination, *options) == 0


def test_a_model_that_stands_there_stays_whole(tmp_path):
    save_model(tmp_path / "m", make(), INFO)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    with largest_file(50_000), pytest.raises(OSError, match="model.safetensors"):
        save_model(tmp_path / "m", make(num_classes=None), INFO)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    save_model(tmp_path / "m", make(num_classes=None), INFO)
    assert load_model(tmp_path / "m")[0].network.config.num_classes is None and (tmp_path / "m" / "notes.txt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def noise_picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


WRITERS = {
    "text": lambda path: write_text(path, "x" * 9000),
    "json": lambda path: write_json(path, {"x": "y" * 9000}),
    "png": lambda path: pictures.save_png(path, noise_picture()),
    "gif": lambda path: pictures.save_gif(path, [noise_picture()] * 2),
    "npz": lambda path: pictures.save_npz(path, np.zeros((9, 32, 32, 3), np.uint8)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_are_complete_or_absent_and_named(kind, tmp_path):
    path = tmp_path / "out"
    with largest_file(4000), pytest.raises(OSError) as error:
        WRITERS[kind](path)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
    WRITERS[kind](path)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_exports_name_the_output(tmp_path):
    with largest_file(100), pytest.raises(OSError) as error, publish.staging(tmp_path / "x.onnx", option="--onnx") as folder:
        (folder / "x.onnx").write_bytes(b"x" * 1000)
    assert error.value.filename == str(tmp_path / "x.onnx") and list(tmp_path.iterdir()) == []


def test_errors_of_other_files_keep_their_names(tmp_path):
    for make_output in (complete_or_absent, complete_folder):
        with pytest.raises(FileNotFoundError) as error, make_output(tmp_path / "deep" / "out"):
            open(tmp_path / "another")
        assert error.value.filename == str(tmp_path / "another") and list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_opened_is_an_error_of_input(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    save_model(tmp_path / "m", make(), INFO)
    assert cli.main(["convert", str(tmp_path / "m"), str(tmp_path / "file" / "below")]) == 2
    assert "not a directory" in capsys.readouterr().err
