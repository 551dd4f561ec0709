"""Ctrl-C and SIGTERM: the first asks for a checkpoint at the finished step, the second ends the process at once."""

import os
import signal
import threading


class StopRequest:
    """A context in which SIGINT and SIGTERM set `.signal`; the handlers before it come back at its end."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there may Python set handlers
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
