"""Work beside the drawing of images: batches are written on other threads while the network draws the next."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs what it is handed on `threads` threads, in order where there is one. Within `with`, which ends when all is done.

    depth: how many pieces may wait before `run` waits too, so that a slow disk does not fill the memory. The first error of a piece is
    raised by a later `run` or at the end; pieces that have not begun are then dropped.
    """

    def __init__(self, threads: int = 1, *, depth: int = 4):
        self.depth = depth
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fastcm-write")
        self._waiting: deque[Future] = deque()

    def run(self, function: Callable[..., object], *arguments) -> None:
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= self.depth):
            self._waiting.popleft().result()
        self._waiting.append(self._threads.submit(function, *arguments))

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)
