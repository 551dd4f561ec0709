"""Pictures decoded when they are asked for, for sets whose cache would not fit on the disk: an array-like of uint8 [N, C, H, W].

The index (where each picture's bytes lie) is kept on disk and memory-mapped, so that memory does not grow with the set.
"""

import hashlib
import json
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastcm.data import image_cache
from fastcm.data.cache_building import BAD_LIMIT, BLOCK, Form, changed, other_sizes, unreadable
from fastcm.data.decode_pool import DecodePool, cores
from fastcm.data.decode_worker import Task
from fastcm.data.sources import Listing
from fastcm.data.spans import Span
from fastcm.errors import InputError


class StreamIndex:
    """The spans of a listing on disk: `paths.bin` with the end of each path, and the other fields as int64 [N, 5]."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.fields = np.load(folder / "fields.npy", mmap_mode="r", allow_pickle=False)
        self.path_ends = np.load(folder / "path_ends.npy", mmap_mode="r", allow_pickle=False)
        self.paths = np.memmap(folder / "paths.bin", dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.fields)

    def span(self, row: int) -> Span:
        start = 0 if row == 0 else int(self.path_ends[row - 1])
        return Span(os.fsdecode(self.paths[start : int(self.path_ends[row])].tobytes()), *map(int, self.fields[row]))

    @staticmethod
    def write(folder: Path, spans: Sequence[Span]) -> None:
        paths = [os.fsencode(span.path) for span in spans]
        (folder / "paths.bin").write_bytes(b"".join(paths))
        np.save(folder / "path_ends.npy", np.cumsum([len(path) for path in paths], dtype=np.int64))
        np.save(folder / "fields.npy", np.array([span[1:] for span in spans], dtype=np.int64))


class StreamedImages:
    """Behaves as a read-only uint8 array [N, C, H, W]: shape, dtype, len, and indexing along the first axis, which decodes.

    bad_images: "fail" raises InputError at an unreadable picture; "skip" puts the next readable one in its place, counts it, and raises
    once more than 1 % are unreadable. `bad` maps the rows found unreadable so far to the reason. Threads take turns.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, index: StreamIndex, form: Form, *, root: Path, bad_images: str, rows: np.ndarray | None = None):
        self.index, self.form, self.root, self.bad_images, self.rows = index, form, root, bad_images, rows
        self.bad: dict[int, str] = {}
        self._pool: DecodePool | None = None
        self._lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.form.channels, self.form.side, self.form.side

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self.index) if self.rows is None else len(self.rows)

    def view(self, rows: np.ndarray) -> "StreamedImages":
        """The given rows, undecoded."""
        rows = np.asarray(rows) if self.rows is None else self.rows[rows]
        return StreamedImages(self.index, self.form, root=self.root, bad_images=self.bad_images, rows=rows)

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.arange(len(self))[key]
        with self._lock:
            return self._decode(rows.ravel()).reshape(*rows.shape, *self.shape[1:])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.uint8, copy=False)

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [len(rows), C, H, W], a chunk at a time through the pool's scratch file."""
        source = rows if self.rows is None else self.rows[rows]
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for start in range(0, len(rows), BLOCK * 8):
            part = source[start : start + BLOCK * 8].copy()
            images[start : start + len(part)] = self._chunk(part)
        return images

    def _chunk(self, rows: np.ndarray) -> np.ndarray:
        if self._pool is None:
            self._start()
        while True:
            for place, row in enumerate(rows):
                while int(row) in self.bad:  # the next readable picture, as in every run
                    row = (int(row) + 1) % len(self.index)
                rows[place] = row
            if not self._decode_once(rows):
                data = os.pread(self._scratch.fileno(), len(rows) * self._pool.task.row_bytes, 0)
                return np.frombuffer(data, np.uint8).reshape(len(rows), *self.shape[1:])

    def _decode_once(self, rows: np.ndarray) -> bool:
        """Decodes the rows into the scratch file; True where one proved unreadable and was noted."""
        size = max(1, -(-len(rows) // max(1, self._pool.workers)))
        starts = range(0, len(rows), size)
        jobs = [(start, [self.index.span(row) for row in rows[start : start + size]]) for start in starts]
        found_bad = False
        for start, result in zip(starts, self._pool.decode(jobs), strict=True):
            if result.changed is not None:
                raise changed(result.changed)
            if result.failed is not None:
                raise image_cache.cannot_write(self.index.folder, OSError(result.failed))
            if result.other is not None:
                raise other_sizes(self.root, [(self.form.side, self.form.side), result.other[1:]])
            for place, reason in result.bad:
                found_bad = True
                self._note_bad(int(rows[start + place]), reason)
        return found_bad

    def _note_bad(self, row: int, reason: str) -> None:
        self.bad[row] = reason
        if self.bad_images == "fail":
            raise unreadable(self.index.span(row).path, reason)
        if len(self.bad) > BAD_LIMIT * len(self.index):
            raise InputError(
                f"more than {BAD_LIMIT:.0%} unreadable pictures in --data: {self.root} ({len(self.bad)} or more of {len(self.index)}: "
                f"{self.index.span(row).path}: {reason}). Repair or remove them."
            )

    def _start(self) -> None:
        self._scratch = tempfile.NamedTemporaryFile(prefix=".scratch-", dir=self.index.folder)  # noqa: SIM115
        self._pool = DecodePool(Task(self._scratch.name, *self.form), workers=cores())
        weakref.finalize(self, _stop, self._pool, self._scratch)


def _stop(pool: DecodePool, scratch) -> None:
    pool.close()
    scratch.close()


def build_stream(entry: Path, listing: Listing, form: Form) -> None:
    """Writes the index of a listing as the folder `entry`: complete or absent."""
    image_cache.make_folder(entry.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=entry.parent))
    try:
        StreamIndex.write(temporary, listing.spans)
        if listing.classes.labels is not None:
            np.save(temporary / "labels.npy", listing.classes.labels)
        identity = hashlib.sha256(f"streamed {entry.name} {form}".encode())
        shape = (len(listing.names), form.channels, form.side, form.side)
        manifest = {
            "version": image_cache.VERSION,
            "form": form._asdict(),
            "classes": listing.classes.names,
            "fingerprint": image_cache.fingerprint(identity, shape, listing.classes.labels, listing.classes.names),
        }
        (temporary / "stream.json").write_text(json.dumps(manifest), encoding="utf-8")
        try:
            os.rename(temporary, entry)
        except OSError:
            if not (entry / "stream.json").exists():
                raise
    except OSError as error:
        raise image_cache.cannot_write(entry, error) from error
    finally:
        if temporary.exists():
            for file in temporary.iterdir():
                file.unlink()
            temporary.rmdir()


def open_stream(entry: Path, root: Path, bad_images: str) -> image_cache.Entry | None:
    """Opens what build_stream wrote; None where there is none."""
    try:
        manifest = json.loads((entry / "stream.json").read_text(encoding="utf-8"))
        if manifest["version"] != image_cache.VERSION:
            return None
        labels = image_cache.load_labels(entry / "labels.npy") if (entry / "labels.npy").exists() else None
        images = StreamedImages(StreamIndex(entry), Form(**manifest["form"]), root=root, bad_images=bad_images)
        names = tuple(manifest["classes"]) if manifest["classes"] else None
        return image_cache.Entry(images, labels, names, manifest["fingerprint"], ())
    except (OSError, ValueError, KeyError, TypeError):
        return None
