"""The ADM U-Net: published key lists and shapes, options, dropout from the stream, forward mode, export."""

import math
from pathlib import Path

import pytest
import torch

from fastcm import kernels
from fastcm.errors import InputError
from fastcm.networks import UNet, UNetConfig, build
from fastcm.networks.blocks import GroupNorm, ResBlock, norm_groups, sinusoidal_embedding
from fastcm.networks.dropout import Dropout

IMAGENET64 = {"num_classes": 1000}
LSUN256 = {"resolution": 256, "channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "blocks": 2, "scale_shift_norm": False}
SMALL = {"resolution": 8, "channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,), "head_channels": 8}


def make(**options) -> UNet:
    """A network whose every parameter is random: fresh output layers are zero and would hide mistakes."""
    torch.manual_seed(0)
    network = build("adm", {**SMALL, **options})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
    return network


def inputs(network, batch=3):
    torch.manual_seed(1)
    config = network.config
    labels = torch.arange(batch) % config.num_classes if config.num_classes else None
    return torch.randn(batch, config.in_channels, config.resolution, config.resolution), torch.randn(batch) * 300, labels


@pytest.mark.parametrize(("name", "options", "count"), [("imagenet64", IMAGENET64, 295_899_267), ("lsun256", LSUN256, 526_304_771)])
@pytest.mark.slow
def test_published_state_dict(name, options, count):
    lines = (Path(__file__).parents[1] / "keys" / f"keys_{name}.txt").read_text().splitlines()
    with torch.device("meta"):
        network = build("adm", options)
    assert [f"{key} {list(value.shape)}" for key, value in network.state_dict().items()] == lines
    assert sum(p.numel() for p in network.parameters()) == count


SHRUNK = {
    "imagenet64": {
        "resolution": 16,
        "channels": 8,
        "channel_mult": (1, 2, 3, 4),
        "blocks": 3,
        "attention_resolutions": (8, 4, 2),
        "num_classes": 5,
    },
    "lsun256": {"resolution": 32, "channels": 8, "channel_mult": (1, 1, 2, 2, 4, 4), "blocks": 2, "scale_shift_norm": False},
    "plain_resampling": {"resblock_updown": False},
    "no_resampling_weights": {"resblock_updown": False, "conv_resample": False},
    "other_channels": {"in_channels": 4, "out_channels": 2, "num_heads": 2},
    "fractional_width": {"resolution": 16, "channel_mult": (0.5, 1, 2)},
    "fixed_groups": {"norm_groups": 8},
}


@pytest.mark.parametrize("options", SHRUNK.values(), ids=SHRUNK)
def test_every_parameter_matters(options):
    if "attention_resolutions" not in options and options.get("resolution", 8) != 8:
        options = {**options, "attention_resolutions": (4,)}
    network = make(**options, checkpoint=False)
    x, c_noise, labels = inputs(network)
    out = network(x, c_noise, labels)
    assert out.shape == (3, network.config.out_channels, *x.shape[2:])
    out.square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or p.grad.abs().max() == 0]
    assert dead == []


def test_fresh_network_outputs_zero():
    network = build("adm", SMALL)
    assert network(*inputs(network)).abs().max() == 0


def test_samples_are_independent():
    network = make(num_classes=5)
    x, c_noise, labels = inputs(network)
    whole = network(x, c_noise, labels)
    assert whole.std() > 0.1
    for i in range(3):
        torch.testing.assert_close(network(x[i : i + 1], c_noise[i : i + 1], labels[i : i + 1]), whole[i : i + 1], rtol=1e-4, atol=1e-4)


def test_labels():
    network = make(num_classes=5)
    x, c_noise, _ = inputs(network)
    x, c_noise = x[:1].expand(3, -1, -1, -1), c_noise[:1].expand(3)
    none = network(x, c_noise)
    out = network(x, c_noise, torch.tensor([-1, 0, 4]))
    torch.testing.assert_close(out[0], none[0], rtol=1e-4, atol=1e-4)
    assert (out[1] - out[2]).abs().max() > 0.1
    assert (out[1] - none[0]).abs().max() > 0.1


def test_labels_for_an_unconditional_network_are_refused():
    network = make()
    x, c_noise, _ = inputs(network)
    with pytest.raises(InputError, match="num_classes"):
        network(x, c_noise, torch.tensor([0, 1, 2]))


def test_noise_embedding_is_fp32_cosines_then_sines():
    c_noise = torch.tensor([250 * math.log(80.0), 250 * math.log(0.002), 0.0])
    emb = sinusoidal_embedding(c_noise.double(), 8)
    assert emb.dtype == torch.float32
    angles = c_noise.double()[:, None] * torch.tensor([math.exp(-math.log(1e4) * i / 4) for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(emb.double(), torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=3e-4)


def test_bf16_parameters():
    network = make(num_classes=5)
    x, c_noise, labels = inputs(network)
    exact = network(x, c_noise, labels)
    low = network.to(torch.bfloat16)(x, c_noise, labels)
    assert low.dtype == torch.bfloat16
    # A noise level rounded to bf16 (four units apart near 700) would change the embedding entirely.
    assert (low.float() - exact).std() < 0.05 * exact.std()


def test_channels_last_agrees():
    network = make(num_classes=5)
    x, c_noise, labels = inputs(network)
    expected = network(x, c_noise, labels)
    out = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), c_noise, labels)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_changes_nothing():
    results = []
    for checkpoint in (False, True):
        network = make(num_classes=5, dropout=0.2, checkpoint=checkpoint)
        network.set_stream(torch.tensor([7]), torch.arange(3))
        out = network(*inputs(network))
        out.square().mean().backward()
        results.append((out, [p.grad for p in network.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_forward_mode_agrees_with_reverse_mode():
    """<v, J t> = <J^T v, t>, image by image: forward mode takes another normalisation and attention than the usual pass."""
    network = make(num_classes=5)
    x, c_noise, labels = inputs(network)
    tangent, cotangent = torch.randn_like(x), torch.randn_like(x)
    out, derivative = torch.func.jvp(lambda x: network(x, c_noise, labels), (x,), (tangent,))
    x.requires_grad_()
    usual = network(x, c_noise, labels)
    (gradient,) = torch.autograd.grad(usual, x, cotangent)
    torch.testing.assert_close(out, usual, rtol=1e-4, atol=1e-4)
    forward, reverse = (derivative * cotangent).sum((1, 2, 3)), (gradient * tangent).sum((1, 2, 3))
    assert forward.abs().min() > 0.1
    torch.testing.assert_close(forward, reverse, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_compiles_to_one_graph():
    network = make(num_classes=5)
    arguments = inputs(network)
    torch.testing.assert_close(
        torch.compile(network, fullgraph=True, backend="aot_eager")(*arguments), network(*arguments), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_compiled_forward_mode():
    network = make(resolution=4, channel_mult=(1,))
    x, c_noise, labels = inputs(network)

    def derivative(x, tangent):
        return torch.func.jvp(lambda x: network(x, c_noise, labels), (x,), (tangent,))[1]

    tangent = torch.randn_like(x)
    torch.testing.assert_close(
        torch.compile(derivative, fullgraph=True, backend="aot_eager")(x, tangent), derivative(x, tangent), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_exports_with_a_symbolic_batch():
    network = make(num_classes=5).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, inputs(network), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    for size in (1, 2, 5):
        arguments = inputs(network, size)
        torch.testing.assert_close(program.module()(*arguments), network(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_cuda_agrees_with_cpu(implementation, scale_shift_norm):
    network = make(num_classes=5, scale_shift_norm=scale_shift_norm)
    arguments = inputs(network)
    expected = network(*arguments)
    expected.square().sum().backward()
    gradient = network.input_blocks[0][0].weight.grad.clone()
    network.zero_grad()
    network.to("cuda", memory_format=torch.channels_last)
    x, c_noise, labels = (argument.cuda() for argument in arguments)
    kernels.use(implementation)
    try:
        out = network(x.contiguous(memory_format=torch.channels_last), c_noise, labels)
        out.square().sum().backward()
    finally:
        kernels.use("auto")
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)  # convolutions may use TF32
    torch.testing.assert_close(network.input_blocks[0][0].weight.grad.cpu(), gradient, rtol=5e-2, atol=5e-2 * gradient.abs().max().item())


@pytest.mark.parametrize(
    ("widths", "groups"),
    [((8,), 2), ((32, 64), 8), ((24, 48), 6), ((12, 18), 3), ((192, 384, 576, 768), 32), ((256, 512, 1024), 32), ((3,), 1), ((62,), 2)],
)
def test_norm_groups(widths, groups):
    assert norm_groups(*widths) == groups


@pytest.mark.parametrize("limit", [None, 8, 4, 2])
def test_dropout_up_to_a_resolution(limit):
    network = build("adm", {**SMALL, "dropout": 0.3, "dropout_resolution": limit})
    seen = {}
    for module in network.modules():
        if isinstance(module, ResBlock):
            module.register_forward_hook(lambda block, _, out: seen.update({block: out.shape[-1]}))
    network.eval()(*inputs(network)[:2])
    assert set(seen.values()) == {4, 8}
    for block, pixels in seen.items():
        (layer,) = (module for module in block.modules() if isinstance(module, Dropout))
        assert layer.p == (0.3 if limit is None or pixels <= limit else 0.0)


def test_every_norm_of_a_network_has_the_same_groups():
    for options, groups in (({}, 2), ({"norm_groups": 8}, 8), ({"channels": 32, "channel_mult": (1, 3)}, 8)):
        network = make(**options)
        assert {module.groups for module in network.modules() if isinstance(module, GroupNorm)} == {groups}


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("resolution", {"resolution": 0}),
        ("channels", {"channels": 7}),
        ("channels", {"channels": 8.0}),
        ("blocks", {"blocks": True}),
        ("channel_mult", {"channel_mult": ()}),
        ("channel_mult", {"channel_mult": (1, -1)}),
        ("channel_mult", {"channel_mult": (1, 1.3)}),
        ("attention_resolutions", {"attention_resolutions": (5,)}),
        ("head_channels", {"head_channels": 7}),
        ("num_heads", {"num_heads": 3}),
        ("norm_groups", {"norm_groups": 3}),
        ("dropout", {"dropout": 1.0}),
        ("dropout", {"dropout": float("nan")}),
        ("dropout_resolution", {"dropout_resolution": 0}),
        ("num_classes", {"num_classes": 0}),
        ("chanels", {"chanels": 8}),
    ],
)
def test_illegal_options_name_their_field(field, options):
    with pytest.raises(InputError, match=rf"network\.{field}: ") as error:
        build("adm", {**SMALL, **options})
    assert "\n" not in str(error.value)


def test_unknown_options_and_kinds_suggest():
    with pytest.raises(InputError, match="Did you mean 'channels'"):
        build("adm", {"chanels": 8})
    with pytest.raises(InputError, match="Did you mean 'adm'"):
        build("amd", {})


def test_config_from_json_equals_the_original():
    config = UNetConfig(**SMALL)
    assert UNetConfig(**{**SMALL, "channel_mult": [1, 2], "attention_resolutions": [4]}) == config
    with pytest.raises(AttributeError):
        config.channels = 16
