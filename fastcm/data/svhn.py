"""SVHN's `.mat` files (`train_32x32.mat`): X uint8 [32, 32, 3, N] and y, read by scipy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastcm.data.array_files import Arrays
from fastcm.data.labels import check_labels
from fastcm.data.npz import check_images
from fastcm.errors import ARRAY_FILE_ERRORS, InputError

DIGITS = tuple("0123456789")


def open_mat(path: Path) -> Arrays:
    """Opens the pictures and their digits; the 0 that SVHN writes as 10 is class 0. Raises InputError."""
    from scipy import io

    variables = {name: (shape, kind) for name, shape, kind in _read(io.whosmat, path)}
    if "X" not in variables or "y" not in variables:
        listed = ", ".join(variables)[:200] or "nothing"
        raise InputError(f"no pictures X with labels y in --data: {path} (it holds {listed}). Give SVHN's train_32x32.mat.")
    (shape, kind), where = variables["X"], f"X in --data: {path}"
    if kind != "uint8" or len(shape) != 4:
        raise InputError(f"not pictures in {where}: {kind} {list(shape)}. Expected uint8 [H, W, C, N].")
    shape = check_images((shape[3], *shape[:3]), np.dtype(np.uint8), where)
    content = _read(io.loadmat, path, variable_names=("X", "y"))
    pixels, labels = content["X"], np.asarray(content["y"])
    if labels.dtype.kind == "f" and np.array_equal(labels, labels.round()):
        labels = labels.astype(np.int64)
    labels = check_labels(labels.ravel(), shape[0], f"y in --data: {path}")
    if labels.max() > 10 or (labels.max() == 10 and labels.min() == 0):
        raise InputError(f"label out of range in y in --data: {path}: {labels.max()}. SVHN has the digits 1 to 9, and 0 written as 10.")

    def blocks(rows: int) -> Iterator[np.ndarray]:
        for start in range(0, shape[0], rows):
            yield np.ascontiguousarray(pixels[..., start : start + rows].transpose(3, 0, 1, 2))

    return Arrays(shape, labels % 10, DIGITS, blocks)


def _read(read: Any, path: Path, **options: Any) -> Any:
    try:
        return read(path, **options)
    except NotImplementedError:
        raise InputError(f"a MATLAB 7.3 file in --data: {path}. Save it with -v7.") from None
    except (*ARRAY_FILE_ERRORS, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"unreadable .mat in --data: {path} ({reason}). Copy it again.") from error
