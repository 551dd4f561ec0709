"""Distances between sets of images, in float64: Frechet distance, kernel distance, precision and recall, nearest neighbours in pixel space.

Features are float64 [N, D]; pixel functions take uint8 images of one shape, [N, ...].
"""

import numpy as np

from fastcm.errors import InputError

BLOCK = 1024


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean [D] and the covariance [D, D] (divisor N - 1) of features [N, D]."""
    require(features, "features", least=2)
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, eq. 6): |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2). Both roots are symmetric, so no general matrix root, with its
    imaginary parts and failures on singular covariances, is needed.
    """
    if len(mean_a) != len(mean_b):
        raise InputError(f"other features than the reference's: {len(mean_a)} and {len(mean_b)} numbers per image. Use its network.")
    product = symmetric_root(cov_a) @ symmetric_root(cov_b)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.linalg.svd(product, compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def quick_frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray, root_b: np.ndarray) -> float:
    """`frechet_distance` for error bars, with the root of cov_b at hand: eigenvalues of B^(1/2) A B^(1/2) in place of a root and singular
    values, several times faster, and exact to about 1e-7 of the traces."""
    values = np.linalg.eigvalsh(root_b @ cov_a @ root_b)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two sets of features. It is biased upwards by about 1/N: compare figures of equal counts only."""
    return frechet_distance(*moments(a), *moments(b))


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a symmetric positive semi-definite matrix; eigenvalues that rounding made negative count as zero."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KID (Binkowski et al. 2018): the unbiased squared MMD of the kernel (x.y / D + 1)^3; its expectation is 0 for equal distributions."""
    require(a, "features", least=2)
    require(b, "features", least=2)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def kernel_distances(a: np.ndarray, b: np.ndarray, *, subsets: int = 100, size: int = 1000) -> np.ndarray:
    """KID as the field reports it: one `kernel_distance` per pair of random subsets of at most `size` rows, [subsets], always the same."""
    rng, size = np.random.default_rng(0), min(size, len(a), len(b))
    return np.array([kernel_distance(a[rng.permutation(len(a))[:size]], b[rng.permutation(len(b))[:size]]) for _ in range(subsets)])


def inside(points: np.ndarray, centres: np.ndarray, *, k: int) -> np.ndarray:
    """Whether each point lies in the ball of some centre that reaches to the centre's k-th nearest other centre, bool [N]."""
    require(points, "features", least=1)
    require(centres, "features", least=k + 1)
    blocks = [slice(start, start + BLOCK) for start in range(0, max(len(points), len(centres)), BLOCK)]
    # Roots before comparing: rounding then falls on both sides alike.
    radius = np.concatenate([np.sqrt(np.partition(squared_distances(centres[rows], centres), k, axis=1)[:, k]) for rows in blocks])
    return np.concatenate([(np.sqrt(squared_distances(points[rows], centres)) <= radius).any(axis=1) for rows in blocks])


def precision_recall(real: np.ndarray, generated: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of each set inside the other's k-nearest-neighbour balls.

    One outlier of a set has a wide ball: a high precision with a recall near zero means that the samples lie in such a ball alone.
    """
    return float(inside(generated, real, k=k).mean()), float(inside(real, generated, k=k).mean())


def nearest_distances(queries: np.ndarray, references: np.ndarray, *, own: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """For each query image the nearest reference: (root-mean-square pixel difference in 8-bit levels, float64 [N]; its index, int64 [N]).

    own: int64 [N], where each query stands among the references: an image is no neighbour of itself (an equal second copy is).
    """
    if queries.shape[1:] != references.shape[1:] or queries.dtype != np.uint8 or references.dtype != np.uint8:
        given = f"{queries.dtype} {queries.shape} and {references.dtype} {references.shape}"
        raise InputError(f"images of different kinds for neighbours: {given}. Give uint8 of one shape.")
    if not len(queries) or len(references) <= (own is not None):
        raise InputError(f"too few images for neighbours: {len(queries)} and {len(references)}. Give more.")
    distance, index = np.empty(len(queries)), np.empty(len(queries), np.int64)
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, start + BLOCK)
        squared, index[rows] = _nearest(queries[rows], references, own=None if own is None else own[rows])
        distance[rows] = np.sqrt(squared / queries[0].size)
    return distance, index


def _nearest(queries: np.ndarray, references: np.ndarray, *, own: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance and index of the nearest reference of a block of queries."""
    flat = queries.reshape(len(queries), -1).astype(np.float64)
    best, index = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for start in range(0, len(references), BLOCK):
        # Sums of products of bytes are exact in float64: equal images are at distance 0.
        block = references[start : start + BLOCK].reshape(-1, flat.shape[1]).astype(np.float64)
        squared = squared_distances(flat, block)
        if own is not None:
            here = np.flatnonzero((own >= start) & (own < start + len(block)))
            squared[here, own[here] - start] = np.inf
        nearest = squared.argmin(axis=1)
        value = squared[np.arange(len(queries)), nearest]
        index = np.where(value < best, start + nearest, index)
        best = np.minimum(value, best)
    return best, index


def copy_check(generated: np.ndarray, real: np.ndarray) -> dict:
    """Compares the distances generated -> nearest training image with real -> nearest training image, both from `nearest_distances`.

    Returns medians and 1st percentiles in 8-bit levels (root mean square per pixel), and `closer_share`: the share of generated images
    that are closer than the real 1st percentile. Without copying that is about 0.01; copies of training images give 1.
    """
    threshold = float(np.percentile(real, 1))
    return {
        "generated_median": float(np.median(generated)),
        "generated_p1": float(np.percentile(generated, 1)),
        "real_median": float(np.median(real)),
        "real_p1": threshold,
        "closer_share": float(np.mean(generated < threshold)),
        "identical": int(np.sum(generated == 0)),
    }


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [N, M] of rows."""
    return np.maximum((a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * a @ b.T, 0)


def require(features: np.ndarray, name: str, *, least: int) -> None:
    """Refuses what no metric can use: too few rows, or values that are not finite."""
    if features.ndim != 2 or len(features) < least:
        raise InputError(f"too few samples in {name}: {list(features.shape)}. At least {least} are needed; give more seeds or more data.")
    if not np.isfinite(features).all():
        count = int((~np.isfinite(features)).sum())
        raise InputError(f"non-finite values in {name}: {count} of {features.size}. Check the network that made them.")
