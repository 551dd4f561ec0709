"""What is kept of a stream of features: moments by group, a bounded choice of rows, and mu and sigma on disk in ADM's format."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastcm import kernels
from fastcm.errors import ARRAY_FILE_ERRORS, InputError
from fastcm.evaluation.metrics import require

# Bytes for the rows that are kept (KID, precision and recall need them) and for the sums of the groups, per set of images.
ROW_BYTES, GROUP_BYTES = 128 << 20, 256 << 20
FEWEST_GROUPS, MOST_GROUPS = 10, 100
ORDER_KEY = int.from_bytes(b"judge")  # of the permutations that split data: no seed of training or sampling is as large by accident


def ordered(count: int, *, number: int) -> np.ndarray:
    """Permutation `number` of range(count), int64: fixed for ever, and independent of every seed of training and sampling."""
    return kernels.permute(np.arange(count), count, seed=ORDER_KEY, epoch=number)


class FeatureStatistics:
    """Features of `count` images, added block by block in the images' order; memory does not grow with the count.

    A fixed permutation deals the images to up to 100 groups, and the sums of x and x x^T of each group are kept in float64: groups drawn
    with replacement are the bootstrap. `rows`: a fixed random choice of images whose features are kept, all of them where they fit.
    """

    def __init__(self, count: int, size: int):
        if count < 1:
            raise InputError("too few samples in features: 0. Give more seeds or more data.")
        groups = min(count, max(FEWEST_GROUPS, min(MOST_GROUPS, GROUP_BYTES // (8 * size**2))))
        order = ordered(count, number=0)
        self.size, self.group = size, order % groups
        limit = min(count, max(1000, ROW_BYTES // (8 * size)))
        self.rows = np.flatnonzero(order < limit)
        self.values = np.empty((limit, size))
        self.counts, self.sums, self.squares = np.zeros(groups), np.zeros((groups, size)), np.zeros((groups, size, size))
        self.origin: np.ndarray | None = None
        self.seen = 0

    def add(self, features: np.ndarray) -> None:
        """Adds the next rows, float64 [B, size]. InputError where they are not finite."""
        require(features, "features", least=1)
        if self.origin is None:
            self.origin = features.mean(axis=0)  # sums of centred values: no digits are lost to a mean far from 0
        stop = self.seen + len(features)
        first, last = np.searchsorted(self.rows, (self.seen, stop))
        self.values[first:last] = features[self.rows[first:last] - self.seen]
        group, centred = self.group[self.seen : stop], features - self.origin
        for number in np.unique(group):
            part = centred[group == number]
            self.counts[number] += len(part)
            self.sums[number] += part.sum(axis=0)
            self.squares[number] += part.T @ part
        self.seen = stop

    def moments(self, weight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The mean [D] and covariance [D, D] (divisor N - 1); weight: how often each group counts, once where not given."""
        weight = np.ones(len(self.counts)) if weight is None else weight
        count = weight @ self.counts
        if count < 2:
            raise InputError(f"too few samples in features: {self.seen}. At least 2 are needed; give more seeds or more data.")
        mean = weight @ self.sums / count
        covariance = (np.tensordot(weight, self.squares, axes=1) - count * np.outer(mean, mean)) / (count - 1)
        return mean + self.origin, covariance

    def bootstrap(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Moments of `number` resamplings of the groups, the same at every call."""
        rng, groups = np.random.default_rng(0), len(self.counts)
        for _ in range(number):
            weight = np.bincount(rng.integers(0, groups, groups), minlength=groups).astype(float)
            if weight @ self.counts >= 2:
                yield self.moments(weight)

    @property
    def correction(self) -> float:
        """A bootstrap over G groups underestimates the deviation by sqrt((G - 1) / G)."""
        groups = len(self.counts)
        return (groups / max(groups - 1, 1)) ** 0.5


class ScoreStatistics:
    """The Inception Score (Salimans et al. 2016) of a stream: exp of the mean KL divergence of p(y | x) from p(y), per random split."""

    def __init__(self, count: int, classes: int, *, splits: int = 10):
        splits = max(1, min(splits, count // 2))
        self.split = ordered(count, number=0) % splits
        self.counts, self.sums, self.negative_entropy = np.zeros(splits), np.zeros((splits, classes)), np.zeros(splits)
        self.seen = 0

    def add(self, logits: np.ndarray) -> None:
        """Adds the next rows of class scores before the softmax, [B, classes]."""
        require(logits, "class scores", least=1)
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        split = self.split[self.seen : self.seen + len(logits)]
        np.add.at(self.counts, split, 1)
        np.add.at(self.sums, split, np.exp(log_p))
        np.add.at(self.negative_entropy, split, (np.exp(log_p) * log_p).sum(axis=1))
        self.seen += len(logits)

    def scores(self) -> np.ndarray:
        """One score per split."""
        marginal = self.sums / self.counts[:, None]
        entropy = -(marginal * np.log(np.maximum(marginal, np.finfo(float).tiny))).sum(axis=1)
        return np.exp(self.negative_entropy / self.counts + entropy)


def save_statistics(path: Path, mean: np.ndarray, covariance: np.ndarray, **facts: np.ndarray) -> None:
    """Writes `mu` [D] and `sigma` [D, D], float64, as ADM's reference files name them, and `facts` beside them; complete or absent."""
    from fastcm.generation.pictures import write_atomically

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, mu=mean, sigma=covariance, **facts)

    write_atomically(Path(path), write)


def load_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads `mu` and `sigma` of an `.npz`. InputError where they are missing, of other shapes, or not finite."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"mu", "sigma"} - set(file.files)
            if missing:
                raise InputError(
                    f"no array {min(missing)} in --reference: {path} (it holds {', '.join(file.files) or 'nothing'}). Give mu and sigma."
                )
            mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
    except FileNotFoundError:
        raise InputError(f"no such file in --reference: {path}. Give an .npz with mu and sigma.") from None
    except ARRAY_FILE_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"unreadable .npz in --reference: {path} ({error}). Copy it again.") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"mu {list(mean.shape)}, sigma {list(covariance.shape)}"
        raise InputError(f"wrong shapes in --reference: {path}: {shapes}. Give [D] and [D, D].")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"non-finite values in --reference: {path}. Make the statistics again.")
    return mean, covariance
