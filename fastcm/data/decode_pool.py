"""As many decoding processes as there are cores, each fed by a thread: blocks of pictures in, their results out in order."""

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastcm.data import decode_worker
from fastcm.data.decode_worker import Result, Task
from fastcm.data.spans import Span
from fastcm.errors import RunError

IN_PROCESS_BYTES = 4 << 20  # sets below this are decoded here: starting processes would take longer

Job = tuple[int | None, Sequence[Span]]  # (row of the first pixel row, pictures); None instead of a row looks for a colour picture


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class DecodePool:
    """Decodes blocks into `task.out`. workers: processes; 0 decodes in this one. Close it, or use it as a context."""

    def __init__(self, task: Task, *, workers: int):
        self.task, self.workers = task, workers if sys.executable else 0
        self._local, self._processes = threading.local(), []
        self._threads = ThreadPoolExecutor(workers, "fastcm-decode") if self.workers else None
        self._descriptor = None if self.workers else os.open(task.out, os.O_WRONLY | os.O_CLOEXEC)

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, which finish the block they are at."""
        if self._threads is None:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            return
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            with suppress(OSError):  # of one that died
                process.stdin.close()
        for process in self._processes:
            process.wait()
            process.stdout.close()
        self._processes.clear()

    def decode(self, jobs: Iterable[tuple[int, Sequence[Span]]]) -> Iterator[Result]:
        """Yields the result of each (row in the file, pictures), in order. Raises RunError where a process dies."""
        for result in self._map(jobs):
            yield Result([tuple(item) for item in result[0]], *result[1:])

    def any_colour(self, blocks: Iterable[Sequence[Span]]) -> bool:
        """Whether a picture of the blocks is not grey; stops at the first one."""
        return any(self._map((None, spans) for spans in blocks))

    def _map(self, jobs: Iterable[Job]) -> Iterator[Any]:
        if self._threads is None:
            for slot, spans in jobs:
                yield decode_worker.answer(self.task, self._descriptor, {"slot": slot, "spans": spans})
            return
        waiting = deque()
        for slot, spans in jobs:
            waiting.append(self._threads.submit(self._ask, slot, spans))
            if len(waiting) > 3 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, slot: int | None, spans: Sequence[Span]) -> Any:
        """Sends one block to this thread's process and waits for its answer."""
        process = getattr(self._local, "process", None)
        if process is None:
            process = self._local.process = self._start()
        try:
            process.stdin.write(json.dumps({"slot": slot, "spans": spans}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise RunError(
                f"a decoding process died with code {process.wait()} at {spans[0].path} or one of the {len(spans) - 1} pictures after it. "
                "If memory was short, close other programs; else remove the picture."
            )
        return json.loads(line)

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-P", "-m", "fastcm.data.decode_worker"]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="ascii", env={**os.environ, "PYTHONPATH": path}
        )
        self._processes.append(process)
        process.stdin.write(json.dumps(self.task) + "\n")
        return process
