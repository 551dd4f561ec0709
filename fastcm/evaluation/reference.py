"""The real side of the distances: statistics of the reference images, computed once per data set and feature network, then cached."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastcm.errors import ARRAY_FILE_ERRORS, InputError
from fastcm.evaluation.extractors import Extractor
from fastcm.evaluation.samples import BLOCK
from fastcm.evaluation.statistics import FeatureStatistics, load_statistics, save_statistics

VERSION = 1


@dataclass(frozen=True, eq=False)
class Reference:
    """mean [D], covariance [D, D]; values: rows that are kept, float64 [M, D], None from a file of statistics; count of images or None."""

    mean: np.ndarray
    covariance: np.ndarray
    values: np.ndarray | None
    count: int | None
    sha256: str


def compute_reference(extractor: Extractor, images: np.ndarray, rows: np.ndarray, *, data_sha256: str, cache: Path | None) -> Reference:
    """Statistics of images[rows], uint8 [N, C, H, W] and ascending int64, from the cache folder where they were made before."""
    identity = f"{VERSION} {data_sha256} {extractor.sha256} {extractor.resize}".encode() + rows.astype("<i8").tobytes()
    key = hashlib.sha256(identity).hexdigest()
    path = None if cache is None else Path(cache) / f"reference-{key[:20]}.npz"
    found = None if path is None else _read(path)
    if found is None:
        found = _compute(extractor, images, rows)
        if path is not None:
            save_statistics(path, *found[:2], values=found[2])
    mean, covariance, values = found
    return Reference(mean, covariance, values, len(rows), key)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """What the cache holds, or None where there is nothing or it is damaged (it is then made again)."""
    try:
        mean, covariance = load_statistics(path)
        with np.load(path, allow_pickle=False) as file:
            return mean, covariance, file["values"]
    except ARRAY_FILE_ERRORS:  # InputError is a ValueError
        return None


def _compute(extractor: Extractor, images: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    statistics = None
    with tqdm(total=len(rows), desc="reference", unit="img", disable=None, leave=False) as bar:
        for start in range(0, len(rows), BLOCK):
            features, _ = extractor.extract(np.ascontiguousarray(images[rows[start : start + BLOCK]]))
            statistics = statistics or FeatureStatistics(len(rows), features.shape[1])
            statistics.add(features)
            bar.update(len(features))
    if statistics is None:
        raise InputError("no image in --data: the reference is empty. Give more data.")
    return *statistics.moments(), statistics.values


def read_reference(path: Path) -> Reference:
    """A file of `mu` and `sigma`, as ADM publishes them: enough for fid, not for kid, precision and recall."""
    mean, covariance = load_statistics(path)
    digest = hashlib.sha256(np.ascontiguousarray(mean).tobytes() + np.ascontiguousarray(covariance).tobytes()).hexdigest()
    return Reference(mean, covariance, None, None, digest)
