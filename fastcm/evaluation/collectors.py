"""What listens to a stream of samples: one collector per family of figures, each fed every block once and asked for its figures at the end.

`add(start, images, outputs)`: the number of the first image, uint8 [B, C, H, W], and what each extractor made of them, by its name.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastcm.errors import InputError
from fastcm.evaluation import metrics as maths
from fastcm.evaluation.features import Judge
from fastcm.evaluation.halves import Features, over_splits
from fastcm.evaluation.reference import Reference
from fastcm.evaluation.samples import Samples
from fastcm.evaluation.statistics import FeatureStatistics, ScoreStatistics, ordered

BOOTSTRAPS = 50
MANIFOLD_ROWS = 10_000  # rows on either side of precision and recall outside the halves
LPIPS_PAIRS, LPIPS_SIDE = 100, 64
CLOSEST = 10

Outputs = dict[str, tuple[np.ndarray, np.ndarray | None]]


class Collector(Protocol):
    def add(self, start: int, images: np.ndarray, outputs: Outputs) -> None: ...

    def figures(self) -> dict: ...


class Recognition:
    """accuracy: the share that the judge takes for the label it was asked for, in all and by class."""

    def __init__(self, samples: Samples, judge: Judge):
        self.labels, self.judge, self.right = samples.labels, judge, np.zeros(len(samples.labels), bool)

    def add(self, start: int, images: np.ndarray, outputs: Outputs) -> None:
        rows = slice(start, start + len(images))
        self.right[rows] = outputs[self.judge.name][1].argmax(axis=1) == self.labels[rows]

    def figures(self) -> dict:
        by_class = {int(c): float(self.right[self.labels == c].mean()) for c in np.unique(self.labels)}
        return {"accuracy": float(self.right.mean()), "accuracy_by_class": by_class}


class Distances:
    """fid and is over all samples, with error bars; kid, precision and recall over the rows that are kept.

    halving: the judge's reference with labels, where kid, precision and recall are those over halves, with fd beside them.
    """

    def __init__(self, samples: Samples, name: str, reference: Reference, metrics: Sequence[str], *, halving: Features | None = None):
        self.samples, self.name, self.reference, self.metrics, self.halving = samples, name, reference, metrics, halving
        self.statistics: FeatureStatistics | None = None
        self.scores: ScoreStatistics | None = None

    def add(self, start: int, images: np.ndarray, outputs: Outputs) -> None:
        features, scores = outputs[self.name]
        if self.statistics is None:
            self.statistics = FeatureStatistics(len(self.samples.images), features.shape[1])
            if scores is not None:
                self.scores = ScoreStatistics(len(self.samples.images), scores.shape[1])
        self.statistics.add(features)
        if self.scores is not None and "is" in self.metrics:
            self.scores.add(scores)

    def figures(self) -> dict:
        found: dict[str, dict] = {}
        if "fid" in self.metrics:
            found["fid"] = self.frechet()
        if "is" in self.metrics:
            if self.scores is None:
                raise InputError(f"no class scores for --metrics is: --features {self.name} gives features alone. Leave is out.")
            values = self.scores.scores()
            found["is"] = {"mean": float(values.mean()), "std": _deviation(values), "splits": len(values), "n": self.scores.seen}
        if self.halving is not None:
            found |= self.over_halves()
        else:
            found |= self.over_rows()
        return {name: {**figure, "features": self.name} for name, figure in found.items()}

    def frechet(self) -> dict:
        mean, covariance = self.statistics.moments()
        value = maths.frechet_distance(mean, covariance, self.reference.mean, self.reference.covariance)
        root = maths.symmetric_root(self.reference.covariance)
        drawn = [
            maths.quick_frechet(*moments, self.reference.mean, self.reference.covariance, root)
            for moments in self.statistics.bootstrap(BOOTSTRAPS)
        ]
        return {"mean": value, "std": _deviation(drawn) * self.statistics.correction, "n": self.statistics.seen}

    def over_halves(self) -> dict:
        rows = self.statistics.rows
        labels = None if self.samples.labels is None else self.samples.labels[rows]
        generated = Features(self.statistics.values, labels)
        wanted = [name for name in self.metrics if name in ("fd", "kid", "precision", "recall")]
        found = over_splits(generated, self.halving, metrics=wanted, balanced=False) if wanted else {}
        if "fd" in wanted:
            found["fd_balanced"] = over_splits(generated, self.halving, metrics=("fd",), balanced=True)["fd"]
        return found

    def over_rows(self) -> dict:
        if not {"kid", "precision", "recall"} & set(self.metrics):
            return {}
        real, generated, found = self.reference.values, self.statistics.values, {}
        if "kid" in self.metrics:
            values = maths.kernel_distances(generated, real)
            found["kid"] = {"mean": float(values.mean()), "std": _deviation(values), "n": min(1000, len(real), len(generated))}
        few_real, few = real[:MANIFOLD_ROWS], generated[:MANIFOLD_ROWS]
        for name, points, centres in (("precision", few, few_real), ("recall", few_real, few)):
            if name in self.metrics:
                share = float(maths.inside(points, centres, k=3).mean())
                # The bootstrap of a share, in closed form.
                found[name] = {"mean": share, "std": (share * (1 - share) / len(points)) ** 0.5, "n": len(points)}
        return found


class Neighbours:
    """neighbours: the nearest training image of each sample, in pixels. real: the same distances of real images."""

    def __init__(self, samples: Samples, training: np.ndarray, real: np.ndarray):
        self.training, self.real = training, real
        self.distance, self.index = np.empty(len(samples.images)), np.empty(len(samples.images), np.int64)
        self.closest: list[tuple[float, int, np.ndarray]] = []  # (distance, number, image) of the samples nearest to a training image

    def add(self, start: int, images: np.ndarray, outputs: Outputs) -> None:
        rows = slice(start, start + len(images))
        distance, self.index[rows] = maths.nearest_distances(np.ascontiguousarray(images), self.training)
        self.distance[rows] = distance
        new = [(float(distance[i]), start + i, images[i].copy()) for i in np.argsort(distance, kind="stable")[:CLOSEST].tolist()]
        self.closest = sorted([*self.closest, *new], key=lambda item: item[:2])[:CLOSEST]

    def figures(self) -> dict:
        counts = {"train_count": len(self.training), "real_count": len(self.real)}
        return {"neighbours": {**maths.copy_check(self.distance, self.real), **counts}}


class Diversity:
    """lpips: the mean LPIPS distance of random pairs of samples of one class (of any, without labels); 0 where all are alike."""

    def __init__(self, samples: Samples, lpips: Callable[[Tensor, Tensor], Tensor]):
        order = ordered(len(samples.images), number=0)
        order = np.argsort(order)
        if samples.labels is not None:
            order = order[np.argsort(samples.labels[order], kind="stable")]
        pairs = np.stack([order[:-1], order[1:]], axis=1)
        if samples.labels is not None:
            pairs = pairs[samples.labels[pairs[:, 0]] == samples.labels[pairs[:, 1]]]
        if len(pairs) < 2:
            raise InputError(f"too few samples for --metrics lpips: {len(order)}. Give three or more of a class.")
        chosen = np.argsort(ordered(len(pairs), number=1))[:LPIPS_PAIRS]
        self.pairs, self.lpips = pairs[chosen], lpips
        self.images: dict[int, np.ndarray] = {}
        self.wanted = set(self.pairs.flatten().tolist())

    def add(self, start: int, images: np.ndarray, outputs: Outputs) -> None:
        for row in self.wanted.intersection(range(start, start + len(images))):
            self.images[row] = images[row - start].copy()

    @torch.inference_mode()
    def figures(self) -> dict:
        values = []
        for first in range(0, len(self.pairs), 20):
            part = self.pairs[first : first + 20]
            x, y = (_enlarged(np.stack([self.images[row] for row in part[:, side]])) for side in (0, 1))
            values.append(self.lpips(x, y).numpy())
        values = np.concatenate(values)
        return {"lpips": {"mean": float(values.mean()), "std": _deviation(values) / len(values) ** 0.5, "n": len(values)}}


class Gallery:
    """Images for people: the first few of each class; a collector without figures."""

    def __init__(self, samples: Samples, *, per_class: int = 6, classes: int = 10):
        labels = samples.labels if samples.labels is not None else np.arange(len(samples.images)) % classes
        first = [np.flatnonzero(labels == c)[:per_class] for c in np.unique(labels)[:classes]]
        self.labelled = samples.labels is not None
        self.columns = {int(labels[rows[0]]): rows for rows in first if len(rows)}
        self.images: dict[int, np.ndarray] = {}
        self.wanted = {int(row) for rows in first for row in rows}

    def add(self, start: int, images: np.ndarray, outputs: Outputs) -> None:
        for row in self.wanted.intersection(range(start, start + len(images))):
            self.images[row] = images[row - start].copy()

    def figures(self) -> dict:
        return {}


def _enlarged(images: np.ndarray) -> Tensor:
    """uint8 [B, C, H, W] -> fp32 in [-1, 1], bilinear to LPIPS_SIDE where smaller: VGG halves its input four times."""
    x = torch.from_numpy(images).float() / 127.5 - 1
    side = max(LPIPS_SIDE, x.shape[-1])
    return x if x.shape[-1] == side else torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def _deviation(values: Sequence[float] | np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
