"""`fastcm` commands in processes of their own, to be killed: forked from one that has imported torch, so that each starts at once."""

import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
PRELOADED = ("fastcm.cli.train", "fastcm.runs", "fastcm.evaluation", "torch._dynamo", "torch.utils.tensorboard", "PIL.PngImagePlugin")
_server.set_forkserver_preload(list(PRELOADED))


class Command:
    """One `fastcm` command at work; what it prints goes to `output`. before: what its process does first, a function of a module."""

    def __init__(self, argv: Sequence[object], output: Path, *, before: Callable[[], None] | None = None):
        self.output = output
        output.write_bytes(b"")
        self.process = _server.Process(target=_run, args=([str(word) for word in argv], str(output), before))
        self.process.start()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def until(self, condition: Callable[[], object], seconds: float = 120) -> bool:
        """Waits for the condition; False where the command ended, or the time ran out, without it."""
        end = time.monotonic() + seconds
        while not condition():
            if self.ended or time.monotonic() > end:
                return bool(condition())
            time.sleep(0.002)
        return True

    def wait(self, seconds: float = 240) -> tuple[int, str]:
        """(exit code, negative for a signal; everything printed). A command that takes longer is killed, and fails the test."""
        self.process.join(seconds)
        if not self.ended:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still at work after {seconds} s: {self.text}")
        return self.process.exitcode, self.text

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


def command(argv: Sequence[object], output: Path, *, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Runs a command to its end: (exit code, everything printed)."""
    return Command(argv, output, before=before).wait()


def _run(argv: list[str], output: str, before: Callable[[], None] | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from fastcm import cli

    torch.set_num_threads(1)
    if before is not None:
        before()
    code = cli.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class FilesEndAt:
    """No file of the process may grow beyond `size` bytes: the kernel refuses the write, as a full disk does."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def own_warnings_are_errors() -> None:
    warnings.filterwarnings("error", module=r"fastcm(\.|$)")


def called(function: Callable, arguments: tuple, output: Path, *, seconds: float) -> tuple[int, str]:
    """Calls a function of a test module in a process of its own: (exit code, negative for a signal; everything printed)."""
    output.write_bytes(b"")
    process = _server.Process(target=_call, args=(function, arguments, str(output)))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still at work after {seconds} s")
    return process.exitcode, output.read_text(encoding="utf-8", errors="replace")


def _call(function: Callable, arguments: tuple, output: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    function(*arguments)
