"""Figures over fixed halvings of the reference: the samples against one half, beside the other half as the real figure of the same count.

Half B of the data is what the judge never saw. Over fixed splits of B into B1 and B2, the real figure compares B1 with B2, and the figure
of a set of samples compares G with B2, where G has as many images as B1 and, if labels are known, as many of each class. A perfect
generator has the real figure in expectation, whatever the count. "fd" splits B at random, "fd_balanced" into equal shares of each class,
which takes the chance of the class counts out of both sides. Samples without labels bring class counts of their own: less varied ones
than a random half if they come from a class-balanced file, which flatters "fd"; more varied ones than a balanced half, which "fd_balanced"
counts against them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastcm.evaluation.features import halves, train_judge
from fastcm.evaluation.metrics import frechet, kernel_distance, precision_recall
from fastcm.evaluation.statistics import ordered

SPLITS = 20
NEIGHBOUR_LIMIT = 2000  # rows of a split that KID, precision and recall use: they need N x N matrices


@dataclass(frozen=True, eq=False)
class Features:
    """What the judge makes of a set of images: float64 [N, D], with their labels, int64 [N] or None."""

    values: np.ndarray
    labels: np.ndarray | None


def over_splits(generated: Features, reference: Features, *, metrics: Sequence[str], balanced: bool) -> dict:
    """Returns for each metric its mean and standard deviation over the splits, {"mean", "std", "real": {"mean", "std"}, "n"[, "ratio"]}."""
    figures: list[dict] = []
    real: list[dict] = []
    for number in range(1, SPLITS + 1):
        order = ordered(len(reference.values), number=number)
        first, second = halves(reference.labels, number=number) if balanced else np.array_split(order, 2)
        kept, drawn = paired(reference.labels[first], generated.labels, ordered(len(generated.values), number=number))
        other = reference.values[second]
        real.append(compare(reference.values[first[kept]], other, metrics=metrics))
        figures.append(compare(generated.values[drawn], other, metrics=metrics))
    result = {}
    for name in figures[0]:
        result[name] = {**spread([f[name] for f in figures]), "real": spread([r[name] for r in real]), "n": len(drawn)}
        if name == "fd":
            result[name]["ratio"] = result[name]["mean"] / max(result[name]["real"]["mean"], 1e-12)
    return result


def paired(wanted: np.ndarray, labels: np.ndarray | None, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picks rows of both sides with equal counts, class by class: (rows of `wanted`, rows of the samples, taken in `order`).

    wanted: labels of the real half. labels: of the samples; None pairs by total count alone.
    """
    if labels is None:
        count = min(len(wanted), len(order))
        return np.arange(count), order[:count]
    kept, drawn = [], []
    for label in np.unique(wanted):
        real, generated = np.flatnonzero(wanted == label), order[labels[order] == label]
        count = min(len(real), len(generated))
        kept.append(real[:count])
        drawn.append(generated[:count])
    return np.concatenate(kept), np.concatenate(drawn)


def compare(a: np.ndarray, b: np.ndarray, *, metrics: Sequence[str]) -> dict[str, float]:
    """The figures of features `a` against real features `b`."""
    figures = {"fd": frechet(a, b)} if "fd" in metrics else {}
    few_a, few_b = a[:NEIGHBOUR_LIMIT], b[:NEIGHBOUR_LIMIT]
    if "kid" in metrics:
        figures["kid"] = kernel_distance(few_a, few_b)
    if {"precision", "recall"} & set(metrics):
        both = dict(zip(("precision", "recall"), precision_recall(few_b, few_a), strict=True))
        figures |= {name: value for name, value in both.items() if name in metrics}
    return figures


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}


class TrainingJudge:
    """The cheap evaluation during training: one judge and one set of reference features for the whole run."""

    # Their own seeds: the model that is kept is chosen by them, so published figures must come from others.
    FIRST_SEED, LARGEST = 200_000, 1000

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.judge = train_judge(images, labels)
        rows = self.judge.reference
        self.reference = Features(self.judge.features(images[rows]), np.asarray(labels)[rows])

    def figures(self, draw: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> dict[str, float]:
        """draw(seeds, labels) -> uint8 [N, H, W, C]. Returns accuracy, fd, fd_ratio and score, the balanced ratio (lower is better)."""
        seeds = np.arange(self.FIRST_SEED, self.FIRST_SEED + min(len(self.reference.values), self.LARGEST))
        labels = seeds % self.judge.network.head.out_features
        images = draw(seeds, labels).transpose(0, 3, 1, 2)
        generated = Features(self.judge.features(images), labels)
        plain, balanced = (over_splits(generated, self.reference, metrics=("fd",), balanced=kind)["fd"] for kind in (False, True))
        accuracy = self.judge.accuracy(images, labels)
        return {"accuracy": accuracy, "fd": plain["mean"], "fd_ratio": plain["ratio"], "score": balanced["ratio"]}
