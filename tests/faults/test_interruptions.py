"""A run that is stopped from outside, in a process of its own: nothing is lost, and the resumed run equals the uninterrupted one."""

import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TRAIN = (
    sys.executable,
    "-m",
    "fastcm",
    "train",
    "--set",
    "network.channels=8",
    "--set",
    "network.head_channels=8",
    "--batch",
    "16",
    "--duration",
    "960img",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--checkpoint-every",
    "0s",
)


def finish(out):
    done = subprocess.run([*TRAIN, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, uninterrupted, number, code):
    out = tmp_path / "run"
    process = subprocess.Popen([*TRAIN, "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 120
    while len(list(out.glob("checkpoints/step-*"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told
    if number != signal.SIGKILL:
        assert "the checkpoint is saved" in told
    steps = sorted(int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/step-*"))
    assert 0 < steps[-1] < 60, "stopped before the first or after the last step: nothing was tested"
    resumed = finish(out)
    assert all((resumed[name] == tensor).all() for name, tensor in uninterrupted.items()) and resumed.keys() == uninterrupted.keys()
    assert not list(out.rglob(".tmp-*"))


def test_a_damaged_checkpoint_is_passed_over_and_the_last_good_one_gone_is_an_error(tmp_path, uninterrupted):
    out = tmp_path / "run"
    command = [*TRAIN[: TRAIN.index("960img")], "480img", *TRAIN[TRAIN.index("960img") + 1 :], "--out", str(out)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    folders = sorted(out.glob("checkpoints/step-*"))
    assert len(folders) == 3
    damaged = folders[-1] / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    done = subprocess.run([*TRAIN, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0 and "weights.safetensors (size or sha256 differs)" in done.stderr and "resumed at 0.464" in done.stderr
    for folder in out.glob("checkpoints/step-*"):
        (folder / "manifest.json").unlink()
    lost = subprocess.run([*TRAIN, "--out", str(out)], capture_output=True, text=True)
    assert lost.returncode == 1 and "no good checkpoint left" in lost.stderr
