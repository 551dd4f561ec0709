"""EDM2's network: magnitudes, published sizes, the paper's equations in float64, precision, forward mode, drawing, export."""

import math

import pytest
import torch
from torch import nn

from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.generation.frozen import freeze
from fastcm.networks import build, parameter_count
from fastcm.networks.inference import for_inference, settled
from fastcm.networks.magnitude import Modulation, MPConv, MPFourier, cosine_attention, mp_cat, mp_silu, mp_sum, normalized
from fastcm.training.config import OptimizerConfig
from fastcm.training.optimizer import FlatOptimizer

SMALL = {"resolution": 8, "channels": 16, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,), "head_channels": 16}


def make(seed=0, **options):
    """A network with weights of any size and gains that are not zero."""
    torch.manual_seed(seed)
    network = build("edm2", {**SMALL, "num_classes": 3, **options})
    for name, parameter in network.named_parameters():
        nn.init.constant_(parameter, 0.7) if name.endswith("gain") else nn.init.normal_(parameter, mean=0.1, std=2.0)
    return network


def inputs(batch=3, classes=3, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    x, c_noise = torch.randn(batch, 3, 8, 8, generator=random), torch.randn(batch, generator=random)
    return x.to(dtype), c_noise, torch.arange(batch) % classes if classes else None


@pytest.mark.parametrize(
    ("size", "channels", "count", "latent"),
    [
        ("XS", 128, 124.7, True),
        ("S", 192, 280.2, False),
        ("M", 256, 497.8, False),
        ("L", 320, 777.5, False),
        ("XL", 384, 1119.3, False),
        ("XXL", 448, 1523.2, True),
    ],
)
def test_published_sizes(size, channels, count, latent):
    """Karras et al. 2024, Tables 2 and 3, in millions: ImageNet-512 in latents of four channels, ImageNet-64 in pixels."""
    colours = {"in_channels": 4, "out_channels": 4} if latent else {}
    found = parameter_count({"kind": "edm2", "channels": channels, "num_classes": 1000, **colours})
    assert round(found / 1e6, 1) == count, size


def variances():
    """Each layer's output for inputs from N(0, 1)."""
    torch.manual_seed(0)
    x, other = torch.randn(64, 32, 8, 8), torch.randn(64, 16, 8, 8)
    yield "mp_silu", mp_silu(x).square().mean()  # has a mean: its magnitude is one
    yield "mp_sum", mp_sum(x, torch.randn_like(x), 0.3).var()
    both = mp_cat(x, other, 0.5)
    yield "mp_cat", both.square().mean()
    torch.testing.assert_close(both[:, :32].square().sum(), both[:, 32:].square().sum(), rtol=0.02, atol=0)  # equal parts
    yield "fourier", MPFourier(512)(torch.randn(2000)).square().mean()
    yield "conv", MPConv(32, 64, 3)(x)[..., 1:-1, 1:-1].var()
    yield "linear", MPConv(32, 64)(torch.randn(2000, 32)).var()
    yield "pixel norm", normalized(5 * x, 1).square().mean()
    yield "modulation", Modulation(32, 32)(x, torch.randn(64, 32), nn.Identity()).var()


@pytest.mark.parametrize(("name", "variance"), variances(), ids=lambda value: value if isinstance(value, str) else "")
def test_layers_keep_unit_variance(name, variance):
    assert abs(variance - 1) < 0.05


def layer_variances(network):
    """What each layer makes of inputs from N(0, 1), apart from its learned gain."""
    for name, module in network.named_modules():
        if isinstance(module, MPConv):
            weight = settled(module).weight.detach()
            weight = weight if module.gain is None else weight / module.gain.detach()
            x = torch.randn(16, weight.shape[1], 12, 12) if weight.ndim == 4 else torch.randn(4000, weight.shape[1])
            yield name, (torch.conv2d(x, weight) if weight.ndim == 4 else x @ weight.T).var().item()


@pytest.mark.slow
def test_layers_keep_their_magnitude_at_initialisation_and_after_100_steps():
    network = make()
    optimizer = FlatOptimizer(network, None, OptimizerConfig(kind="adamw", lr=1e-2))
    before = dict(layer_variances(network))
    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    x, c_noise, labels = inputs(16)
    outputs = []
    for _ in range(100):
        optimizer.zero_grad()
        outputs.append(network(x, c_noise, labels))
        (outputs[-1] - x.flip(3)).square().mean().backward()
        step = {"lr": torch.tensor([1e-2]), "mu": torch.zeros(1), "ema_decays": torch.tensor([0.9])}
        optimizer.step(**step, grad_norm=optimizer.gradient_norm())
    after = dict(layer_variances(network))
    assert len(before) > 20 and before.keys() == after.keys()
    assert all(abs(value - 1) < 0.15 for value in [*before.values(), *after.values()])
    for name, module in network.named_modules():
        if isinstance(module, MPConv):
            magnitudes = module.weight.detach().flatten(1).square().mean(1).sqrt()
            torch.testing.assert_close(magnitudes, torch.ones_like(magnitudes), rtol=1e-3, atol=0, msg=name)
            assert (module.weight - start[f"{name}.weight"]).abs().max() > 0.1
    losses = [(out - x.flip(3)).square().mean().item() for out in (outputs[0], outputs[-1])]
    assert losses[1] < losses[0] < 1e3 and outputs[-1].abs().max() < 100


def reference(network, x, c_noise, labels):
    """The paper's equations and Figure 22, written out in float64 for one image at a time."""
    state = {name: value.double() for name, value in network.state_dict().items()}
    config = network.config

    def unit(v, dims):
        return v / (1e-4 + (v**2).mean(dims, keepdim=True).sqrt())

    def layer(name, h):
        w = state[f"{name}.weight"]
        dims = tuple(range(1, w.ndim))
        w = unit(w, dims) / w[0].numel() ** 0.5
        w = w * state.get(f"{name}.gain", torch.ones([], dtype=torch.float64))
        return h @ w.T if w.ndim == 2 else torch.conv2d(h, w, padding=w.shape[-1] // 2)

    def silu(h):
        return h * torch.sigmoid(h) / 0.596

    def plus(a, b, t):
        return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5

    def attention(name, h):
        n, c, height, width = h.shape
        qkv = layer(f"{name}.attn_qkv", h).reshape(n, 3, c // config.head_channels, config.head_channels, -1)
        q, k, v = unit(qkv, 3).unbind(1)
        weights = torch.softmax(torch.einsum("nhcq,nhck->nhqk", q, k) / config.head_channels**0.5, -1)
        return layer(f"{name}.attn_proj", torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(h.shape))

    def block(name, h, emb):
        if name.endswith("_down"):
            h = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        if name.endswith("_up"):
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        skip = f"{name}.conv_skip.weight" in state
        if name.startswith("enc"):
            h = unit(layer(f"{name}.conv_skip", h) if skip else h, (1,))
        r = layer(f"{name}.conv_res0", silu(h)) * (1 + layer(f"{name}.emb_linear", emb))[:, :, None, None]
        r = layer(f"{name}.conv_res1", silu(r))
        if name.startswith("dec") and skip:
            h = layer(f"{name}.conv_skip", h)
        h = plus(h, r, 0.3)
        if f"{name}.attn_qkv.weight" in state:
            h = plus(h, attention(name, h), 0.3)
        return h.clip(-256, 256)

    angles = c_noise.double()[:, None] * state["emb_fourier.freqs"] + state["emb_fourier.phases"]
    emb = layer("emb_noise", 2**0.5 * torch.cos(angles))
    one = torch.nn.functional.one_hot(labels, 3).double() * 3**0.5
    emb = silu(plus(emb, layer("emb_label", one), 0.5))
    h, skips = torch.cat([x.double(), torch.ones(len(x), 1, 8, 8, dtype=torch.float64)], 1), []
    for name in network.enc:
        h = layer(f"enc.{name}", h) if name.endswith("_conv") else block(f"enc.{name}", h, emb)
        skips.append(h)
    for name in network.dec:
        if "_block" in name:
            other = skips.pop()
            a, b = h.shape[1], other.shape[1]
            scale = ((a + b) / 0.5) ** 0.5
            h = torch.cat([h * 0.5 * scale / a**0.5, other * 0.5 * scale / b**0.5], 1)
        h = block(f"dec.{name}", h, emb)
    return layer("out_conv", h)


def test_matches_the_papers_equations_in_float64():
    network = make()
    x, c_noise, labels = inputs()
    exact = reference(network, x, c_noise, labels)
    torch.testing.assert_close(network(x, c_noise, labels).double(), exact, rtol=1e-4, atol=1e-5)
    assert exact.std() > 0.3


def test_every_parameter_matters():
    network = make(dropout=0.1)
    network.set_stream(torch.tensor([7]), torch.arange(3))
    network(*inputs()).square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or p.grad.abs().max() == 0]
    assert dead == []


def test_the_gradient_is_orthogonal_to_the_weights():
    """What normalisation in the forward pass does to it (section 2.3), up to its epsilon."""
    network = make()
    network(*inputs()).square().sum().backward()
    weight = network.enc["8x8_block0"].conv_res0.weight
    along = (weight * weight.grad).flatten(1).sum(1).abs()
    assert (along < 1e-3 * weight.flatten(1).norm(dim=1) * weight.grad.flatten(1).norm(dim=1)).all() and weight.grad.abs().max() > 0


def test_labels_and_fresh_networks():
    network = make()
    x, c_noise, labels = inputs()
    none = network(x, c_noise)
    torch.testing.assert_close(network(x, c_noise, torch.full((3,), -1)), none)
    assert (network(x, c_noise, labels) - none).abs().amax((1, 2, 3)).min() > 0.01
    fresh = build("edm2", SMALL)
    assert fresh(x, c_noise).abs().max() == 0  # the gain begins at zero
    with pytest.raises(InputError, match="num_classes"):
        fresh(x, c_noise, labels)


@pytest.mark.parametrize("classes", [3, None])
def test_drawing_and_freezing_change_nothing(classes):
    network = make(num_classes=classes)
    x, c_noise, labels = inputs(classes=classes)
    with torch.no_grad():
        exact = network(x, c_noise, labels)
        for plain in (settled(network), for_inference(network), settled(settled(network))):
            torch.testing.assert_close(plain(x, c_noise, labels), exact, rtol=1e-5, atol=1e-5)
        assert not torch.equal(settled(network).out_conv.weight, network.out_conv.weight)
        denoiser = Denoiser(network, Preconditioning(form="edm", c_noise="ln sigma / 4"))
        D_x = denoiser(80 * x, torch.full((3,), 80.0), labels)
        for worker in (None, settled(network)):
            level = freeze(denoiser, 80.0, classes=classes, worker=worker)
            torch.testing.assert_close(level(80 * x, labels), D_x, rtol=1e-4, atol=1e-4)
            assert not any(isinstance(module, Modulation) for module in level.modules()) and level.table is not None
        assert (freeze(denoiser, 2.0, classes=classes)(80 * x, labels) - D_x).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_and_channels_last(dtype):
    network = make()
    x, c_noise, labels = inputs()
    with torch.no_grad():
        exact = network(x, c_noise, labels)
        last = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), c_noise, labels)
        torch.testing.assert_close(last, exact, rtol=1e-4, atol=1e-4)
        frequencies = network.emb_fourier.freqs.clone()
        low = network.to(dtype)(x, c_noise, labels)
    assert low.dtype == dtype and (low.float() - exact).std() < 0.05 * exact.std()
    assert torch.equal(network.emb_fourier.freqs, frequencies) and all(p.dtype == dtype for p in network.parameters())


def test_activation_checkpointing_changes_nothing():
    results = []
    for checkpoint in (False, True):
        network = make(dropout=0.2, checkpoint=checkpoint)
        network.set_stream(torch.tensor([7]), torch.arange(3))
        out = network(*inputs())
        out.square().mean().backward()
        results.append((out, [p.grad for p in network.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_forward_mode_agrees_with_reverse_mode():
    network = make()
    x, c_noise, labels = inputs()
    random = torch.Generator().manual_seed(2)
    tangent, rate, cotangent = (
        torch.randn(x.shape, generator=random),
        torch.randn(3, generator=random),
        torch.randn(x.shape, generator=random),
    )
    _, derivative = torch.func.jvp(lambda x, c: network(x, c, labels), (x, c_noise), (tangent, rate))
    x.requires_grad_()
    c_noise.requires_grad_()
    gradients = torch.autograd.grad(network(x, c_noise, labels), (x, c_noise), cotangent)
    forward = (derivative * cotangent).sum((1, 2, 3))
    reverse = (gradients[0] * tangent).sum((1, 2, 3)) + gradients[1] * rate
    assert forward.abs().min() > 0.1
    torch.testing.assert_close(forward, reverse, rtol=1e-3, atol=1e-3)


def test_attention_is_the_same_in_exported_graphs(monkeypatch):
    torch.manual_seed(0)
    qkv, proj, x = MPConv(32, 96, 1), MPConv(32, 32, 1), torch.randn(2, 32, 4, 4)
    found = cosine_attention(x, qkv, proj, 2)
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    torch.testing.assert_close(cosine_attention(x, qkv, proj, 2), found, rtol=1e-5, atol=1e-5)
    assert found.std() > 0.05


def test_patches_and_sizes_that_do_not_halve():
    network = make(patch=2, resolution=14, num_classes=None, attention_resolutions=())
    assert network(torch.randn(2, 3, 14, 14), torch.zeros(2)).shape == (2, 3, 14, 14) and math.isfinite(
        network.out_conv.weight.sum().item()
    )


def test_dropout_by_resolution():
    network = build("edm2", {**SMALL, "dropout": 0.4, "dropout_resolution": 4})
    assert {block.dropout.p for name, block in network.dec.items() if name.startswith("8x8")} == {0.0}
    assert {block.dropout.p for name, block in network.dec.items() if name.startswith("4x4")} == {0.4}


@pytest.mark.long
def test_compiles_and_exports():
    network = make().eval()
    arguments = inputs()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), network(*arguments), rtol=1e-4, atol=1e-4)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, arguments, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    for size in (1, 2, 5):
        arguments = inputs(size)
        torch.testing.assert_close(program.module()(*arguments), network(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("head_channels", {"head_channels": 12}),
        ("attention_resolutions", {"attention_resolutions": (3,)}),
        ("channel_mult", {"channel_mult": ()}),
        ("dropout", {"dropout": 1.0}),
        ("checkpoint", {"checkpoint": 1}),
    ],
)
def test_illegal_options_name_their_field(field, options):
    with pytest.raises(InputError, match=rf"network\.{field}: "):
        build("edm2", {**SMALL, **options})
