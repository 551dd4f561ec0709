"""The network's derivative along the trajectory, against float64 differences: a registered op under forward mode may silently give zero."""

import pytest
import torch
from analytic import GaussianNetwork
from wave_weights import wave_images

from fastcm import networks
from fastcm.consistency.denoiser import Preconditioning
from fastcm.consistency.tangent import network_tangent
from fastcm.errors import InputError

ADM = {
    "resolution": 8,
    "in_channels": 1,
    "out_channels": 1,
    "channels": 16,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 16,
    "num_classes": 3,
    "dropout": 0.2,
}
SONG = {
    "resolution": 8,
    "in_channels": 1,
    "out_channels": 1,
    "channels": 16,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention_resolutions": (4,),
    "num_classes": 3,
}
UNET2D = {"resolution": 8, "in_channels": 1, "out_channels": 1, "widths": (8, 8), "blocks": 1, "norm_groups": 4, "num_classes": 3}
UNET2D |= {"down_blocks": ("DownBlock2D", "AttnDownBlock2D"), "up_blocks": ("AttnUpBlock2D", "UpBlock2D")}


def filled(kind, options):
    network = networks.build(kind, options)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():  # none left at zero
        fan_in = max(1, parameter[0].numel()) if parameter.ndim else 1
        parameter.data = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5 + (parameter.ndim <= 1)
    return network.train()


def point(count=3):
    x, x_rate = wave_images(count, 1, 8, 8), torch.cos(wave_images(count, 1, 8, 8) * 5)
    return x, torch.tensor([-0.7, 0.2, 1.1])[:count], torch.tensor([0, 2, 1])[:count], x_rate, torch.tensor([0.25, 0.3, 0.2])[:count]


def set_stream(network):
    if hasattr(network, "set_stream"):
        network.set_stream(torch.tensor([5]), torch.arange(3))


@pytest.mark.parametrize(("kind", "options"), [("adm", ADM), ("song", SONG), ("unet2d", UNET2D), ("edm2", {**SONG, "head_channels": 16})])
def test_jvp_equals_float64_differences(kind, options):
    network = filled(kind, options)
    set_stream(network)
    x, c_noise, labels, x_rate, c_rate = point()
    F_x, dF = network_tangent(network, "jvp")(x, c_noise, labels, x_rate, c_rate)
    assert not F_x.requires_grad and not dF.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(F_x, network(x, c_noise, labels), rtol=1e-4, atol=1e-5)
        double, h = network.double(), 3e-3
        set_stream(double)

        def at(step):
            return double(x.double() + step * x_rate.double(), c_noise.double() + step * c_rate.double(), labels)

        # Richardson's combination of central differences: an error of h^4, and embeddings, which are fp32, of 1e-7 / h.
        expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    assert expected.abs().mean() > 0.03
    torch.testing.assert_close(dF.double(), expected, rtol=2e-3, atol=2e-4)


def test_the_difference_approaches_the_jvp():
    network = filled("adm", {**ADM, "dropout": 0.0})
    arguments = point()
    F_jvp, jvp = network_tangent(network, "jvp")(*arguments)
    F_x, difference = network_tangent(network, "finite-difference")(*arguments)
    torch.testing.assert_close(F_x, F_jvp, rtol=1e-4, atol=1e-5)
    assert (difference - jvp).square().mean().sqrt() < 0.02 * jvp.square().mean().sqrt()


@pytest.mark.long
def test_the_compiled_jvp_equals_the_eager_one():
    network = filled("adm", ADM)
    set_stream(network)
    arguments = point()
    eager = network_tangent(network, "jvp")(*arguments)
    compiled = network_tangent(network, "jvp", compiled=True)(*arguments)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_analytic_network():
    # F of the Gaussian world's exact denoiser is a function of sigma times x: its derivative is known.
    p = Preconditioning(form="edm", c_noise="ln sigma / 4")
    network = GaussianNetwork(p, "denoiser", data_std=0.3)
    x, c_noise = torch.ones(2, 1, 2, 2), torch.tensor([0.1, -0.2])
    _, dF = network_tangent(network, "jvp")(x, c_noise, None, torch.zeros_like(x), torch.full((2,), 0.25))
    h = 1e-4
    above, below = (network(x.double(), c_noise.double() + s * 0.25 * h) for s in (1, -1))
    torch.testing.assert_close(dF, ((above - below) / (2 * h)).float(), rtol=1e-4, atol=1e-5)


def test_unknown_kinds_get_a_suggestion():
    with pytest.raises(InputError, match="Did you mean 'jvp'"):
        network_tangent(torch.nn.Identity(), "jpv")
