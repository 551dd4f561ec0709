"""ema_update: the average of a constant is the constant, and any average matches float64."""

import pytest
import torch
from kernel_checks import each_implementation, using  # noqa: F401

from fastcm import kernels


@pytest.mark.parametrize("n", [0, 1, 63, 1023, 4096, 5003])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_matches_float64(device, n, as_tensor):
    average, source = torch.randn(2, n).unbind()
    expected = 0.97 * average.double() + (1 - 0.97) * source.double()
    found = average.to(device)
    kernels.ema_update(found, source.to(device), torch.tensor([0.97], device=device) if as_tensor else 0.97)
    if n == 0:
        kernels.ema_update(torch.ones(1, device=device), torch.ones(1, device=device), 0.5)  # no launch for an empty buffer
    assert torch.allclose(found.cpu().double(), expected, atol=3e-7)


def test_average_of_a_constant_is_the_constant(device):
    average, source = torch.full((100,), 0.3, device=device), torch.full((100,), 0.3, device=device)
    for decay in (0.0, 0.5, 0.9999, 1.0):
        kernels.ema_update(average, source, decay)
    assert torch.equal(average, source)


def test_ends_of_the_decay(device):
    average, source = torch.randn(2, 77).to(device).unbind()
    before = average.clone()
    kernels.ema_update(average, source, 1.0)
    assert torch.equal(average, before)
    kernels.ema_update(average, source, 0.0)
    assert torch.allclose(average, source, atol=1e-6)


def test_source_that_requires_grad_leaves_the_average_without(device):
    average, source = torch.zeros(8, device=device), torch.ones(8, device=device, requires_grad=True)
    kernels.ema_update(average, source, 0.75)
    assert not average.requires_grad and torch.equal(average, torch.full_like(average, 0.25))


def test_tangent_matches_float64():
    average, source, tangent = torch.randn(3, 9)
    with using("triton"):

        def updated(average, source):
            average = average.clone()
            kernels.ema_update(average, source, 0.75)
            return average

        _, found = torch.func.jvp(updated, (average, source), (torch.ones(9), tangent))
    assert torch.allclose(found.double(), 0.75 + 0.25 * tangent.double(), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average": torch.zeros(4, dtype=torch.bfloat16)}, r"ema_update\(average\): bfloat16\. Use float32"),
        ({"average": torch.zeros(8)[::2]}, r"non-contiguous tensor in ema_update\(average\): strides \[2\]"),
        ({"average": torch.zeros(4, requires_grad=True)}, r"requires_grad in ema_update\(average\)"),
        ({"source": torch.zeros(5)}, r"ema_update\(source\): \[5\]\. Use \[4\]"),
        ({"decay": 1.5}, r"ema_update\(decay\): 1\.5\. Use a number from 0 to 1"),
        ({"decay": torch.zeros(2)}, r"ema_update\(decay\): \[2\]\. Use \[1\]"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        kernels.ema_update(**({"average": torch.zeros(4), "source": torch.zeros(4), "decay": 0.9} | changes))


@pytest.mark.slow
def test_registered_op_keeps_its_contract(device):
    average, source, decay = torch.randn(50).to(device), torch.randn(50).to(device), torch.tensor([0.9], device=device)
    kernels.ema_update(average, source, decay)
    torch.library.opcheck(torch.ops.fastcm.ema_update.default, (average, source, decay, 0.0))
    torch.library.opcheck(torch.ops.fastcm.ema_update.default, (average, source, None, 0.1))
