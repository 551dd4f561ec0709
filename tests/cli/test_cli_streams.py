"""Standard streams that are closed or full, messages of bounded length, and a signal that wins over the errors it causes."""

import os
import subprocess
import sys

import pytest

from fastcm import cli
from fastcm.errors import RunError, reason_of
from fastcm.generation.generator import Generator

COMPILER = """CppCompileError: C++ compile error

Command:
g++ /tmp/x.main.cpp -D TORCH_INDUCTOR_CPP_WRAPPER -O3

Output:
/bin/sh: 1: g++: not found
"""


STAND_IN = """
import os, sys, fastcm.cli as cli
class Module:
    def add(subparsers): subparsers.add_parser("info")
    def run(args):
        with open(sys.argv[1], "w") as file:
            print("out"); print("err", file=sys.stderr, flush=True); sys.stdin.read()
            os.write(1, b"low"); os.write(2, b"low"); file.write("whole")
cli._module = lambda name: Module
cli._is_present = lambda name: name == "info"
sys.exit(cli.main(["info"]))
"""


def stand_in(file, redirection):
    """A command that prints, reads and writes a file, in a shell with this redirection."""
    command = f'exec "{sys.executable}" -c "$CODE" "{file}" {redirection}'
    return subprocess.run(command, shell=True, env={**os.environ, "CODE": STAND_IN}, capture_output=True, text=True, input="", timeout=120)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_change_nothing(closed, tmp_path):
    """A file that is opened must not get the number of a closed stream either."""
    done = stand_in(tmp_path / "file", closed)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "whole"
    assert ("out" in done.stdout) == (" >&-" not in f" {closed}") and ("err" in done.stderr) == ("2>" not in closed)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stdout_is_one_line(tmp_path):
    done = stand_in(tmp_path / "file", "> /dev/full")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("fastcm: error: no space left on the device for the output.")
    assert "Exception ignored" not in done.stderr


def test_reasons_are_a_line():
    assert reason_of(RuntimeError("first\nsecond " + "x" * 150_000)) == "first"
    assert len(reason_of(RuntimeError("x" * 150_000))) == 300
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(RuntimeError(COMPILER)) == "no working C++ compiler: /bin/sh: 1: g++: not found"


def described(capsys, monkeypatch, error, *argv):
    def failing(argv):
        raise error

    monkeypatch.setattr(cli, "_dispatch", failing)
    code = cli.main(list(argv) or ["info"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return code, err


def test_messages_are_bounded(capsys, monkeypatch):
    code, err = described(capsys, monkeypatch, RuntimeError("x\n" * 10 + "y" * 150_000))
    assert code == 1 and len(err) < 500
    code, err = described(capsys, monkeypatch, RunError(f"{'value ' * 30_000}. The remedy."))
    assert code == 1 and len(err) < 1100 and err.endswith("The remedy.\n")


def test_a_signal_wins_over_the_error_that_it_caused(capsys, monkeypatch):
    error = RuntimeError("a worker died")
    error.__context__ = KeyboardInterrupt()
    assert described(capsys, monkeypatch, error) == (130, "fastcm: interrupted\n")


def test_less_memory_by_the_options_of_the_command(capsys, monkeypatch):
    for command, words in (("train", "--microbatch"), ("sample", "--precision bf16"), ("convert", "Free some")):
        _, err = described(capsys, monkeypatch, MemoryError(), command)
        assert "out of memory: host memory." in err and words in err and ("--batch" in err) == (command == "train")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_broken_weights_and_the_precision(precision):
    import torch
    from test_generator import small_denoiser

    denoiser = small_denoiser(None, 0, channels=8, head_channels=8, channel_mult=(1,), attention_resolutions=())
    torch.nn.init.constant_(denoiser.network.out[2].bias, float("nan"))
    with pytest.raises(RunError, match="weights are broken") as error:
        Generator(denoiser, {"resolution": 8, "channels": 1}, device="cpu", precision=precision)([0])
    assert ("--precision fp32" in str(error.value)) == (precision == "bf16")
