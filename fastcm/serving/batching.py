"""Images that several clients ask for at about the same time, drawn together, on one thread beside the event loop."""

import asyncio
import contextlib
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

# draw(seeds int64 [B], labels int64 [B] or None, how) -> images uint8 [B, H, W, C]
Draw = Callable[[np.ndarray, np.ndarray | None, Any], np.ndarray]


class BusyError(Exception):
    """The queue is full: the request was not accepted."""


class Job:
    """The images of one request, of which the first `taken` are being drawn or done. how: jobs of equal `how` share batches."""

    def __init__(self, seeds: np.ndarray, labels: np.ndarray | None, how: Hashable, loop: asyncio.AbstractEventLoop):
        self.seeds, self.labels, self.how = seeds, labels, how
        self.arrived = loop.time()
        self.taken = 0
        self.parts: list[np.ndarray] = []
        self.future: asyncio.Future = loop.create_future()

    @property
    def left(self) -> int:
        return len(self.seeds) - self.taken


class Part(NamedTuple):
    """The rows of a job that are in one batch."""

    job: Job
    rows: slice


class Batcher:
    """`await images(seeds, labels, how)`, while `run()` is a task of the same event loop.

    A batch starts when max_batch images wait, when every client of clients() has a request waiting, so that a client that is alone never
    waits for others, or when the oldest image has waited for window_s since the last batch ended: the clients that it served ask again
    then. At most queue_images wait. `drawn(count)` is told of every batch.
    """

    def __init__(
        self, draw: Draw, *, max_batch: int, window_s: float, queue_images: int, clients: Callable[[], int], drawn: Callable[[int], object]
    ):
        self.draw, self.clients, self.drawn = draw, clients, drawn
        self.max_batch, self.window_s, self.queue_images = max_batch, window_s, queue_images
        self._jobs: list[Job] = []
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastcm-draw")

    @property
    def waiting(self) -> int:
        """Images that no batch has taken yet."""
        return sum(job.left for job in self._jobs)

    async def images(self, seeds: np.ndarray, labels: np.ndarray | None, how: Hashable) -> np.ndarray:
        """The images of these seeds, uint8 [N, H, W, C]. Raises BusyError at once, or what `draw` raised for them.

        A caller that is cancelled takes its images out of the queue.
        """
        if self.waiting + len(seeds) > self.queue_images:
            raise BusyError
        job = Job(seeds, labels, how, asyncio.get_running_loop())
        self._jobs.append(job)
        self._arrival.set()
        try:
            return await job.future
        finally:
            if job in self._jobs:
                self._jobs.remove(job)

    async def alone(self, work: Callable[[], Any]) -> Any:
        """work() on the drawing thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def run(self) -> None:
        """Draws until it is cancelled."""
        try:
            while True:
                await self._gather()
                parts = self._take()
                if parts:
                    await self._draw(parts)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _gather(self) -> None:
        """Returns when a batch should start."""
        now = asyncio.get_running_loop().time
        free = now()
        while not self._jobs:
            await self._next_arrival(None)
        deadline = max(free, self._jobs[0].arrived) + self.window_s
        while self._jobs and not self._complete() and (left := deadline - now()) > 0:
            await self._next_arrival(left)

    def _complete(self) -> bool:
        first = self._jobs[0].how
        return len(self._jobs) >= self.clients() or sum(job.left for job in self._jobs if job.how == first) >= self.max_batch

    async def _next_arrival(self, timeout_s: float | None) -> None:
        self._arrival.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._arrival.wait()

    def _take(self) -> list[Part]:
        """The next batch: the oldest job's images, and those of other jobs that are drawn in the same way."""
        parts, room = [], self.max_batch
        for job in list(self._jobs):
            if room and job.how == self._jobs[0].how:
                count = min(room, job.left)
                parts.append(Part(job, slice(job.taken, job.taken + count)))
                job.taken += count
                room -= count
        self._jobs = [job for job in self._jobs if job.left]
        return parts

    async def _draw(self, parts: list[Part]) -> None:
        try:
            images = await self.alone(lambda: self._drawn_together(parts))
        except Exception as error:
            if len(parts) == 1:
                self._fail(parts[0].job, error)
                return
            for part in parts:  # one bad image must not fail the others' requests
                await self._draw([part])
            return
        self.drawn(len(images))
        start = 0
        for job, rows in parts:
            stop = start + rows.stop - rows.start
            job.parts.append(images[start:stop])
            start = stop
            if not job.left and not job.future.done():
                job.future.set_result(np.concatenate(job.parts))

    def _drawn_together(self, parts: list[Part]) -> np.ndarray:
        seeds = np.concatenate([job.seeds[rows] for job, rows in parts])
        labels = None if parts[0].job.labels is None else np.concatenate([job.labels[rows] for job, rows in parts])
        return self.draw(seeds, labels, parts[0].job.how)

    def _fail(self, job: Job, error: Exception) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        if not job.future.done():
            job.future.set_exception(error)
