"""The protocol of an evaluation: which images are compared with which, in which features and counts; its figures come from here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from fastcm.errors import InputError, nearest
from fastcm.evaluation import halves
from fastcm.evaluation.collectors import BOOTSTRAPS, MANIFOLD_ROWS, Collector, Distances, Diversity, Gallery, Neighbours, Recognition
from fastcm.evaluation.extractors import Extractor
from fastcm.evaluation.features import Judge, data_sha256, train_judge
from fastcm.evaluation.metrics import nearest_distances
from fastcm.evaluation.reference import Reference, compute_reference
from fastcm.evaluation.samples import Samples, check_shape
from fastcm.evaluation.statistics import ordered

# By default; lpips needs weights and consistency a model, so they are added where those are given.
METRICS = ("accuracy", "fd", "fid", "kid", "is", "precision", "recall", "neighbours")
ALL_METRICS = (*METRICS, "lpips", "consistency")
JUDGE_METRICS, FEATURE_METRICS = {"accuracy", "fd"}, {"fid", "kid", "is", "precision", "recall"}
ROW_METRICS = {"kid", "precision", "recall"}
REAL_NEIGHBOURS = 2000  # real images whose nearest training image is looked up, at most


@dataclass(frozen=True, eq=False)
class World:
    """What samples are measured against: the data, the feature networks, and what was computed of the data once for all sets."""

    metrics: Sequence[str]
    extractor: Extractor | None = None
    judge: Judge | None = None
    reference: Reference | None = None
    halving: halves.Features | None = None
    training: np.ndarray | None = None
    real_neighbours: np.ndarray | None = None
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    protocol: dict = field(default_factory=dict)


def evaluate(
    sets: Sequence[Samples],
    images: np.ndarray | None,
    labels: np.ndarray | None,
    *,
    judge: Judge | None = None,
    extractor: Extractor | None = None,
    reference: Reference | None = None,
    metrics: Sequence[str] = METRICS,
    held_out: np.ndarray | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    cache: Path | None = None,
    galleries: dict[str, tuple[Gallery, Neighbours | None]] | None = None,
) -> dict:
    """Returns {"protocol": ..., "real": figures, "sets": [figures of each set]}, ready for JSON.

    images, labels: the data set, uint8 [N, C, H, W] and int [N]; labels may be None for metrics without the judge; both are None where
    `reference` holds statistics alone. extractor: whose features fid, kid, is, precision and recall use; the judge's where not given.
    judge: from `train_judge(images, labels)`; trained here where absent and needed. held_out: rows that the generator was not trained on.
    cache: a folder for reference statistics. galleries: filled with images to show, by the name of the set.
    Raises InputError for unknown metrics, other shapes, missing labels, too few samples, features that are not finite.
    """
    check_metrics(metrics, labels, features=None if extractor is None else extractor.name, statistics=images is None, lpips=lpips)
    for samples in sets:
        if images is not None:
            check_shape(samples.name, samples.images.shape[1:], images.shape[1:])
    options = {"judge": judge, "extractor": extractor, "reference": reference, "held_out": held_out, "lpips": lpips, "cache": cache}
    return figures(sets, prepare(images, labels, metrics=metrics, **options), galleries=galleries)


def figures(sets: Sequence[Samples], world: World, *, galleries: dict | None = None) -> dict:
    """What `evaluate` returns, against a world that `prepare` made."""
    metrics = world.metrics
    rows = [measure(samples, world, galleries) for samples in sets]
    real: dict = {"name": "real"}
    if world.judge is not None:
        real |= {"count": len(world.judge.reference), "accuracy": world.judge.held_out_accuracy}
        real |= {name: value["real"] for name, value in rows[0].items() if isinstance(value, dict) and "real" in value}
    if "neighbours" in metrics:
        real["neighbours"] = {key: rows[0]["neighbours"][f"real_{key}"] for key in ("median", "p1")}
    return {"protocol": world.protocol, "real": real, "sets": rows}


def check_metrics(
    metrics: Sequence[str], labels: np.ndarray | None, *, features: str | None = None, statistics: bool = False, lpips: object = ""
) -> None:
    """Refuses unknown metrics, and those that the data have no labels or images for. features: of another network than the judge."""
    for metric in metrics:
        if metric not in ALL_METRICS:
            raise InputError(f"unknown metric in --metrics: {metric}. Choose from {', '.join(ALL_METRICS)}.{nearest(metric, ALL_METRICS)}")
    if not metrics:
        raise InputError(f"no metric in --metrics: []. Choose from {', '.join(ALL_METRICS)}.")
    wanted = ",".join(metrics)
    if statistics and (JUDGE_METRICS | ROW_METRICS | {"neighbours", "consistency"}) & set(metrics):
        raise InputError(f"a file of statistics with --metrics {wanted}: it serves fid alone. Give --data, or pass --metrics fid.")
    judged = JUDGE_METRICS | (FEATURE_METRICS if features is None else set())
    if not statistics and labels is None and judged & set(metrics):
        raise InputError(
            f"unlabelled data with --metrics {wanted}: the features are those of a classifier of the data. "
            "Give one sub-folder per class or an .npz with arr_1, or pass --features inception, or --metrics neighbours."
        )
    if "lpips" in metrics and lpips is None:
        raise InputError("no weights for --metrics lpips: the option --lpips-weights is missing. Give it, or leave lpips out.")


def prepare(
    images: np.ndarray | None,
    labels: np.ndarray | None,
    *,
    metrics: Sequence[str] = METRICS,
    judge: Judge | None = None,
    extractor: Extractor | None = None,
    reference: Reference | None = None,
    held_out: np.ndarray | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    cache: Path | None = None,
) -> World:
    """Trains the judge where it is needed and computes the reference, once for all sets; arguments as in `evaluate`."""
    protocol: dict = {"metrics": list(metrics), "rounding": "uint8: (x + 1) 127.5, clamped, half to even"}
    if images is not None:
        protocol |= {"data_count": len(images), "data_sha256": data_sha256(images, labels)}
    parts: dict = {}
    if isinstance(extractor, Judge):
        judge, extractor = extractor, None
    if extractor is not None and extractor.name == Judge.name:
        raise InputError(f"a name that is taken in features: {extractor.name}. Name the network otherwise.")
    if JUDGE_METRICS & set(metrics) or (FEATURE_METRICS & set(metrics) and extractor is None):
        judge = judge if judge is not None else train_judge(images, labels, cache=cache, held_out=held_out)
        protocol |= {"judge_seed": judge.seed, "judge_held_out_accuracy": judge.held_out_accuracy, "judge_sha256": judge.sha256}
        protocol["halvings"] = halves.SPLITS
        parts["judge"] = judge
    if (FEATURE_METRICS | {"fd"}) & set(metrics):
        extractor = extractor if extractor is not None else judge
        judged = extractor is judge
        rows = judge.reference if judged else np.arange(0 if images is None else len(images))
        if reference is None:
            reference = compute_reference(extractor, images, rows, data_sha256=protocol["data_sha256"], cache=cache)
        parts |= {"extractor": extractor, "reference": reference}
        if reference.values is None and (ROW_METRICS | {"fd"}) & set(metrics):
            shown = ",".join(metrics)
            raise InputError(f"a file of statistics with --metrics {shown}: it serves fid alone. Drop --reference, or pass --metrics fid.")
        if "fd" in metrics or (judged and ROW_METRICS & set(metrics)):
            whole = (
                reference if judged else compute_reference(judge, images, judge.reference, data_sha256=protocol["data_sha256"], cache=cache)
            )
            kept = judge.reference[ordered(len(judge.reference), number=0) < len(whole.values)]
            parts["halving"] = halves.Features(whole.values, np.asarray(labels)[kept])
        protocol |= describe_features(extractor, reference, images, labels, rows, judged=judged)
    if "neighbours" in metrics:
        seen = np.ones(len(images), bool)
        seen[[] if held_out is None else held_out] = False
        parts["training"], parts["real_neighbours"], protocol["neighbours_real"] = real_neighbours(images, seen)
    if "lpips" in metrics:
        parts["lpips"] = lpips
    return World(metrics=tuple(metrics), protocol=protocol, **parts)


def describe_features(extractor: Extractor, reference: Reference, images, labels, rows: np.ndarray, *, judged: bool) -> dict:
    """What a reader needs to make the same distances again."""
    facts = {
        "features_name": extractor.name,
        "features": extractor.description,
        "features_sha256": extractor.sha256,
        "resize": extractor.resize,
        "bootstraps": BOOTSTRAPS,
        "manifold_k": 3,
        "manifold_rows": MANIFOLD_ROWS,
        "reference_count": reference.count,
    }
    if images is None or reference.values is None:
        return {**facts, "reference": "statistics from a file", "reference_sha256": reference.sha256}
    what = "the images that the judge was not trained on" if judged else "all images of the data"
    return {**facts, "reference": what, "reference_sha256": data_sha256(images, labels, rows)}


def real_neighbours(images: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """(training images, distances of real images to the nearest of them, which real images), by rows that training has seen.

    The real images are those held out from training or, where there are none, training images against the others (leave-one-out).
    """
    if not seen.all():
        training, held_out = images[seen], images[~seen][:REAL_NEIGHBOURS]
        return training, nearest_distances(held_out, training)[0], "held-out images"
    rows = np.flatnonzero(ordered(len(images), number=0) < REAL_NEIGHBOURS)
    return images, nearest_distances(images[rows], images, own=rows)[0], "training images, leave-one-out"


def measure(samples: Samples, world: World, galleries: dict | None = None) -> dict:
    """The figures of one set, in one pass over its images."""
    wanted, collectors = set(world.metrics), []
    if "accuracy" in wanted and samples.labels is not None:
        collectors.append(Recognition(samples, world.judge))
    if world.extractor is not None:
        judged = world.extractor is world.judge
        names = [name for name in world.metrics if judged or name != "fd"]
        collectors.append(Distances(samples, world.extractor.name, world.reference, names, halving=world.halving if judged else None))
        if "fd" in wanted and not judged:
            collectors.append(Distances(samples, world.judge.name, world.reference, ("fd",), halving=world.halving))
    near = Neighbours(samples, world.training, world.real_neighbours) if "neighbours" in wanted else None
    collectors += [near] if near is not None else []
    collectors += [Diversity(samples, world.lpips)] if "lpips" in wanted else []
    if galleries is not None:
        galleries[samples.name] = (gallery := Gallery(samples), near)
        collectors.append(gallery)
    listen(samples, [e for e in (world.judge, world.extractor) if e is not None], collectors)
    row: dict = {"name": samples.name, "count": len(samples.images), "nfe": samples.nfe}
    for collector in collectors:
        row |= collector.figures()
    return row


def listen(samples: Samples, extractors: Sequence[Extractor], collectors: Sequence[Collector]) -> None:
    """Feeds every block of the samples, and its features, to the collectors."""
    start = 0
    for block in samples.blocks():
        outputs = {}
        for extractor in extractors:
            if extractor.name not in outputs:
                outputs[extractor.name] = extractor.extract(block)
        for collector in collectors:
            collector.add(start, block, outputs)
        start += len(block)
