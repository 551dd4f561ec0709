"""Decoded pictures on disk: one folder per data set and resolution, complete or absent, memory-mapped when opened.

An entry holds `images.bin` (raw uint8 [N, C, H, W]), `labels.npy`, `bad_images.txt` (only if files were skipped) and, written
last, `manifest.json`. It is built under a temporary name and renamed into place, so that a killed run leaves nothing half-made.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcm.errors import InputError, RunError

VERSION = 1


@dataclass(frozen=True)
class Entry:
    """An opened entry. images: uint8 memory-map [N, C, H, W]; labels: int64 [N] or None; bad: lines `file: reason` of skipped files."""

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    fingerprint: str
    bad: tuple[str, ...]


def cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    """`cache_dir`, else $FASTCM_CACHE, else ~/.cache/fastcm."""
    return Path(cache_dir or os.environ.get("FASTCM_CACHE") or Path.home() / ".cache" / "fastcm")


def entry_key(parts: Iterable[object]) -> str:
    """The key of an entry: a hash of everything that decides its pixels (names, sizes, modification times, resolution)."""
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
        labels = np.load(entry / "labels.npy", allow_pickle=False) if manifest["labelled"] else None
        bad = tuple((entry / "bad_images.txt").read_text(encoding="utf-8").splitlines()) if manifest["bad"] else ()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Entry(images, labels, tuple(manifest["classes"]) if manifest["classes"] else None, manifest["fingerprint"], bad)


Blocks = Iterable[tuple[np.ndarray, np.ndarray]]


def build_entry(
    entry: Path,
    blocks: Callable[[list[str]], Blocks],
    *,
    shape: tuple[int, int, int, int],
    labels: np.ndarray | None,
    class_names: tuple[str, ...] | None,
) -> Entry:
    """Writes an entry and opens it.

    `blocks(bad)` yields (rows int64 [n], pixels uint8 [n, C, H, W]) in order and appends a line to `bad` for each row that it
    leaves out. `shape` is that of the whole with no row left out; labels are int64 [N] over the same rows.
    """
    temporary = _temporary_beside(entry, int(np.prod(shape)))
    try:
        digest, kept, bad = hashlib.sha256(), [], []
        with open(temporary / "images.bin", "wb") as file:
            for rows, pixels in blocks(bad):
                data = np.ascontiguousarray(pixels)
                file.write(data)
                digest.update(data)
                kept.append(rows)
            _flush_to_disk(file)
        kept = np.concatenate(kept)
        if labels is not None:
            labels = labels[kept]
            _write(temporary / "labels.npy", lambda file: np.save(file, labels))
        if bad:
            _write(temporary / "bad_images.txt", lambda file: file.write("".join(f"{line}\n" for line in bad).encode("utf-8", "replace")))
        shape = (len(kept), *shape[1:])
        manifest = {
            "version": VERSION,
            "shape": shape,
            "labelled": labels is not None,
            "classes": class_names,
            "bad": len(bad),
            "fingerprint": fingerprint(digest, shape, labels, class_names),
        }
        _write(temporary / "manifest.json", lambda file: file.write(json.dumps(manifest).encode()))
        _publish(temporary, entry)
    except OSError as error:
        raise RunError(f"cannot write the image cache: {entry} ({error}). Make room, or set FASTCM_CACHE to another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    opened = open_entry(entry)
    if opened is None:
        raise RunError(f"the image cache cannot be read back: {entry}. Remove it and run again.")
    return opened


def fingerprint(digest, shape: tuple[int, ...], labels: np.ndarray | None, class_names: tuple[str, ...] | None) -> str:
    """Finishes a sha256 `digest` of the pixels (uint8 NCHW bytes in order) into the identity of a data set, wherever it lies."""
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8"))
    digest.update(json.dumps([list(shape), list(class_names or ())]).encode())
    return digest.hexdigest()


def _temporary_beside(entry: Path, needed_bytes: int) -> Path:
    """A new folder on the entry's file system, once it is known to have the room."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(entry.parent).free
        if free_bytes < needed_bytes:
            raise RunError(
                f"no room for the image cache: {entry.parent} has {free_bytes / 1e6:.0f} MB free, {needed_bytes / 1e6:.0f} MB are needed. "
                "Set FASTCM_CACHE to another folder."
            )
        return Path(tempfile.mkdtemp(prefix=".tmp-", dir=entry.parent))
    except OSError as error:
        raise InputError(f"cannot write the image cache: {entry.parent} ({error.strerror}). Set FASTCM_CACHE to another folder.") from error


def _write(path: Path, write: Callable) -> None:
    with open(path, "wb") as file:
        write(file)
        _flush_to_disk(file)


def _flush_to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(temporary: Path, entry: Path) -> None:
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
