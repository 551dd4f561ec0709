"""SongUNet: published sizes and values, options, resampling filters, precision, forward mode, compilation and export."""

import pytest
import torch
from wave_weights import wave_images, wave_state

from fastcm.errors import InputError
from fastcm.networks import build
from fastcm.networks.resample import Resample, ResampleConv

SMALL = {"resolution": 8, "channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)}
NCSNPP = {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "resample_filter": (1, 3, 3, 1)}
SKIP = {"encoder": "skip", "decoder": "skip", "resample_filter": (1, 3, 3, 1)}
CASES = {"ddpmpp": {"num_classes": 3, "augment_channels": 2}, "ncsnpp": NCSNPP, "skip": SKIP}


def make(**options):
    """A network with every parameter random."""
    torch.manual_seed(0)
    network = build("song", {**SMALL, **options})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
    return network


def inputs(network, batch=3):
    torch.manual_seed(1)
    labels = torch.arange(batch) % network.config.num_classes if network.config.num_classes else None
    return torch.randn(batch, 3, 8, 8), torch.randn(batch), labels


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 55_732_739),
        ({"augment_channels": 9}, 55_733_891),  # EDM, CIFAR-10, unconditional, DDPM++
        ({"augment_channels": 9, "num_classes": 10}, 55_735_299),
        ({"augment_channels": 9, **NCSNPP}, 56_397_827),
        ({"augment_channels": 9, "resolution": 64, "channel_mult": (1, 2, 2, 2)}, 61_805_571),  # FFHQ, AFHQv2
    ],
)
def test_published_sizes(options, count):
    with torch.device("meta"):
        network = build("song", options)
    assert sum(p.numel() for p in network.parameters()) == count


def from_edm(name, value):
    """EDM's file order of qkv channels, (C, 3), to ours, (3, C)."""
    return value.view(-1, 3, *value.shape[1:]).transpose(0, 1).reshape(value.shape) if ".qkv." in name else value


# Outputs of NVIDIA's published networks.py for the same weights and inputs: pixel (3, 4) of image 0, then (7, 0) of image 1.
GOLDEN = {
    "ddpmpp": ([-0.5330516, 0.5681282, -0.0670708], [-0.8487855, 0.3729933, 0.5070910]),
    "ncsnpp": ([0.3775144, -0.4675301, 0.3939430], [0.4563626, -0.4961885, 0.3530485]),
    "skip": ([1.2246451, -0.4354215, -0.8547412], [-0.1395323, -0.1214960, -0.2026289]),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_the_published_network(case):
    options = CASES[case]
    network = build("song", {**SMALL, **options})
    state = network.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if case == "ddpmpp":  # EDM keeps box filters as buffers, which take places in the sorted order
        shapes |= {
            f"{block}.{part}.resample_filter": (1, 1, 2, 2) for block in ("enc.4x4_down", "dec.8x8_up") for part in ("conv0", "skip")
        }
    waves = wave_state(shapes)
    network.load_state_dict({name: value if "resample_filter" in name else from_edm(name, waves[name]) for name, value in state.items()})
    labels = torch.tensor([2, 0]) if "num_classes" in options else None
    augment = torch.tensor([[0.5, -1.0], [0.0, 2.0]]) if "augment_channels" in options else None
    out = network(wave_images(2, 3, 8, 8), torch.tensor([-1.2, 0.9]), labels, augment)
    torch.testing.assert_close((out[0, :, 3, 4].tolist(), out[1, :, 7, 0].tolist()), GOLDEN[case], rtol=1e-4, atol=1e-5)
    if case == "ddpmpp":
        none = network(wave_images(2, 3, 8, 8), torch.tensor([-1.2, 0.9]))
        torch.testing.assert_close(none[0, :, 3, 4].tolist(), [-0.5312111, 0.5683761, -0.0692397], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_matters(case):
    network = make(**CASES[case])
    extra = (torch.randn(3, 2),) if "augment_channels" in CASES[case] else ()
    network(*inputs(network), *extra).square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or p.grad.abs().max() == 0]
    assert dead == []


def test_fresh_network_outputs_almost_nothing():
    network = build("song", SMALL)
    assert 0 < network(*inputs(network)).abs().max() < 1e-3


def test_labels_and_augmentation():
    network = make(num_classes=3, augment_channels=2)
    x, c_noise, _ = inputs(network)
    none = network(x, c_noise)
    torch.testing.assert_close(network(x, c_noise, torch.tensor([-1, -1, -1])), none)
    torch.testing.assert_close(network(x, c_noise, augment_labels=torch.zeros(3, 2)), none)
    assert (network(x, c_noise, torch.tensor([0, 1, 2])) - none).abs().amax((1, 2, 3)).min() > 0.01
    assert (network(x, c_noise, augment_labels=torch.ones(3, 2)) - none).abs().amax((1, 2, 3)).min() > 0.01
    plain = make()
    with pytest.raises(InputError, match="num_classes"):
        plain(x, c_noise, torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match="augment_channels"):
        plain(x, c_noise, augment_labels=torch.ones(3, 2))


@pytest.mark.parametrize("direction", ["down", "up"])
def test_long_filter_with_box_taps_is_the_box(direction):
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(Resample(direction, (0, 1, 1, 0))(x), Resample(direction, (1, 1))(x))


def test_filters_keep_constants_and_halve_or_double():
    x = torch.full((1, 2, 8, 8), 3.0)
    for direction, size in (("down", 4), ("up", 16)):
        out = Resample(direction, (1, 3, 3, 1))(x)
        assert out.shape[-2:] == (size, size)
        torch.testing.assert_close(out[..., 1:-1, 1:-1], torch.full((1, 2, size - 2, size - 2), 3.0))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_filter_after_convolution_commutes_inside(taps):
    torch.manual_seed(0)
    last = ResampleConv(2, 3, 1, direction="down", taps=taps, filter_last=True)
    first = ResampleConv(2, 3, 1, direction="down", taps=taps)
    first.load_state_dict(last.state_dict())
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(last(x), first(x))  # a 1x1 kernel commutes with any filter of sum one, zero bias at the border


@pytest.mark.parametrize("case", CASES)
def test_bf16_and_channels_last(case):
    network = make(**CASES[case])
    x, c_noise, labels = inputs(network)
    exact = network(x, c_noise, labels)
    last = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), c_noise, labels)
    torch.testing.assert_close(last, exact, rtol=1e-4, atol=1e-4)
    low = network.to(torch.bfloat16)(x, c_noise, labels)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).std() < 0.05 * exact.std()
    assert all(p.dtype == torch.bfloat16 for p in network.parameters())


def test_activation_checkpointing_changes_nothing():
    results = []
    for checkpoint in (False, True):
        network = make(num_classes=3, dropout=0.2, checkpoint=checkpoint)
        network.set_stream(torch.tensor([7]), torch.arange(3))
        out = network(*inputs(network))
        out.square().mean().backward()
        results.append((out, [p.grad for p in network.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_forward_mode_agrees_with_reverse_mode():
    network = make(**NCSNPP)
    x, c_noise, _ = inputs(network)
    tangent, cotangent = torch.randn_like(x), torch.randn_like(x)
    _, derivative = torch.func.jvp(lambda x: network(x, c_noise), (x,), (tangent,))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, c_noise), x, cotangent)
    forward, reverse = (derivative * cotangent).sum((1, 2, 3)), (gradient * tangent).sum((1, 2, 3))
    assert forward.abs().min() > 0.1
    torch.testing.assert_close(forward, reverse, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiles_and_exports(case):
    network = make(**CASES[case]).eval()
    arguments = inputs(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), network(*arguments), rtol=1e-4, atol=1e-4)
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = ({0: batch}, {0: batch}, None if arguments[2] is None else {0: batch})
    program = torch.export.export(network, arguments, dynamic_shapes=dynamic)
    for size in (1, 2, 5):
        arguments = inputs(network, size)
        torch.testing.assert_close(program.module()(*arguments), network(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("embedding", {"embedding": "fourrier"}),
        ("encoder", {"encoder": "residuals"}),
        ("decoder", {"decoder": "residual"}),
        ("resample_filter", {"resample_filter": (1, 2, 1)}),
        ("resample_filter", {"resample_filter": (1, -1)}),
        ("channels", {"channels": 6}),
        ("channels", {"channels": "8"}),
        ("resolution", {"resolution": 0}),
        ("attention_resolutions", {"attention_resolutions": (3,)}),
        ("augment_channels", {"augment_channels": 0}),
        ("dropout", {"dropout": -0.1}),
        ("fourier_scale", {"fourier_scale": -1.0}),
    ],
)
def test_illegal_options_name_their_field(field, options):
    with pytest.raises(InputError, match=rf"network\.{field}: "):
        build("song", {**SMALL, **options})
