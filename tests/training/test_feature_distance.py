"""The distance by a classifier's features: what it is, whom its gradient reaches, and that it tells pictures apart as classes do."""

import torch
from torch import nn

from fastcm.evaluation.features import JudgeNetwork
from fastcm.training.feature_distance import ClassifierDistance


def small_classifier():
    torch.manual_seed(0)
    return JudgeNetwork(1, 8, 3)


def test_the_definition_in_float64():
    classifier = small_classifier()
    distance = ClassifierDistance(classifier)
    x, y = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    a, b, expected = x.double(), y.double(), 0.0
    for layer in classifier.double().trunk:
        a, b = layer(a), layer(b)
        if isinstance(layer, nn.LeakyReLU):
            unit = [f / f.square().sum(1, keepdim=True).sqrt() for f in (a, b)]
            squared = (unit[0] - unit[1]).square().sum(1)
            expected = expected + (squared if squared.ndim == 1 else squared.mean((1, 2)))
    classifier.float()
    assert expected.min() > 0.01
    torch.testing.assert_close(distance(x, y).double(), expected, rtol=1e-4, atol=1e-6)


def test_equal_images_are_at_zero_and_the_gradient_reaches_images_alone():
    distance = ClassifierDistance(small_classifier())
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    assert torch.equal(distance(x, x.detach()), torch.zeros(2))
    distance(x, torch.randn(2, 1, 8, 8)).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in distance.parameters())


def test_larger_pictures_are_averaged_to_32():
    torch.manual_seed(0)
    distance = ClassifierDistance(JudgeNetwork(3, 32, 4))
    x, y = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    small = [nn.functional.avg_pool2d(image, 2) for image in (x, y)]
    torch.testing.assert_close(distance(x, y), distance(*small))
