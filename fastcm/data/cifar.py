"""CIFAR-10's python batches: the 50,000 training pictures of a folder or of cifar-10-python.tar.gz, read without running a pickle."""

import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fastcm.data.labels import MAX_CLASSES, check_labels
from fastcm.errors import InputError
from fastcm.weights.class_names import check_names
from fastcm.weights.safe_unpickle import load_arrays

FOLDER = "cifar-10-batches-py"
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
META = "batches.meta"
MAX_BYTES = 64 << 20  # of one batch (a real one has 31 MB), and of any header in the archive


class Cifar(NamedTuple):
    """The training pictures, uint8 [N, 3072] as red, green and blue planes of 32x32, with their classes."""

    pixels: tuple[np.ndarray, ...]
    labels: np.ndarray
    class_names: tuple[str, ...] | None

    @property
    def images_shape(self) -> tuple[int, int, int, int]:
        return len(self.labels), 32, 32, 3

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Yields uint8 [<= rows, 32, 32, 3] in order."""
        for batch in self.pixels:
            for start in range(0, len(batch), rows):
                yield batch[start : start + rows].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def files_of(path: Path) -> list[Path] | None:
    """The batches of a folder that holds CIFAR-10, or holds its folder; None for any other folder."""
    for folder in (path, path / FOLDER):
        if (folder / BATCHES[0]).is_file():
            return [folder / name for name in (*BATCHES, META)]
    return None


def open_cifar(path: Path) -> Cifar:
    """Reads the five training batches (the test batch is left alone) and the names of the classes. Raises InputError."""
    contents = _of_folder(files_of(path)) if path.is_dir() else _of_archive(path)
    missing = [name for name in BATCHES if name not in contents]
    if missing:
        raise InputError(f"no CIFAR-10 in --data: {path} (it lacks {', '.join(missing)}). Give {FOLDER} or cifar-10-python.tar.gz, whole.")
    pixels, labels = zip(*(_batch(contents[name], f"{path}: {name}") for name in BATCHES), strict=True)
    labels = np.concatenate(labels)
    names = None
    if META in contents:
        meta = _unpickled(contents[META], f"{path}: {META}")
        written = meta.get("label_names") if isinstance(meta, dict) else None
        if isinstance(written, list) and len(written) > labels.max():
            names = check_names(written, f"--data: {path}: {META}")
    return Cifar(pixels, labels, names)


def _of_folder(files: list[Path]) -> dict[str, bytes]:
    contents = {}
    for file in files:
        if file.is_file():
            if file.stat().st_size > MAX_BYTES:
                raise InputError(f"an oversized batch in --data: {file} ({file.stat().st_size:,} bytes). Copy it again.")
            contents[file.name] = file.read_bytes()
    return contents


def _of_archive(path: Path) -> dict[str, bytes]:
    contents = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=_Bounded(stream), mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isreg() and name in (*BATCHES, META):
                    contents[name] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(f"unreadable archive in --data: {path} ({error}). Copy it again, or unpack it and give {FOLDER}.") from error
    return contents


class _Bounded:
    """A stream that refuses to read much at once, so that a few bytes cannot claim all memory."""

    def __init__(self, stream):
        self.stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_BYTES:
            raise OSError(f"a member or header of {size:,} bytes")
        return self.stream.read(size)


def _batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 [N, 3072], labels int64 [N]) of one batch."""
    batch = _unpickled(content, where)
    pixels = getattr(batch.get("data"), "values", None) if isinstance(batch, dict) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3072 or not len(pixels):
        raise InputError(f"no pictures of 3x32x32 in --data: {where}. Give CIFAR-10's python version.")
    labels = batch.get("labels")
    if not isinstance(labels, list) or not all(type(label) is int and abs(label) <= MAX_CLASSES for label in labels):
        raise InputError(f"no list of labels in --data: {where}. Give CIFAR-10's python version.")
    return pixels, check_labels(np.array(labels, dtype=np.int64), len(pixels), f"--data: {where}")


def _unpickled(content: bytes, where: str) -> Any:
    return load_arrays(content, where, expected="a CIFAR-10 python batch")
