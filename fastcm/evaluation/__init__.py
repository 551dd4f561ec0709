"""How good samples are: a judge trained on the data, distances between sets of images, and the protocol that makes them comparable."""

from fastcm.evaluation.features import Judge, train_judge
from fastcm.evaluation.protocol import METRICS, Samples, TrainingJudge, evaluate

__all__ = ["METRICS", "Judge", "Samples", "TrainingJudge", "evaluate", "train_judge"]
