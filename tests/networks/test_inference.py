"""Networks rewritten for drawing: the same function in fewer operations, with the same weights but for the few that are replaced."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import each_implementation  # noqa: F401
from test_generator import SMALL, randomised
from torch import nn

from fastcm import kernels, networks
from fastcm.generation.frozen import RowNorm
from fastcm.networks import blocks
from fastcm.networks.inference import UpsampledConv, for_inference

SONG = {"resolution": 8, "in_channels": 3, "out_channels": 3, "channels": 8, "channel_mult": (1, 2), "blocks": 1}
SONG |= {"attention_resolutions": (8,)}
NETWORKS = {
    "adm": ("adm", SMALL),
    "plain resampling": ("adm", {**SMALL, "resblock_updown": False}),
    "added embedding": ("adm", {**SMALL, "scale_shift_norm": False}),
    "ddpm++": ("song", SONG),
    "ncsn++": ("song", {**SONG, "embedding": "fourier", "encoder": "residual", "resample_filter": (1, 3, 3, 1)}),
}


def test_a_convolution_after_a_doubling_works_before_it():
    random = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((5, 3, 3, 3), (5,), (2, 3, 4, 6)))
    expected = F.conv2d(blocks.upsample(x), weight, bias, padding=1)
    torch.testing.assert_close(UpsampledConv(weight, bias)(x), expected)
    torch.testing.assert_close(UpsampledConv(weight, None)(x), expected - bias[:, None, None])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_the_same(name):
    kind, options = NETWORKS[name]
    network = randomised(networks.build(kind, options))
    drawing = for_inference(network)
    x = torch.randn(2, options["in_channels"], 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(x, torch.tensor([1.0, 2.0]))
        torch.testing.assert_close(drawing(x, torch.tensor([1.0, 2.0])), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.05
    replaced = sum(isinstance(layer, UpsampledConv) for layer in drawing.modules())
    assert replaced == (0 if name == "ncsn++" else 1)  # whose filter is no doubling of pixels
    attentions = [layer for layer in drawing.modules() if isinstance(layer, blocks.Attention) or getattr(layer, "attention", False)]
    assert attentions and all(getattr(layer, "norm2", None) or layer.norm for layer in attentions)
    assert not [layer for layer in attentions if (layer.norm2 if hasattr(layer, "norm2") else layer.norm).weight is not None]
    shared = {id(tensor) for tensor in network.parameters()}
    assert sum(id(tensor) not in shared for tensor in drawing.parameters()) == replaced + 2 * len(attentions)
    assert not [name for name, tensor in network.named_parameters() if tensor is None]  # the network itself is left alone


def test_attention_is_written_out_in_exported_graphs_alone(monkeypatch):
    """torch 2.11 makes `torch.compiler.is_exporting()` the constant True in every function that it compiles."""
    layer, fused = randomised(blocks.Attention(16, heads=2)), []
    monkeypatch.setattr(blocks, "attend", lambda q, k, v: fused.append(q) or q)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    layer(torch.randn(3, 16, 4, 4))
    assert len(fused) == 1
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    layer(torch.randn(3, 16, 4, 4))
    assert len(fused) == 1


def test_attention_of_planes_is_attention():
    """What a graph holds: k's bias left out, v's moved behind the product."""
    layer = randomised(blocks.Attention(16, heads=2))
    x = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    found = blocks._self_attention_of_planes(x, layer.qkv, layer.proj_out, 2)
    torch.testing.assert_close(found, blocks.self_attention(x, layer.qkv, layer.proj_out, 2), rtol=1e-5, atol=1e-5)
    assert found.std() > 0.05


@pytest.mark.parametrize("silu", [True, False])
def test_row_norms_agree_in_both_forms(device, silu):
    """The kernel's form, which adds one to its scale, and torch's; table rows lie apart, as pieces of a larger one."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 4, 4, generator=random).to(device, memory_format=torch.channels_last)
    rows = torch.randn(3, 48, 1, 1, generator=random).to(device)
    _, A, B = rows.split(16, dim=1)
    norm = blocks.GroupNorm(16, silu=silu)
    expected = RowNorm(norm, fused=False)(x, A, B)
    torch.testing.assert_close(RowNorm(norm, fused=True)(x, A - 1, B), expected, rtol=1e-4, atol=1e-4)
    one = RowNorm(norm, fused=True)(x, A[:1] - 1, B[:1])  # a row for the whole batch
    torch.testing.assert_close(one, RowNorm(norm, fused=False)(x, A[:1], B[:1]), rtol=1e-4, atol=1e-4)
    scaled = kernels.group_norm(x, norm.groups, None, None, scale=A.flatten(1) - 1, shift=B.flatten(1), silu=silu)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-4)


def test_other_networks_come_back_as_they_are():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2))
    x = torch.randn(1, 1, 4, 4)
    assert torch.equal(for_inference(network)(x), network(x))
