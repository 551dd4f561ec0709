"""The protocol of an evaluation: which images are compared with which, in what counts and how often; all its figures come from here.

Half B of the data is what the judge never saw. Over fixed splits of B into B1 and B2, the real figure compares B1 with B2, and the figure
of a set of samples compares G with B2, where G has as many images as B1 and, if labels are known, as many of each class. A perfect
generator has the real figure in expectation, whatever the count. "fd" splits B at random, "fd_balanced" into equal shares of each class,
which takes the chance of the class counts out of both sides. Samples without labels bring class counts of their own: less varied ones
than a random half if they come from a class-balanced file, which flatters "fd"; more varied ones than a balanced half, which "fd_balanced"
counts against them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastcm.errors import InputError, nearest
from fastcm.evaluation.features import FEATURES, Judge, halves, ordered, train_judge
from fastcm.evaluation.metrics import copy_check, frechet, kernel_distance, precision_recall

METRICS = ("accuracy", "fd", "kid", "precision", "recall", "neighbours")
SPLITS = 20
NEIGHBOUR_LIMIT = 2000  # rows of a split that KID, precision and recall use: they need N x N matrices


@dataclass(frozen=True, eq=False)
class Samples:
    """A set of generated images: uint8 [N, C, H, W], the labels they were asked for, int64 [N] or None, and how they were made."""

    name: str
    images: np.ndarray
    labels: np.ndarray | None = None
    nfe: int | None = None


@dataclass(frozen=True, eq=False)
class Features:
    """What the judge makes of a set of images: float64 [N, D], with their labels, int64 [N] or None."""

    values: np.ndarray
    labels: np.ndarray | None


def evaluate(
    sets: Sequence[Samples],
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    judge: Judge | None = None,
    metrics: Sequence[str] = METRICS,
    held_out: np.ndarray | None = None,
) -> dict:
    """Returns {"protocol": ..., "real": figures, "sets": [figures of each set]}, ready for JSON.

    images, labels: the data set, uint8 [N, C, H, W] and int [N]; labels may be None for the metric "neighbours" alone.
    judge: from `train_judge(images, labels)`; trained here where absent. held_out: rows that the generator was not trained on.
    Raises InputError for unknown metrics, other shapes, missing labels, too few samples.
    """
    check_metrics(metrics, labels)
    for samples in sets:
        check_shape(samples.name, samples.images.shape[1:], images)
    rows = [{"name": s.name, "count": len(s.images), "nfe": s.nfe} for s in sets]
    real: dict = {"name": "real"}
    protocol: dict = {"data_count": len(images), "data_sha256": digest(images, labels)}
    if set(metrics) != {"neighbours"}:
        judge = judge if judge is not None else train_judge(images, labels)
        protocol |= describe(judge, images, labels)
        real |= {"count": len(judge.reference), "accuracy": judge.held_out_accuracy}
        reference = Features(judge.features(images[judge.reference]), np.asarray(labels)[judge.reference])
        for row, samples in zip(rows, sets, strict=True):
            measure(samples, row, judge=judge, reference=reference, metrics=metrics)
        real |= {name: value["real"] for name, value in rows[0].items() if isinstance(value, dict) and "real" in value}
    if "neighbours" in metrics:
        seen = np.ones(len(images), bool)
        seen[[] if held_out is None else held_out] = False
        for row, samples in zip(rows, sets, strict=True):
            row["neighbours"] = copy_check(samples.images, images[seen], images[~seen])
        real["neighbours"] = {key: rows[0]["neighbours"][f"real_{key}"] for key in ("median", "p1")}
        protocol["neighbours_real"] = rows[0]["neighbours"]["real_images"]
    return {"protocol": protocol, "real": real, "sets": rows}


def check_metrics(metrics: Sequence[str], labels: np.ndarray | None) -> None:
    """Refuses unknown metrics, and those that the data have no labels for."""
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"unknown metric in --metrics: {metric}. Choose from {', '.join(METRICS)}.{nearest(metric, METRICS)}")
    if not metrics:
        raise InputError(f"no metric in --metrics: []. Choose from {', '.join(METRICS)}.")
    if labels is None and set(metrics) != {"neighbours"}:
        raise InputError(
            f"unlabelled data with --metrics {','.join(metrics)}: the features are those of a classifier of the data. "
            "Give one sub-folder per class or an .npz with arr_1, or pass --metrics neighbours."
        )


def check_shape(name: str, shape: Sequence[int], images: np.ndarray) -> None:
    """Refuses samples of another (C, H, W) than the data's."""
    if tuple(shape) != images.shape[1:]:
        shapes = f"{list(shape)} for {list(images.shape[1:])} (channels, height, width)"
        raise InputError(f"images of another shape than --data in {name}: {shapes}. Give data of their size and channels.")


def measure(samples: Samples, row: dict, *, judge: Judge, reference: Features, metrics: Sequence[str]) -> None:
    """Adds the figures in the judge's features to the row of a set."""
    if "accuracy" in metrics and samples.labels is not None:
        right = judge.predict(samples.images) == samples.labels
        row["accuracy"] = float(right.mean())
        row["accuracy_by_class"] = {int(c): float(right[samples.labels == c].mean()) for c in np.unique(samples.labels)}
    if {"fd", "kid", "precision", "recall"} & set(metrics):
        generated = Features(judge.features(samples.images), samples.labels)
        row |= over_splits(generated, reference, metrics=metrics, balanced=False)
        if "fd" in metrics:
            row["fd_balanced"] = over_splits(generated, reference, metrics=("fd",), balanced=True)["fd"]
            row["fd_all"] = frechet(generated.values, reference.values)


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


def describe(judge: Judge, images: np.ndarray, labels: np.ndarray) -> dict:
    """What a reader needs to make the same figures again."""
    return {
        "features": f"{FEATURES} features of a classifier trained on {len(judge.fit):,} of these images",
        "judge_seed": judge.seed,
        "judge_held_out_accuracy": judge.held_out_accuracy,
        "reference": "the images that the judge was not trained on",
        "reference_count": len(judge.reference),
        "reference_sha256": digest(images[judge.reference], np.asarray(labels)[judge.reference]),
        "halvings": SPLITS,
    }


def digest(images: np.ndarray, labels: np.ndarray | None) -> str:
    """sha256 of the pixels [N, C, H, W] uint8, then the labels as little-endian int64."""
    state = hashlib.sha256()
    for start in range(0, len(images), 4096):
        state.update(np.ascontiguousarray(images[start : start + 4096]))
    if labels is not None:
        state.update(np.asarray(labels).astype("<i8").tobytes())
    return state.hexdigest()


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
