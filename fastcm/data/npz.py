"""`.npz` files in the field's convention: arr_0 uint8 [N, H, W, C], arr_1 labels; pictures are read in blocks, not as a whole."""

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from fastcm.data.labels import check_labels
from fastcm.errors import ARRAY_FILE_ERRORS, InputError
from fastcm.generation.pictures import MODES

IMAGE_LAYOUT = "uint8 [N, H, W, C] with C = 1, 3 or 4, or [N, H, W]"


@dataclass(frozen=True)
class Arrays:
    """The shape of an `.npz` file's pictures, with their labels read. images_shape: [N, H, W, C]; labels int64 [N] or None."""

    class_names: ClassVar[None] = None

    path: Path
    images_shape: tuple[int, int, int, int]
    labels: np.ndarray | None

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Streams arr_0 as uint8 [<= rows, H, W, C] blocks, so that memory does not grow with the file."""
        count, row_bytes = self.images_shape[0], int(np.prod(self.images_shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                _read_npy_header(stream, self.path)
                for start in range(0, count, rows):
                    size = min(rows, count - start)
                    data = stream.read(size * row_bytes)
                    if len(data) != size * row_bytes:
                        raise InputError(f"truncated file in --data: {self.path}. Copy it again.")
                    yield np.frombuffer(data, np.uint8).reshape(size, *self.images_shape[1:])
        except ARRAY_FILE_ERRORS as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"unreadable .npz in --data: {self.path} ({error}). Copy it again.") from error


def open_npz(path: Path) -> Arrays:
    """Reads the shapes and labels of an `.npz` in the field's convention (arr_0 pictures, arr_1 labels). Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "arr_0.npy" not in names:
                raise InputError(f"no array arr_0 in --data: {path} (it holds {_listed(names)}). arr_0 is {IMAGE_LAYOUT}.")
            with archive.open("arr_0.npy") as stream:
                shape, fortran, dtype = _read_npy_header(stream, path)
        if fortran:
            raise InputError(f"Fortran order of arr_0 in --data: {path}. Save it with numpy.ascontiguousarray.")
        shape = check_images(shape, dtype, f"arr_0 in --data: {path}")
        labels = None
        if "arr_1.npy" in names:
            with zipfile.ZipFile(path) as archive, archive.open("arr_1.npy") as stream:
                stated, _, dtype = _read_npy_header(stream, path)
            if dtype.hasobject or int(np.prod(stated, dtype=object)) != shape[0]:  # before room is made for them
                raise InputError(f"not one class index per picture in arr_1 in --data: {path}: {dtype} {list(stated)}. Save int64 [N].")
            with np.load(path, allow_pickle=False) as arrays:
                labels = check_labels(arrays["arr_1"], shape[0], f"arr_1 in --data: {path}")
        return Arrays(path, shape, labels)
    except ARRAY_FILE_ERRORS as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"unreadable .npz in --data: {path} ({reason}). arr_0 is {IMAGE_LAYOUT}, arr_1 int64 labels.") from error


def _listed(names: list[str]) -> str:
    return " ".join(", ".join(names).split())[:200] or "nothing"


def _read_npy_header(stream, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of the `.npy` that `stream` begins with; leaves the stream at the first pixel."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise InputError(f"unknown .npy version in --data: {path}: {version}. Save it with numpy.savez.")
    return readers[version](stream)


def check_images(shape: tuple[int, ...], dtype: np.dtype, where: str) -> tuple[int, int, int, int]:
    """Returns the shape as [N, H, W, C]; raises InputError where it is no stack of pictures. `where` names the array and its file."""
    if dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in MODES):
        raise InputError(f"not pictures in {where}: {dtype} {list(shape)}. Expected {IMAGE_LAYOUT}.")
    if 0 in shape:
        raise InputError(f"no picture in {where}: shape {list(shape)}. Expected {IMAGE_LAYOUT}.")
    if shape[1] * shape[2] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise InputError(f"pictures too large in {where}: shape {list(shape)}. {Image.MAX_IMAGE_PIXELS:,} pixels each are the limit.")
    return tuple(int(size) for size in (shape if len(shape) == 4 else (*shape, 1)))
