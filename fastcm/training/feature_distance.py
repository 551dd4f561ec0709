"""Distances through a frozen network: LPIPS from given weights, or the features of a classifier of the run's own pictures."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm.consistency.lpips import unit_length
from fastcm.data.dataset import Dataset
from fastcm.errors import InputError
from fastcm.evaluation.features import LARGEST_SIDE, JudgeNetwork, train_judge
from fastcm.training.config import TrainConfig

# Not the seed of the judge that `fastcm evaluate` trains: a model must not be marked by the network that taught it.
CLASSIFIER_SEED = 1


class ClassifierDistance(nn.Module):
    """LPIPS (Zhang et al. 2018, equation 1) with the layers of a small classifier and weights of one.

    forward(x, y): fp32 [B, C, H, W] in [-1, 1] -> [B]. Features after every rectifier are scaled to unit length over the channels; squared
    differences are summed over channels, averaged over pixels and summed over layers. Sides above 32 pixels are area-averaged to 32.
    """

    def __init__(self, classifier: JudgeNetwork):
        super().__init__()
        self.layers = classifier.trunk.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if max(x.shape[-2:]) > LARGEST_SIDE:
            x, y = (F.adaptive_avg_pool2d(image, LARGEST_SIDE) for image in (x, y))
        total = torch.zeros(len(x), device=x.device)
        for layer in self.layers:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.LeakyReLU):
                difference = (unit_length(x) - unit_length(y)).square().sum(dim=1)
                total = total + difference.reshape(len(x), -1).mean(dim=1)
        return total


def feature_distance(config: TrainConfig, dataset: Dataset) -> nn.Module | None:
    """The frozen module of objective.distance, on the CPU; None for a distance of pixels. Raises InputError naming what is missing."""
    distance = config.objective.distance
    if distance == "lpips":
        from fastcm.weights.lpips_weights import load_lpips

        return load_lpips(config.lpips_weights)
    if distance != "classifier":
        return None
    if dataset.labels is None:
        raise InputError(
            f"unlabelled data for objective.distance classifier in --data: {config.data}. Give classes, or use pseudo_huber or lpips."
        )
    return ClassifierDistance(train_judge(dataset.images, dataset.labels, seed=CLASSIFIER_SEED).network)
