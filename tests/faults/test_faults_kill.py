"""A run that is killed at any moment, of a step or of a save, any number of times: it ends with the weights of one that was left alone."""

import random
import signal
import subprocess
import sys
import time

import pytest
from fault_counts import FULL, times
from forked_commands import Command, command
from safetensors.torch import load_file

from fastcm.training.checkpoint import complete_steps, read_checkpoint

SETTINGS = (
    "--set",
    "network.channels=8",
    "--set",
    "network.head_channels=8",
    "--set",
    "network.channel_mult=[1]",
    "--set",
    "network.attention_resolutions=[]",
    "--set",
    "network.blocks=1",
    "--batch",
    "4",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--checkpoint-every",
    "0s",
)
STEPS = 16
METHODS = {
    "ict": (),
    "edm": (),
    "ct": ("--set", "objective.curriculum=progressive", "--set", "objective.s0=2", "--set", "objective.s1=12"),
    "cd": ("--set", "objective.curriculum=progressive", "--set", "objective.s0=2", "--set", "objective.s1=12"),
    "ect": ("--set", "objective.s1=3"),
    "scd": ("--set", "objective.tangent_warmup_kimg=0.1"),
    "sct": ("--set", "objective.tangent_warmup_kimg=0.1"),
}


def train(method, out, teacher, *, steps=STEPS):
    options = ["--method", method, *METHODS[method], "--out", out, "--duration", f"{4 * steps}img"]
    return ["train", "digits", *SETTINGS, *options, *(["--teacher", teacher] if method in ("cd", "scd") else [])]


def tensors(path):
    """Every tensor of a checkpoint folder, as bytes."""
    return {(file.stem, name): tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_runs(one, other):
    """The newest checkpoints hold the same bits, and so do the models."""
    a, b = (tensors(run / "checkpoints" / f"step-{STEPS:09d}") for run in (one, other))
    assert a.keys() == b.keys() and any(part == "ema_0" and tensor.abs().sum() > 0 for (part, _), tensor in a.items())
    assert [key for key in a if not (a[key] == b[key]).all()] == []
    assert (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def teacher(tmp_path_factory):
    """Distillation's; the full count alone has it."""
    if not FULL:
        return None
    folder = tmp_path_factory.mktemp("teacher")
    code, text = command(train("edm", folder / "run", None, steps=4), folder / "text")
    assert code == 0, text
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    code, text = command(train("ict", folder / "run", None), folder / "text")
    assert code == 0, text
    return folder / "run"


def kill(life, out, rng, seconds, *, while_saving):
    """Kills a life at a random moment of the next `seconds`, or as soon as a save is under way; False where it ended before."""
    life.until(lambda: "out " in life.text)  # the plan: before it there is only the opening of the data
    moment = time.monotonic() + rng.uniform(0, seconds)
    life.until(lambda: any(out.glob("checkpoints/.tmp-*")) if while_saving else time.monotonic() > moment)
    before = complete_steps(out / "checkpoints")
    if life.ended:
        return False
    life.send(signal.SIGKILL)
    code, text = life.wait()
    assert code in (0, -signal.SIGKILL), text
    after = complete_steps(out / "checkpoints")
    assert not before or after[-1] >= before[-1], "a checkpoint that was there is gone"
    for step in after:
        read_checkpoint(out / "checkpoints" / f"step-{step:09d}")  # what has the name is whole
    return code != 0


@pytest.mark.long
def test_killed_again_and_again(tmp_path, teacher, record_property):
    """kill -9 at random points, half of them within a save; every method in the full count."""
    rng, kills, in_saves = random.Random(12), 0, 0
    methods = list(METHODS) if FULL else ["ict"]
    for method in methods:
        whole, began = tmp_path / f"{method}-whole", time.monotonic()
        assert command(train(method, whole, teacher), tmp_path / "text")[0] == 0
        seconds, left, run = time.monotonic() - began, -(-times(3, 100) // len(methods)), 0
        for _ in range(10 * left):
            out = tmp_path / f"{method}-{run}"
            life = Command(train(method, out, teacher), tmp_path / "text")
            if left and kill(life, out, rng, seconds, while_saving=left % 2 == 1):
                left, kills, in_saves = left - 1, kills + 1, in_saves + any(out.glob("checkpoints/.tmp-*"))
                continue
            code, text = life.wait()
            assert code == 0, text
            assert_equal_runs(whole, out)
            assert not list(out.rglob(".tmp-*")), "left behind by a life that was killed"
            run += 1
            if not left:
                break
        assert not left, "the lives ended before they could be killed"
    assert kills >= times(3, 100) and in_saves > 0
    record_property("tries", kills)
    record_property("seen", f"{kills} kills, {in_saves} within a save: no checkpoint lost, weights of {len(methods)} methods bit-equal")


STOPS = {
    "terminated": (signal.SIGTERM, 143, False),
    "interrupted twice": (signal.SIGINT, 130, True),
    **({"terminated twice": (signal.SIGTERM, 143, True), "interrupted": (signal.SIGINT, 130, False)} if FULL else {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_a_signal_saves_the_finished_step_and_a_second_ends_at_once(tmp_path, whole, stop, record_property):
    number, code, twice = STOPS[stop]
    for attempt in range(times(1, 10)):
        out = tmp_path / f"run-{attempt}"
        life = Command(train("ict", out, None), tmp_path / "text")
        assert life.until(lambda out=out: len(complete_steps(out / "checkpoints")) == 3), life.text
        life.send(number)
        if twice:
            life.send(number)
        ended, said = life.wait()
        assert ended == code and "Traceback" not in said, said
        assert twice or "the checkpoint is saved" in said
        step = complete_steps(out / "checkpoints")[-1]
        read_checkpoint(out / "checkpoints" / f"step-{step:09d}")
        assert 0 < step < STEPS, "stopped before the first or after the last step: nothing was tested"
        ended, said = command(train("ict", out, None), tmp_path / "text")
        assert ended == 0 and f"resumed at {4 * step / 1000:g} of" in said
        assert_equal_runs(whole, out)
    record_property("tries", times(1, 10))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_process_of_the_shell_is_stopped_and_goes_on(tmp_path, whole, number, code):
    """What a person does: nothing is forked, and the handlers are Python's own."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "fastcm", *map(str, train("ict", out, None))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 120
    while len(complete_steps(out / "checkpoints")) < 3 and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == code and ("the checkpoint is saved" in told or number == signal.SIGKILL), told
    assert 0 < complete_steps(out / "checkpoints")[-1] < STEPS, "stopped before the first or after the last step: nothing was tested"
    ended, said = command(train("ict", out, None), tmp_path / "text")
    assert ended == 0, said
    assert_equal_runs(whole, out)
    assert not list(out.rglob(".tmp-*"))
