"""Decodes a listing into a cache entry, once: by a pool of processes, block by block, so that a killed build goes on where it was.

The entry grows as `.partial-NAME`: `images.bin` at its full (sparse) size and `journal.jsonl`, which names the finished blocks. A block is
written down only after its pixels are on the disk.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastcm.data import image_cache
from fastcm.data.decode_pool import IN_PROCESS_BYTES, DecodePool, cores
from fastcm.data.decode_worker import Result, Task
from fastcm.data.decoding import BadImageError, Header, read_header
from fastcm.data.sources import Listing
from fastcm.data.spans import ChangedError, read_span
from fastcm.errors import InputError, RunError

BAD_LIMIT = 0.01  # the share of unreadable files above which `bad_images="skip"` stops as well
BLOCK, BLOCK_BYTES = 128, 64 << 20  # pictures decoded between two journal entries, and the most that their pixels may take
SYNC_EVERY_S = 5.0  # at most this much work is lost when the machine stops
PLAIN_PROGRESS_EVERY_S = 30.0
ABANDONED_S = 30 * 86400.0  # a partial entry that was not touched for so long is removed


class Form(NamedTuple):
    """What every picture becomes: uint8 [channels, side, side]. exact: pictures must have the size already."""

    side: int
    channels: int
    exact: bool


class BadImages:
    """Counts unreadable pictures and stops: at the first one ("fail"), or once their share passes BAD_LIMIT ("skip")."""

    def __init__(self, listing: Listing, bad_images: str):
        self.listing, self.bad_images = listing, bad_images
        self.reasons: dict[int, str] = {}

    def note(self, row: int, reason: str) -> None:
        """Raises InputError naming the picture."""
        listing = self.listing
        self.reasons[row] = reason
        if self.bad_images == "fail":
            raise unreadable(listing.shown(row), reason)
        if len(self.reasons) > BAD_LIMIT * len(listing.names):
            first = "; ".join(f"{listing.names[row]}: {reason}" for row, reason in list(self.reasons.items())[:3])
            raise InputError(
                f"more than {BAD_LIMIT:.0%} unreadable pictures in --data: {listing.root} ({len(self.reasons)} or more of "
                f"{len(listing.names)}: {first}). Repair or remove them."
            )

    def lines(self) -> list[str]:
        return [f"{self.listing.names[row]}: {self.reasons[row]}" for row in sorted(self.reasons)]


def unreadable(shown: str, reason: str) -> InputError:
    return InputError(f"unreadable picture in --data: {shown} ({reason}). Repair or remove it, or pass --bad-images skip.")


def changed(path: str) -> InputError:
    return InputError(f"a data set that changed while it was read, in --data: {path}. Run the same command again.")


def resolve_form(listing: Listing, resolution: int | None, channels: int | None, bad_images: str) -> Form:
    """The form of a listing: its own size where `resolution` is None; where `channels` is, grey if no picture has colour, else RGB."""
    bad = BadImages(listing, bad_images)
    first = next(filter(None, (_header(listing, row, bad) for row in range(len(listing.names)))), None)
    if resolution is None and first.width != first.height:
        raise other_sizes(listing.root, [(first.width, first.height)])
    spans, exact = listing.spans, resolution is None
    form = Form(resolution or first.width, channels or (1 if first.is_grey else 3), exact)
    if channels is None and first.is_grey:  # one colour picture decides, so few are opened unless all are grey
        spread = [spans[row] for row in np.linspace(0, len(spans) - 1, 64, dtype=int)]
        blocks = [spread, *(spans[start : start + BLOCK] for start in range(0, len(spans), BLOCK))]
        with DecodePool(Task(os.devnull, *form), workers=_workers(listing)) as pool:
            form = form._replace(channels=3 if pool.any_colour(blocks) else 1)
    return form


def _header(listing: Listing, row: int, bad: BadImages) -> Header | None:
    try:
        return read_header(read_span(listing.spans[row]))
    except BadImageError as error:
        bad.note(row, str(error))
    except ChangedError as error:
        raise changed(str(error)) from None
    return None


def other_sizes(root: Path, sizes: Sequence[tuple[int, int]]) -> InputError:
    shown = ", ".join(f"{width}x{height}" for width, height in sizes)
    return InputError(f"pictures that are not all of one square size in --data: {root} ({shown}). Pass --resolution N to crop and resize.")


def _workers(listing: Listing) -> int:
    return cores() if sum(span.size for span in listing.spans[:100_000]) > IN_PROCESS_BYTES else 0


def build(entry: Path, listing: Listing, form: Form, *, bad_images: str, progress: bool) -> image_cache.Entry:
    """Decodes what is not decoded yet and publishes the entry; another process that builds the same one is waited for.

    Raises InputError naming an unreadable picture, RunError where the disk is full. What was decoded stays for the next call.
    """
    try:
        image_cache.make_folder(entry.parent)
        with _alone(entry):
            opened = image_cache.open_entry(entry)
            if opened is not None:
                return opened
            _remove_abandoned(entry.parent)
            partial = partial_of(entry)
            partial.mkdir(exist_ok=True)
            try:
                _build(partial, listing, form, BadImages(listing, bad_images), progress)
                image_cache.publish(partial, entry)
            finally:
                if not Journal.has_blocks(partial):
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise image_cache.cannot_write(entry, error) from error
    opened = image_cache.open_entry(entry)
    if opened is None:
        raise RunError(f"the image cache cannot be read back: {entry}. Remove it and run again.")
    return opened


def partial_of(entry: Path) -> Path:
    """Where the entry grows."""
    return entry.parent / f".partial-{entry.name}"


@contextmanager
def _alone(entry: Path) -> Iterator[None]:
    """Holds the entry's lock, which a killed process gives up."""
    with open(entry.parent / f".lock-{entry.name}", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"fastcm: waiting for another process that decodes into {entry}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _build(partial: Path, listing: Listing, form: Form, bad: BadImages, progress: bool) -> None:
    count, task = len(listing.names), Task(str(partial / "images.bin"), *form)
    block = max(1, min(BLOCK, BLOCK_BYTES // task.row_bytes))
    journal = Journal(partial, {"version": image_cache.VERSION, "pictures": count, "row_bytes": task.row_bytes, "block": block})
    starts = range(0, count, block)
    todo = [start for start in starts if start not in journal.finished]
    digest, kept = hashlib.sha256(), []
    jobs = ((start, listing.spans[start : start + block]) for start in todo)
    with (
        open(task.out, "r+b", buffering=0) as images,
        journal.recording(images.fileno()),
        DecodePool(task, workers=_workers(listing) if todo else 0) as pool,
        progress_bar(count, progress) as bar,
    ):
        results = pool.decode(jobs)
        for start in starts:
            size = min(block, count - start)
            reasons = journal.finished[start] if start in journal.finished else _checked(next(results), listing, start, form.side)
            for row, reason in reasons:
                bad.note(row, reason)
            journal.add(start, reasons)
            left_out = {row for row, _ in reasons}
            good = np.array([row for row in range(start, start + size) if row not in left_out], dtype=np.int64)
            pixels = os.pread(images.fileno(), size * task.row_bytes, start * task.row_bytes)
            if left_out:
                pixels = np.frombuffer(pixels, np.uint8).reshape(size, -1)[good - start].tobytes()
            digest.update(pixels)
            kept.append(good)
            bar.update(size)
    kept = np.concatenate(kept)
    journal.end()
    if len(kept) < count:
        close_gaps(Path(task.out), kept, task.row_bytes)
    shape = (len(kept), form.channels, form.side, form.side)
    labels = None if listing.classes.labels is None else listing.classes.labels[kept]
    image_cache.finish(partial, digest, shape=shape, labels=labels, class_names=listing.classes.names, bad=bad.lines())


def _checked(result: Result, listing: Listing, start: int, side: int) -> list[tuple[int, str]]:
    """The (row, reason) of a block's unreadable pictures; raises what stands in the way of all."""
    if result.changed is not None:
        raise changed(result.changed)
    if result.failed is not None:
        raise OSError(result.failed)
    if result.other is not None:
        _, width, height = result.other
        raise other_sizes(listing.root, [(side, side), (width, height)])
    return [(start + place, reason) for place, reason in result.bad]


def close_gaps(path: Path, kept: np.ndarray, row_bytes: int) -> None:
    """Moves the kept rows [n] (ascending) of a file of pixels together and cuts the rest off."""
    with open(path, "r+b", buffering=0) as file:
        first = int(np.argmax(kept != np.arange(len(kept)))) if (kept != np.arange(len(kept))).any() else len(kept)
        for place in range(first, len(kept)):
            os.pwrite(file.fileno(), os.pread(file.fileno(), row_bytes, int(kept[place]) * row_bytes), place * row_bytes)
        file.truncate(len(kept) * row_bytes)


class Journal:
    """Which blocks of a partial entry are finished: first row of the block -> its unreadable pictures as (row, reason)."""

    def __init__(self, partial: Path, facts: dict):
        self.path, self.facts = partial / "journal.jsonl", facts
        self.finished: dict[int, list[tuple[int, str]]] = {}
        self.pending: list[str] = []
        images, size = partial / "images.bin", facts["pictures"] * facts["row_bytes"]
        if not (self._read() and images.is_file() and images.stat().st_size == size):
            self.finished.clear()
            self.path.unlink(missing_ok=True)
            with open(images, "wb") as file:
                file.truncate(size)
            self.path.write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def _read(self) -> bool:
        """Takes in the finished blocks; False where the journal is of another build. A last line that was cut short counts for nothing."""
        try:
            facts, *lines = self.path.read_text(encoding="utf-8").split("\n")
            if json.loads(facts) != self.facts:
                return False
            for line in lines[:-1]:
                start, reasons = json.loads(line)
                self.finished[start] = [(row, reason) for row, reason in reasons]
        except (OSError, ValueError, TypeError):
            return False
        return True

    @staticmethod
    def has_blocks(partial: Path) -> bool:
        """Whether there is something to go on with."""
        path = partial / "journal.jsonl"
        return path.is_file() and path.read_bytes().count(b"\n") > 1

    @contextmanager
    def recording(self, images: int) -> Iterator[None]:
        """While open, `add` writes finished blocks down every SYNC_EVERY_S, after a sync of the pixels; the rest at the end."""
        self.images, self.synced_at = images, time.monotonic()
        try:
            yield
        finally:
            self._write()

    def add(self, start: int, reasons: list[tuple[int, str]]) -> None:
        if start not in self.finished:
            self.pending.append(json.dumps([start, reasons]) + "\n")
        if time.monotonic() - self.synced_at >= SYNC_EVERY_S:
            self._write()

    def _write(self) -> None:
        if self.pending:
            os.fdatasync(self.images)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(self.pending)
                file.flush()
                os.fsync(file.fileno())
            self.pending.clear()
        self.synced_at = time.monotonic()

    def end(self) -> None:
        """Removes it: from here on rows may move."""
        self.path.unlink()


def progress_bar(total: int, progress: bool) -> tqdm:
    """Pictures done, per second and left; on a pipe a plain line now and then instead."""
    every = {} if sys.stderr.isatty() else {"delay": PLAIN_PROGRESS_EVERY_S, "mininterval": PLAIN_PROGRESS_EVERY_S}
    return tqdm(total=total, desc="decoding", unit="img", disable=not progress, **every)


def _remove_abandoned(cache: Path) -> None:
    """Deletes partial entries that nobody has gone on with for ABANDONED_S."""
    for partial in cache.glob(".partial-*"):
        images = partial / "images.bin"
        if not images.exists() or time.time() - images.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(partial, ignore_errors=True)
