"""Decoded pictures on disk: one folder per content and resolution, complete or absent, memory-mapped when opened.

An entry holds `images.bin` (raw uint8 [N, C, H, W]), `labels.npy`, `bad_images.txt` (only if files were skipped) and, written
last, `manifest.json`. It is built under another name and renamed into place, so that no reader sees it half-made. Beside the entries,
`opened/` remembers which entry a source had when it was last opened, and the sizes and times of its files then: where those still
stand, the source is not listed again.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcm.data.labels import numbered
from fastcm.errors import ARRAY_FILE_ERRORS, InputError, RunError

VERSION = 2
RULES = 3  # of listing: what was listed by others is listed again
WATCHED_FILES = 20_000  # of a folder with more pictures, so many are looked at when it is opened again, evenly spaced
MAPPED_LABELS_BYTES = 64 << 20
SPARED = 0.1  # the share of the free disk space that a cache leaves


@dataclass(frozen=True)
class Entry:
    """An opened entry. images: uint8 memory-map [N, C, H, W]; labels: int64 [N] or None; bad: lines `file: reason` of skipped files."""

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    fingerprint: str
    bad: tuple[str, ...]


def cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    """`cache_dir`, else $FASTCM_CACHE, else ~/.cache/fastcm. Raises InputError where there is no home."""
    folder = folder_or_none(cache_dir)
    if folder is None:
        raise InputError("no home folder for the image cache: HOME is not set. Set FASTCM_CACHE to a folder.")
    return folder


def folder_or_none(cache_dir: str | os.PathLike | None) -> Path | None:
    """As `cache_folder`; None where there is no home."""
    try:
        return Path(cache_dir or os.environ.get("FASTCM_CACHE") or Path.home() / ".cache" / "fastcm")
    except RuntimeError:
        return None


def optional_folder(name: str) -> Path | None:
    """A folder of the cache for what costs time alone to make again; None where none can be made or written."""
    try:
        folder = cache_folder(None) / name
        make_folder(folder)
    except InputError:
        return None
    return folder


def entry_key(parts: Iterable[object]) -> str:
    """The key of an entry: a hash of everything that decides its pixels and labels (names, sizes, times, some contents, resolution)."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for part in parts:
        digest.update(f"\0{part}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:20]


def open_entry(entry: Path) -> Entry | None:
    """Opens a finished entry, or returns None where there is none or where it is damaged (it is then built again)."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        shape = tuple(manifest["shape"])
        if manifest["version"] != VERSION or (entry / "images.bin").stat().st_size != int(np.prod(shape)):
            return None
        images = np.memmap(entry / "images.bin", dtype=np.uint8, mode="r", shape=shape)
        labels = load_labels(entry / "labels.npy") if manifest["labelled"] else None
        bad = tuple((entry / "bad_images.txt").read_text(encoding="utf-8").splitlines()) if manifest["bad"] else ()
    except (*ARRAY_FILE_ERRORS, TypeError):
        return None
    return Entry(images, labels, tuple(manifest["classes"]) if manifest["classes"] else None, manifest["fingerprint"], bad)


def load_labels(path: Path) -> np.ndarray:
    """int64 [N]: in memory, or mapped where they are many."""
    return np.load(path, allow_pickle=False, mmap_mode="r" if path.stat().st_size > MAPPED_LABELS_BYTES else None)


def gather(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows [B] of pictures uint8 [N, C, H, W] as a new array.

    From a memory-map they are read, not mapped: one read per picture instead of a fault per page, and no pages of the file stay in this
    process, whose memory so does not grow with the data set.
    """
    mapped = images
    while isinstance(mapped, np.ndarray) and isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    if not isinstance(mapped, np.memmap) or not isinstance(images, np.memmap) or not images[0].flags.c_contiguous:
        return np.ascontiguousarray(images[rows])
    pixels = np.empty((len(rows), *images.shape[1:]), np.uint8)
    first, stride = images.ctypes.data - mapped.ctypes.data, images.strides[0]
    try:
        descriptor = os.open(mapped.filename, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # removed meanwhile: the map still holds it
        return np.ascontiguousarray(images[rows])
    try:
        for place in np.argsort(rows, kind="stable"):
            if os.preadv(descriptor, [pixels[place]], first + int(rows[place]) * stride) != pixels[place].nbytes:
                raise RunError(f"the image cache was cut short while it was used: {mapped.filename}. Run the same command again.")
    finally:
        os.close(descriptor)
    return pixels


Blocks = Iterable[np.ndarray]


def build_entry(
    entry: Path, blocks: Blocks, *, shape: tuple[int, int, int, int], labels: np.ndarray | None, class_names: tuple[str, ...] | None
) -> Entry:
    """Writes pixels that come in order, uint8 [n, C, H, W] blocks of `shape` in all, as an entry, and opens it."""
    make_folder(entry.parent)
    needed_bytes = int(np.prod(shape))
    if not has_room(entry.parent, needed_bytes):
        free_mb = shutil.disk_usage(entry.parent).free / 1e6
        raise RunError(
            f"no room for the image cache: {entry.parent} has {free_mb:.0f} MB free, {needed_bytes / 1e6:.0f} MB are needed. "
            "Set FASTCM_CACHE to another folder."
        )
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=entry.parent))
        digest = hashlib.sha256()
        with open(temporary / "images.bin", "wb") as file:
            for pixels in blocks:
                data = np.ascontiguousarray(pixels)
                file.write(data)
                digest.update(data)
        finish(temporary, digest, shape=shape, labels=labels, class_names=class_names, bad=[])
        publish(temporary, entry)
    except OSError as error:
        raise cannot_write(entry, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    opened = open_entry(entry)
    if opened is None:
        raise RunError(f"the image cache cannot be read back: {entry}. Remove it and run again.")
    return opened


def finish(
    folder: Path, digest, *, shape: tuple[int, ...], labels: np.ndarray | None, class_names: tuple[str, ...] | None, bad: Sequence[str]
) -> None:
    """Adds labels, the list of bad pictures and the manifest to a folder whose images.bin is whole. digest: sha256 of its bytes so far."""
    with open(folder / "images.bin", "rb") as file:
        os.fsync(file.fileno())
    if labels is not None:
        _write(folder / "labels.npy", lambda file: np.save(file, labels))
    if bad:
        _write(folder / "bad_images.txt", lambda file: file.write("".join(f"{line}\n" for line in bad).encode("utf-8", "replace")))
    manifest = {
        "version": VERSION,
        "shape": shape,
        "labelled": labels is not None,
        "classes": class_names,
        "bad": len(bad),
        "fingerprint": fingerprint(digest, shape, labels, class_names),
    }
    _write(folder / "manifest.json", lambda file: file.write(json.dumps(manifest).encode()))


def fingerprint(digest, shape: tuple[int, ...], labels: np.ndarray | None, class_names: tuple[str, ...] | None) -> str:
    """Finishes a sha256 `digest` of the pixels (uint8 NCHW bytes in order) into the identity of a data set, wherever it lies."""
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8"))
    digest.update(json.dumps([list(shape), list(class_names or numbered(labels) or ())]).encode())
    return digest.hexdigest()


def has_room(folder: Path, needed_bytes: int) -> bool:
    """Whether the disk would keep SPARED of its free space. `folder` need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return needed_bytes <= (1 - SPARED) * shutil.disk_usage(folder).free


def make_folder(folder: Path) -> None:
    """Raises InputError where it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "not writable")
    except OSError as error:
        raise InputError(f"cannot write the image cache: {folder} ({error.strerror}). Set FASTCM_CACHE to another folder.") from error


def cannot_write(entry: Path, error: OSError) -> RunError:
    return RunError(f"cannot write the image cache: {entry} ({error}). Make room, or set FASTCM_CACHE to another folder.")


Stamp = list  # [path, size, modification time in ns] of a watched file or folder


def stamps(paths: Iterable[str]) -> list[Stamp]:
    """What the files and folders look like now; a folder has size 0, what is missing -1."""
    return [_stamp(path) for path in paths]


def _stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return [path, -1, -1]
    return [path, 0 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns]


def remember(cache: Path, source: str, entry: str, watched: list[Stamp], notes: Sequence[str] = ()) -> None:
    """Writes down that `source` (a key of path and options) is the entry of that name while what is watched stays as it is."""
    record = {"version": RULES, "entry": entry, "watched": watched, "notes": list(notes)}
    folder = cache / "opened"
    try:
        folder.mkdir(exist_ok=True)
        temporary = folder / f".tmp-{os.getpid()}-{source}"
        temporary.write_text(json.dumps(record), encoding="ascii")
        os.replace(temporary, folder / f"{source}.json")
    except OSError:
        pass  # the source is listed again next time


def recall(cache: Path, source: str) -> tuple[str | None, list[str], str | None]:
    """(entry, notes, None) of a source that has not changed; (None, [], path) where that file or folder has.

    (None, [], None) for a source that was never opened, or by other rules.
    """
    try:
        record = json.loads((cache / "opened" / f"{source}.json").read_text(encoding="ascii"))
        if record["version"] != RULES:
            return None, [], None
        for known in record["watched"]:
            if known != _stamp(known[0]):
                return None, [], known[0]
        return str(record["entry"]), [str(note) for note in record["notes"]], None
    except (OSError, ValueError, KeyError, TypeError):
        return None, [], None


def _write(path: Path, write: Callable) -> None:
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def publish(temporary: Path, entry: Path) -> None:
    """Renames the finished folder into place. Another process that was faster wins: both made the same pixels."""
    os.chmod(temporary, 0o755)
    if entry.exists() and open_entry(entry) is None:
        shutil.rmtree(entry)
    try:
        os.rename(temporary, entry)
    except OSError:
        if open_entry(entry) is None:
            raise
    descriptor = os.open(entry.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
