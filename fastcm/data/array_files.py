"""Arrays of pictures in files of their own, with labels in another: IDX (MNIST's format, plain or .gz) and `.npy`; read in blocks."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastcm.data.labels import MAX_CLASSES, check_labels
from fastcm.data.npz import check_images
from fastcm.errors import ARRAY_FILE_ERRORS, InputError

# http://yann.lecun.com/exdb/mnist: two zero bytes, the type, the number of dimensions, each dimension as a big-endian uint32.
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IDX_NAME = re.compile(r"(.*[-._])?idx\d?([-._]?ubyte|[-._]?int)?(\.gz)?|.*ubyte(\.gz)?", re.IGNORECASE)
IDX_IMAGES = re.compile(r"(.*)images([-.])idx3([-.])ubyte(\.gz)?", re.IGNORECASE)


class Arrays(NamedTuple):
    """Pictures and their classes. images_shape: [N, H, W, C]; labels int64 [N] or None; blocks(rows) yields uint8 [<= rows, H, W, C]."""

    images_shape: tuple[int, int, int, int]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    blocks: Callable[[int], Iterator[np.ndarray]]


class IdxHeader(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]


def is_idx(name: str) -> bool:
    """Whether a file's name says IDX, as `train-images-idx3-ubyte.gz`."""
    return IDX_NAME.fullmatch(name) is not None


def labels_beside(images: Path) -> Path | None:
    """The file of labels that bears the pictures' own name, with "labels" (IDX: "idx1") in the place of "images": the first that exists."""
    found = re.search(r"images?|imgs?", images.name, re.IGNORECASE)
    if found is None:
        return None
    for word in ("labels", "label"):
        name = images.name[: found.start()] + word + images.name[found.end() :].replace("idx3", "idx1").replace("idx4", "idx1")
        bare = re.sub(r"\.gz$", "", name)
        for candidate in (name, bare, f"{bare}.gz") if is_idx(name) else (name,):
            if images.with_name(candidate).is_file():
                return images.with_name(candidate)
    return None


def idx_images(folder: Path, names: list[str]) -> Path | None:
    """The training pictures of a folder with these files, in sorted order, by MNIST's usual name `train-images-idx3-ubyte`; None for none.

    Raises InputError where several sets lie there, as EMNIST's do.
    """
    names = [name for name in names if IDX_IMAGES.fullmatch(name)]
    sets = {re.sub(r"\.gz$", "", name): name for name in reversed(names)}  # of a plain and a .gz file, the plain one
    train = {key: name for key, name in sets.items() if not re.search("t10k|test", key)} or sets
    if len(train) > 1:
        raise InputError(f"several sets in --data: {folder} ({', '.join(sorted(train.values()))}). Name one file of pictures.")
    return folder / next(iter(train.values())) if train else None


def open_idx(images: Path, labels: Path | None = None) -> Arrays:
    """Opens pictures uint8 [N, H, W] or [N, H, W, C] in IDX. EMNIST's, whose files are named so, are turned upright. Raises InputError."""
    header = read_idx_header(images, dimensions=(3, 4))
    shape = check_images(header.shape, header.dtype, f"--data: {images}")
    upright = images.name.lower().startswith("emnist-")

    def blocks(rows: int) -> Iterator[np.ndarray]:
        for block in read_idx(images, header, rows):
            block = block.reshape(len(block), *shape[1:])
            yield block.transpose(0, 2, 1, 3) if upright else block

    if upright:
        shape = shape[0], shape[2], shape[1], shape[3]
    return Arrays(shape, None if labels is None else read_labels(labels, shape[0]), None, blocks)


def open_npy(images: Path, labels: Path | None = None) -> Arrays:
    """Opens a `.npy` of pictures uint8 [N, H, W] or [N, H, W, C], memory-mapped. Raises InputError."""
    pixels = _load_npy(images, "r")
    shape = check_images(pixels.shape, pixels.dtype, f"--data: {images}")

    def blocks(rows: int) -> Iterator[np.ndarray]:
        for start in range(0, len(pixels), rows):
            yield np.ascontiguousarray(pixels[start : start + rows]).reshape(-1, *shape[1:])

    return Arrays(shape, None if labels is None else read_labels(labels, shape[0]), None, blocks)


def read_labels(path: Path, count: int) -> np.ndarray:
    """Class indices int64 [count] of a file of their own: IDX, `.npy`, or the only array of an `.npz`. Raises InputError."""
    where = f"the file of labels: {path}"
    if path.suffix.lower() == ".npy":
        return check_labels(_load_npy(path, None), count, where)
    if path.suffix.lower() == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if len(arrays.files) != 1:
                    raise InputError(f"several arrays in {where} ({', '.join(arrays.files)[:200]}). Save the labels alone.")
                return check_labels(arrays[arrays.files[0]], count, where)
        except ARRAY_FILE_ERRORS as error:
            raise _unreadable(where, error) from error
    if not is_idx(path.name):
        raise InputError(f"not class indices in {where}. Beside an array of pictures give a .npy, an .npz or an IDX file.")
    header = read_idx_header(path, dimensions=(1,))
    if header.dtype.kind not in "iu" or header.shape != (count,):
        found = f"{header.dtype.newbyteorder('=')} {list(header.shape)}"
        raise InputError(f"not one class index per picture in {where}: {found}. Expected {count} whole numbers.")
    labels = np.concatenate([np.empty(0, header.dtype), *read_idx(path, header, MAX_CLASSES)])
    return check_labels(labels.astype(np.int64), count, where)


def read_idx_header(path: Path, *, dimensions: tuple[int, ...]) -> IdxHeader:
    """Type and shape of an IDX file. Raises InputError for another magic number, or a size that is not the header's."""
    with _opened(path) as stream:
        head = stream.read(4)
        if len(head) < 4:
            raise _truncated(path)
        if head[:2] != b"\0\0" or head[2] not in IDX_TYPES or head[3] not in dimensions:
            expected = {1: "labels (0x00000801)", 3: "pictures (0x00000803)"}[dimensions[0]]
            raise InputError(f"another magic number in {path}: 0x{head.hex()}. Give an IDX file of {expected}.")
        sizes = stream.read(4 * head[3])
        if len(sizes) < 4 * head[3]:
            raise _truncated(path)
        header = IdxHeader(np.dtype(IDX_TYPES[head[2]]), tuple(int(size) for size in np.frombuffer(sizes, ">u4")))
        if not _is_gzip(path):
            size, wanted = path.stat().st_size, stream.tell() + _bytes(header)
            if size < wanted:
                raise _truncated(path)
            if size > wanted:
                shape = "x".join(map(str, header.shape))
                raise InputError(f"another size than its header says in {path}: {size:,} bytes, {wanted:,} for {shape}. Copy it again.")
    return header


def read_idx(path: Path, header: IdxHeader, rows: int) -> Iterator[np.ndarray]:
    """Yields the content in blocks of `rows`. Raises InputError where the file ends early or late."""
    count, row_bytes = header.shape[0], _bytes(header) // max(1, header.shape[0])
    with _opened(path) as stream:
        stream.read(4 + 4 * len(header.shape))
        for start in range(0, count, rows):
            size = min(rows, count - start)
            data = stream.read(size * row_bytes)
            if len(data) != size * row_bytes:
                raise _truncated(path)
            yield np.frombuffer(data, header.dtype).reshape(size, *header.shape[1:])
        if stream.read(1):
            raise InputError(f"another size than its header says in {path}: more than {_bytes(header):,} bytes. Copy it again.")


def _bytes(header: IdxHeader) -> int:
    return int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


class _opened:  # noqa: N801 - a context, used like open()
    """The file, decompressed; what gzip raises at a damaged one becomes InputError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> BinaryIO:
        try:
            self.stream = gzip.open(self.path) if _is_gzip(self.path) else open(self.path, "rb")
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return self.stream

    def __exit__(self, kind, error, trace) -> None:
        self.stream.close()
        if isinstance(error, EOFError):
            raise _truncated(self.path) from error
        if isinstance(error, OSError | zlib.error):
            raise _unreadable(self.path, error) from error


def _truncated(path: Path) -> InputError:
    return InputError(f"truncated file in --data: {path} ({path.stat().st_size:,} bytes). Copy it again.")


def _unreadable(where: object, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    return InputError(f"unreadable file in {where} ({' '.join(str(error).split())[:200]}). Copy it again.")


def _load_npy(path: Path, mmap_mode: str | None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except ARRAY_FILE_ERRORS as error:
        raise _unreadable(f"--data: {path}", error) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"not a .npy in --data: {path}. Save it with numpy.save.")
    return array
