"""The command line's own promises: one line per error, exit codes by kind, suggestions, and a quick --help."""

import argparse
import errno
import os
import subprocess
import sys
import types

import pytest

from fastcm import cli
from fastcm.errors import InputError, RunError

ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error"}


@pytest.fixture
def command(monkeypatch):
    """Puts a command `info` in the place of the real one: it takes --steps, --mode, MODEL, and runs the function given."""

    def install(run):
        class Module:
            @staticmethod
            def add(subparsers):
                parser = subparsers.add_parser("info", help="a stand-in")
                parser.add_argument("model", nargs="?")
                parser.add_argument("--steps", type=int, default=1)
                parser.add_argument("--mode", choices=("fast", "slow"))
                parser.add_argument("--seeds", type=_seeds)
                parser.add_argument("--sigma-max", type=float)

        Module.run = staticmethod(run)
        real = cli._module
        monkeypatch.setattr(cli, "_module", lambda name: Module if name == "info" else real(name))
        monkeypatch.setattr(cli, "_is_present", lambda name: name in ("info", "bench"))

    return install


def _seeds(text):
    if not text.isdigit():
        raise InputError(f"invalid seeds in --seeds: {text}. Give numbers.")
    return int(text)


def _raise(error):
    raise error


def run(capsys, *argv):
    code = cli.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("infoo",), "unknown command in fastcm: infoo. Choose from info, bench. Did you mean 'info'?"),
        (("info", "--stepz", "3"), "unknown option in fastcm info: --stepz. See fastcm info --help. Did you mean '--steps'?"),
        (("info", "--stepz=3", "--mode", "x"), "unknown option in fastcm info: --stepz. See fastcm info --help. Did you mean '--steps'?"),
        (("info", "--step", "3"), "unknown option in fastcm info: --step. See fastcm info --help. Did you mean '--steps'?"),
        (("info", "--qqq"), "unknown option in fastcm info: --qqq. See fastcm info --help."),
        (("info", "a", "b"), "unknown argument in fastcm info: b. See fastcm info --help."),
        (("info", "-x"), "unknown option in fastcm info: -x. See fastcm info --help."),
        (("--qqq", "info"), "unknown option in fastcm info: --qqq. See fastcm info --help."),
        (("info", "--mode", "fats"), "unknown mode in --mode: fats. Choose from fast, slow. Did you mean 'fast'?"),
        (("info", "--steps", "two"), "invalid value in --steps: two. Expected a whole number."),
        (("info", "--sigma-max", "big"), "invalid value in --sigma-max: big. Expected a number."),
        (("info", "--steps"), "missing value in --steps: expected one argument. See fastcm info --help."),
        (("info", "--seeds", "x"), "invalid seeds in --seeds: x. Give numbers."),
        (
            ("bench", "kernel"),
            "unknown benchmark in fastcm bench: kernel. Choose from kernels, data, train, latency. Did you mean 'kernels'?",
        ),
        (("bench",), "missing argument in fastcm bench: kernels|data|train|latency. See fastcm bench --help."),
    ],
)
def test_usage_errors(command, capsys, argv, expected):
    command(lambda args: pytest.fail("ran in spite of the error"))
    assert run(capsys, *argv) == (2, "", f"fastcm: error: {expected}\n")


def _os_error(number, path="out/x"):
    return OSError(number, os.strerror(number), path)


class OutOfMemoryError(RuntimeError):
    """Stands in for torch's class of this name, which the command line knows without importing torch."""


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (InputError("bad thing in --x: 1.\nUse 2."), 2, "bad thing in --x: 1. Use 2."),
        (RunError("disk gone: /x. Mount it."), 1, "disk gone: /x. Mount it."),
        (_os_error(errno.ENOENT), 2, "no such file or directory: out/x. Check the path."),
        (_os_error(errno.EACCES), 2, "permission denied: out/x. Check the path."),
        (_os_error(errno.ENOSPC), 1, "no space left on the device for out/x. Make room and run the same command again."),
        (OutOfMemoryError("CUDA. Tried to"), 1, "out of memory: CUDA. Free some and run it again."),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 1, "missing package: onnx. pip install 'fastcm[export]'."),
        (KeyError("lost"), 1, "unexpected KeyError: 'lost'. Run again with --debug for the traceback."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_one_line_and_exit_code_for_each_error(command, capsys, error, code, expected):
    command(lambda args: _raise(error))
    assert run(capsys, "info") == (code, "", f"fastcm: error: {expected}\n")


def test_debug_shows_the_traceback(command, capsys):
    command(lambda args: _raise(InputError("bad. Fix it.")))
    for argv in (("info", "--debug"), ("--debug", "info")):
        code, _, err = run(capsys, *argv)
        assert code == 2 and err.startswith("Traceback") and err.endswith("fastcm: error: bad. Fix it.\n")


def test_exit_code_of_the_command(command, capsys):
    command(lambda args: {None: None, "three": 3}[args.model])
    assert run(capsys, "info")[0] == 0
    assert run(capsys, "info", "three")[0] == 3


def test_interrupt(command, capsys):
    command(lambda args: _raise(KeyboardInterrupt()))
    assert run(capsys, "info") == (130, "", "fastcm: interrupted\n")


def test_no_command_prints_the_help_and_fails(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "") and err.startswith("usage: fastcm")


def test_every_command_says_what_it_does():
    parser = cli.build_parser()
    [subparsers] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    assert "bench" in subparsers.choices and set(subparsers.choices) <= set(cli.COMMANDS)
    helps = {action.dest: action.help for action in subparsers._choices_actions}
    assert set(helps) == set(subparsers.choices) and all(helps.values())
    for name, child in subparsers.choices.items():
        unexplained = [action.dest for action in child._actions if not action.help and action.choices is None and action.option_strings]
        assert not unexplained, f"fastcm {name}: no help for {unexplained}"


def test_help_neither_imports_torch_nor_takes_long():
    """Nor does `import fastcm` bring any of the libraries that only some sources and runs need."""
    others = "torch numpy huggingface_hub datasets pyarrow pandas scipy wandb trackio".split()
    check = f"import sys, fastcm; assert not set({others}) & set(sys.modules)"
    script = f"{check}; from fastcm.cli import main; code = main(['--help']); assert not set({others}) & set(sys.modules); sys.exit(code)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=30, check=False)
    assert result.returncode == 0 and "bench" in result.stdout, result.stderr


def test_python_m_fastcm_and_its_exit_code():
    result = subprocess.run([sys.executable, "-m", "fastcm", "nothing"], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("fastcm: error: unknown command in fastcm: nothing. Choose from ") and result.stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet():
    script = "import sys; from fastcm import cli; cli._dispatch = lambda argv: print('x' * 200_000) or 0; sys.exit(cli.main([]))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), err) == (141, b"")


def test_bench_hands_its_options_on(monkeypatch, capsys):
    received = []
    benchmark = types.SimpleNamespace(main=lambda argv: received.append(argv) or 7)
    monkeypatch.setitem(sys.modules, "fastcm.benchmarks.training.bench", benchmark)
    assert run(capsys, "bench", "train", "--quick", "--json", "out.json", "--debug")[0] == 7
    assert received == [["--quick", "--json", "out.json"]]
