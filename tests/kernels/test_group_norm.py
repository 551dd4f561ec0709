"""group_norm: values and the gradients of every input against float64, in one pass and split over programs."""

import importlib
import itertools

import pytest
import torch
from kernel_checks import each_implementation, using  # noqa: F401

from fastcm import kernels

MODULE = importlib.import_module("fastcm.kernels.group_norm")  # the package has the function under this name
LAST = torch.channels_last


def arguments(shape, modulated, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = {"x": (torch.randn(shape, generator=generator) * 2 + 0.7).to(dtype)}
    tensors |= {name: torch.randn(shape[1], generator=generator) for name in ("weight", "bias")}
    if modulated:
        # Halves of one matrix, as an embedding's projection gives them.
        scale, shift = torch.randn(shape[0], 2 * shape[1], generator=generator).to(dtype).chunk(2, 1)
        tensors |= {"scale": scale, "shift": shift}
    return tensors


def exact(x, weight, bias, scale=None, shift=None, *, groups, silu=True):
    grouped = x.reshape(x.shape[0], groups, -1)
    y = ((grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
    y = y * weight[:, None, None] + bias[:, None, None]
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return y * torch.sigmoid(y) if silu else y


def assert_matches(device, tensors, groups, silu=True):
    """Value and gradients; errors relative to the largest entry, for a channel's sum may be near zero."""
    upstream = torch.randn(tensors["x"].shape, generator=torch.Generator().manual_seed(1)).to(tensors["x"].dtype)
    leaves = {name: t.double().requires_grad_() for name, t in tensors.items()}
    want = exact(**leaves, groups=groups, silu=silu)
    want_gradients = torch.autograd.grad(want, list(leaves.values()), upstream.double())
    tensors = {name: t.to(device) for name, t in tensors.items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=LAST)
    for t in tensors.values():
        t.requires_grad_()
    found = kernels.group_norm(groups=groups, silu=silu, **tensors)
    gradients = torch.autograd.grad(found, list(tensors.values()), upstream.to(device))
    assert found.is_contiguous(memory_format=LAST)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[tensors["x"].dtype]
    for name, t, got, expected in zip(
        ("y", *tensors), (tensors["x"], *tensors.values()), (found, *gradients), (want, *want_gradients), strict=True
    ):
        assert got.dtype == t.dtype and got.shape == t.shape, name
        error = (got.detach().cpu().double() - expected.detach()).abs().max() / expected.detach().abs().max()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize(("modulated", "silu"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_pass_matches_float64(device, modulated, silu, dtype):
    assert MODULE.slab_of(32, 8, 25, dtype.itemsize, backward=True) is not None
    assert_matches(device, arguments((2, 32, 5, 5), modulated, dtype), 8, silu)


@pytest.mark.parametrize(("modulated", "silu"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_split_matches_float64(device, monkeypatch, modulated, silu, dtype):
    monkeypatch.setattr(MODULE, "slab_of", lambda *args, **options: None)
    assert_matches(device, arguments((2, 32, 9, 5), modulated, dtype), 8, silu)


# Odd channels and pixels, D that is no power of two, one group, one channel a group, batch of one, one pixel.
ODD = [((1, 24, 3, 7), 4), ((2, 36, 4, 9), 3), ((1, 72, 4, 4), 2), ((2, 7, 9, 3), 7), ((1, 20, 1, 1), 2), ((1, 64, 8, 8), 1)]


@pytest.mark.parametrize(("shape", "groups"), ODD, ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["one pass", "split"])
def test_odd_shapes(device, monkeypatch, shape, groups, split):
    if split:
        monkeypatch.setattr(MODULE, "slab_of", lambda *args, **options: None)
    assert_matches(device, arguments(shape, True), groups)


@pytest.mark.parametrize(("channels", "size"), [(192, 8), (576, 8), (1152, 8), (1152, 4), (192, 24)])
def test_channel_counts_of_the_published_networks(device, channels, size):
    assert_matches(device, arguments((1, channels, size, size), True, torch.float16), 32)


def test_slabs_hold_whole_groups_and_wide_accesses():
    for channels, itemsize in itertools.product((32, 64, 96, 128, 192, 256, 384, 512, 576, 768, 1152), (2, 4)):
        for pixels, backward in itertools.product((16, 64, 256, 1024, 4096), (False, True)):
            groups = min(32, channels // 4)
            slab = MODULE.slab_of(channels, groups, pixels, itemsize, backward=backward)
            if slab is None:
                assert pixels >= 256
            else:
                assert slab["CHANNELS"] % (channels // groups) == 0 and slab["CHANNELS"] * itemsize % 16 == 0
                assert slab["BLOCK_P"] >= pixels and slab["BLOCK_C"] >= slab["CHANNELS"]


def test_without_weight_and_bias(device):
    x = arguments((2, 16, 4, 4), False)["x"]
    found = kernels.group_norm(x.to(device).contiguous(memory_format=LAST), 4, None, None, silu=False).cpu()
    assert torch.allclose(found.double(), exact(x.double(), torch.ones(16), torch.zeros(16), groups=4, silu=False), atol=1e-5)


def test_contiguous_input_keeps_its_layout():
    tensors = arguments((2, 16, 4, 4), False)
    with using("triton"):
        found = kernels.group_norm(groups=4, **tensors)
    want = exact(**{name: t.double() for name, t in tensors.items()}, groups=4)
    assert found.is_contiguous() and torch.allclose(found.double(), want, atol=1e-5)


def test_tangent_matches_float64():
    tensors = arguments((2, 16, 4, 4), True)
    names, values = list(tensors), tuple(tensors.values())
    tangents = tuple(torch.randn(t.shape) for t in values)
    with using("triton"):
        _, found = torch.func.jvp(lambda *v: kernels.group_norm(groups=4, **dict(zip(names, v, strict=True))), values, tangents)
    values, tangents = (tuple(t.double() for t in tensors) for tensors in (values, tangents))
    _, want = torch.func.jvp(lambda *v: exact(**dict(zip(names, v, strict=True)), groups=4), values, tangents)
    assert want.abs().max() > 1 and torch.allclose(found.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 8, 4)}, r"group_norm\(x\): \[2, 8, 4\]"),
        ({"x": torch.zeros(2, 8, 4, 4).double()}, r"group_norm\(x\): float64\. Use float32 or bfloat16 or float16"),
        ({"groups": 3}, r"group_norm\(groups\): 3\. Use a divisor of the 8 channels"),
        ({"weight": torch.zeros(4)}, r"group_norm\(weight\): \[4\]\. Use \[8\]"),
        ({"bias": torch.zeros(8, device="meta")}, r"wrong device in group_norm\(bias\): meta"),
        ({"scale": torch.zeros(2, 8)}, r"group_norm\(shift\): None\. Give both or neither"),
        ({"scale": torch.zeros(2, 8), "shift": torch.zeros(1, 8)}, r"group_norm\(shift\): \[1, 8\]\. Use \[2, 8\]"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    good = {"x": torch.zeros(2, 8, 4, 4), "groups": 4, "weight": torch.ones(8), "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        kernels.group_norm(**(good | changes))


@pytest.mark.slow
def test_registered_ops_keep_their_contract(device):
    tensors = {name: t.to(device).requires_grad_() for name, t in arguments((2, 16, 4, 4), True).items()}
    x, weight, bias, scale, shift = tensors.values()
    x = x.detach().contiguous(memory_format=LAST).requires_grad_()
    kernels.group_norm(x, 4, weight, bias)
    torch.library.opcheck(torch.ops.fastcm.group_norm.default, (x, 4, weight, bias, 1e-5, scale, shift, True))
    torch.library.opcheck(torch.ops.fastcm.group_norm.default, (x, 4, weight, bias, 1e-5, None, None, False))


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    tensors = {name: t.to(device) for name, t in arguments((2, 16, 4, 4), True).items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=LAST).requires_grad_()

    def loss(tensors):
        return kernels.group_norm(groups=4, **tensors).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(function(tensors), tensors["x"])[0] for function in (compiled, loss)]
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-3


@pytest.mark.slow
def test_a_tangent_compiles():
    tensors = arguments((2, 16, 4, 4), False)

    def tangent(x):
        return torch.func.jvp(lambda v: kernels.group_norm(v, 4, tensors["weight"], tensors["bias"]), (x,), (torch.ones_like(x),))[1]

    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(tensors["x"] ** 2), tangent(tensors["x"] ** 2), atol=1e-5)
