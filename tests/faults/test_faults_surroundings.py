"""Where fastcm runs: paths with spaces and any script, a locale without UTF-8, another time zone, warnings of its own as errors."""

import os
import subprocess
import sys

import pytest
from forked_commands import command, own_warnings_are_errors
from test_faults_kill import train

NAME = "Läufe 実験 № 1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in a folder of such a name, trained without a warning of our own."""
    folder = tmp_path_factory.mktemp("surroundings") / NAME
    folder.mkdir()
    code, text = command(train("ict", folder / "run", None, steps=2), folder / "text", before=own_warnings_are_errors)
    assert code == 0, text
    return folder / "run"


@pytest.mark.slow
def test_every_command_in_a_folder_of_any_name_without_a_warning(run):
    out = run.parent
    for argv in (
        train("ict", run, None, steps=4),  # resumed
        ["sample", run, "--seeds", "0-3", "--out", out / "bilder é.png"],
        ["sample", run, "--seeds", "0-3", "--out", out / "muster.npz"],
        ["info", run],
        ["edit", "inpaint", run, "--image", out / "bilder é.png", "--box", "0,0,4,4", "--out", out / "neu.png"],
        ["convert", run, out / "diffusers ü", "--to", "diffusers"],
        ["info", out / "diffusers ü"],
    ):
        code, text = command(argv, out / "text", before=own_warnings_are_errors)
        assert code == 0 and "Warning" not in text, (argv, text)
    assert (out / "bilder é.png").stat().st_size > 100 and (out / "neu.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_locale_without_utf8(run, encoding):
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": f"{encoding}:strict",
        "TZ": "Asia/Kathmandu",
        "PYTHONHASHSEED": "4711",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-m", "fastcm", "info", str(run)], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    missing = subprocess.run([sys.executable, "-m", "fastcm", "info", str(run) + " ß"], capture_output=True, env=environment)
    assert missing.returncode == 2 and missing.stderr.startswith(b"fastcm: error: no such file or folder in MODEL:")
    assert b"Traceback" not in missing.stderr and missing.stderr.count(b"\n") == 1
