"""distance against float64 autograd of its definition."""

import itertools

import pytest
import torch

from fastcm.kernels.distance import distance, distance_reference


def arguments(batch=3, shape=(3, 5, 7), dtype=torch.float32, target_network=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = lambda: torch.randn(batch, *shape, generator=generator)  # noqa: E731
    vector = lambda: torch.rand(batch, generator=generator) + 0.5  # noqa: E731
    x_student, F_student, x_target = image(), image().to(dtype), image()
    student = [x_student, F_student, vector(), vector()]
    target = [x_target, image().to(dtype), vector(), vector()] if target_network else [x_target, None, None, None]
    return [*student, *target, vector()]


def double(args):
    return [None if a is None else a.double() for a in args]


@pytest.mark.parametrize(("kind", "c", "target_network"), list(itertools.product(["l1", "l2", "pseudo_huber"], [0.0, 0.03], [True, False])))
def test_value_and_gradient_match_float64(kind, c, target_network):
    args = arguments(target_network=target_network)
    exact = double(args)
    exact[1].requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.5])
    D_student = exact[2].view(-1, 1, 1, 1) * exact[0] + exact[3].view(-1, 1, 1, 1) * exact[1]
    D_target = exact[6].view(-1, 1, 1, 1) * exact[4] + exact[7].view(-1, 1, 1, 1) * exact[5] if target_network else exact[4]
    d = (D_student - D_target).flatten(1)
    expected = {"l1": d.abs().mean(1), "l2": d.square().mean(1), "pseudo_huber": (d.square().sum(1) + c**2).sqrt() - c}[kind] * exact[8]
    (expected_gradient,) = torch.autograd.grad(expected, exact[1], upstream.double())
    args[1].requires_grad_()
    value = distance(*args, kind=kind, c=c)
    (gradient,) = torch.autograd.grad(value, args[1], upstream)
    assert torch.allclose(value.double(), expected, rtol=1e-6)
    assert torch.allclose(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-8)
    assert torch.allclose(distance_reference(*args, kind=kind, c=c).double(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "l2", "pseudo_huber"])
def test_equal_images_have_distance_zero_and_gradient_zero(kind):
    args = arguments()
    args[4:8] = [a.clone() for a in args[:4]]
    args[1].requires_grad_()
    for function in (distance, distance_reference):
        value = function(*args, kind=kind)
        assert torch.equal(value, torch.zeros(3))
        (gradient,) = torch.autograd.grad(value.sum(), args[1])
        assert torch.equal(gradient, torch.zeros_like(gradient))
