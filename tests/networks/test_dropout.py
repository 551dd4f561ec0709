"""Dropout from the noise stream: rate, masks by seed, position and layer, shared by student and target."""

import pytest
import torch

from fastcm import kernels
from fastcm.networks import build
from fastcm.networks.dropout import Dropout

SMALL = {
    "resolution": 8,
    "channels": 8,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention_resolutions": (4,),
    "num_classes": 3,
    "dropout": 0.3,
}


def make(kind):
    torch.manual_seed(0)
    network = build(kind, SMALL if kind == "song" else {**SMALL, "head_channels": 8})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def layer(p, *, stream=1 << 16, seed=3, positions=(0, 1)):
    dropout = Dropout(p)
    dropout.stream, dropout.seed, dropout.positions = stream, torch.tensor([seed]), torch.tensor(positions)
    return dropout


def test_keeps_where_the_streams_uniform_reaches_p():
    x = torch.ones(2, 3, 4, 5)
    u = kernels.uniform_field(torch.tensor([3]), torch.tensor([0, 1]), (3, 4, 5), stream=(1 << 16) + 2)
    expected = torch.where(u >= 0.25, torch.tensor(1 / 0.75), torch.tensor(0.0))
    torch.testing.assert_close(layer(0.25, stream=(1 << 16) + 2)(x), expected)
    assert 0 < (expected == 0).sum() < expected.numel()


def test_rate_and_mean():
    out = layer(0.3, positions=range(64))(torch.ones(64, 8, 16, 16))
    assert abs((out == 0).float().mean() - 0.3) < 0.005  # 131,072 draws: three standard deviations are 0.004
    assert abs(out.mean() - 1) < 0.01


def test_masks_differ_by_seed_position_and_layer():
    x = torch.ones(2, 4, 8, 8)
    masks = [layer(0.5)(x), layer(0.5, seed=4)(x), layer(0.5, stream=(1 << 16) + 1)(x), layer(0.5, positions=(2, 3))(x)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_eval_and_zero_rate_return_the_input_itself():
    x = torch.ones(2, 3, 4, 4)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x


def test_without_a_stream_training_is_refused():
    with pytest.raises(RuntimeError, match=r"set_stream\(seed, positions\)"):
        Dropout(0.5)(torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("kind", ["adm", "song"])
def test_layers_have_streams_of_their_own(kind):
    streams = [module.stream for module in make(kind).modules() if isinstance(module, Dropout)]
    assert streams == list(range(1 << 16, (1 << 16) + len(streams))) and len(streams) > 5


@pytest.mark.parametrize("kind", ["adm", "song"])
def test_student_and_target_share_masks_and_the_global_rng_is_untouched(kind):
    student, target = make(kind), make(kind)
    x, c_noise, labels = torch.randn(4, 3, 8, 8), torch.randn(4), torch.arange(4) % 3
    state = torch.get_rng_state()
    for network in (student, target):
        network.set_stream(torch.tensor([9]), torch.arange(100, 104))
    out = student(x, c_noise, labels)
    assert torch.equal(out, target(x, c_noise, labels))
    assert torch.equal(torch.get_rng_state(), state)
    student.set_stream(torch.tensor([9]), torch.arange(104, 108))
    assert not torch.allclose(out, student(x, c_noise, labels))


@pytest.mark.parametrize("kind", ["adm", "song"])
def test_independent_of_the_batch_split(kind):
    network = make(kind)
    x, c_noise, labels, positions = torch.randn(4, 3, 8, 8), torch.randn(4), torch.arange(4) % 3, torch.tensor([5, 2, 77, 1 << 33])
    network.set_stream(torch.tensor([9]), positions)
    whole = network(x, c_noise, labels)
    for part in (slice(0, 1), slice(1, 4)):
        network.set_stream(torch.tensor([9]), positions[part])
        torch.testing.assert_close(network(x[part], c_noise[part], labels[part]), whole[part], rtol=1e-4, atol=1e-4)


def test_gradient_and_tangent_pass_the_same_mask():
    dropout = layer(0.5)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask = dropout(torch.ones(2, 3, 4, 4))
    (gradient,) = torch.autograd.grad(dropout(x).sum(), x)
    torch.testing.assert_close(gradient, mask)
    _, tangent = torch.func.jvp(dropout, (x.detach(),), (torch.ones(2, 3, 4, 4),))
    torch.testing.assert_close(tangent, mask)
