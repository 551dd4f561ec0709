"""How good samples are: feature networks, distances between sets of images, the protocol that makes them comparable, the step search.

In: sets of samples (arrays, or streams that a model draws block by block), a reference `Dataset`, the figures asked for. Out: figures with
their error bars and the protocol that they hold under, as data, text or a page; noise levels that a search has found. Knows nothing of how
a model was trained.
"""

from fastcm.evaluation.features import Judge, check_judged, train_judge
from fastcm.evaluation.halves import TrainingJudge
from fastcm.evaluation.protocol import METRICS, evaluate
from fastcm.evaluation.samples import Samples, Stream
from fastcm.evaluation.self_consistency import self_consistency

__all__ = ["METRICS", "Judge", "Samples", "Stream", "TrainingJudge", "check_judged", "evaluate", "self_consistency", "train_judge"]
