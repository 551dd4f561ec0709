"""`fastcm serve` in a process of its own, on a loopback port of its own."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path


class Served:
    """A running server: .host, .port, .process."""

    def __init__(self, process: subprocess.Popen, address: str):
        self.process = process
        self.host, self.port = re.search(r"http://([\d.]+):(\d+)", address).groups()
        self.port = int(self.port)

    @property
    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.contextmanager
def served(model: Path, *options: str):
    """Yields a server of `model` that listens, and ends it."""
    command = [sys.executable, "-m", "fastcm", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=model.parent)
    try:
        line = process.stdout.readline()
        assert "http://" in line, process.stderr.read()
        yield Served(process, line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)
