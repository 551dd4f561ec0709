"""group_norm against float64: values and gradients of every input."""

import itertools

import pytest
import torch

from fastcm.kernels.group_norm import group_norm


def arguments(batch, channels, size, modulated, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = random(batch, channels, size, size) * 2 + 0.7
    tensors = {"x": x, "weight": random(channels), "bias": random(channels)}
    if modulated:
        tensors |= {"scale": random(batch, channels) * 0.5, "shift": random(batch, channels)}
    return tensors


def exact_group_norm(x, weight, bias, scale=None, shift=None, *, groups, eps, silu):
    grouped = x.reshape(x.shape[0], groups, -1)
    y = ((grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, correction=0, keepdim=True) + eps).sqrt()).reshape(x.shape)
    y = y * weight[:, None, None] + bias[:, None, None]
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return y * torch.sigmoid(y) if silu else y


@pytest.mark.parametrize(("modulated", "silu", "channels_last"), list(itertools.product([False, True], repeat=3)))
def test_value_and_gradients_match_float64(modulated, silu, channels_last):
    tensors = arguments(2, 32, 5, modulated)
    exact = {k: v.double().requires_grad_() for k, v in tensors.items()}
    if channels_last:
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    expected = exact_group_norm(**exact, groups=8, eps=1e-5, silu=silu)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    x, weight, bias = (tensors[k] for k in ("x", "weight", "bias"))
    y = group_norm(x, 8, weight, bias, eps=1e-5, scale=tensors.get("scale"), shift=tensors.get("shift"), silu=silu)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert torch.allclose(y.double(), expected, atol=3e-6, rtol=1e-5)
    gradients = torch.autograd.grad(y, list(tensors.values()), upstream)
    for name, got, want in zip(tensors, gradients, torch.autograd.grad(expected, list(exact.values()), upstream.double()), strict=True):
        assert (got.double() - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1), name
