"""UNet2D beyond its parity with diffusers: folded levels, the form for drawing, gradients and settings that cannot be meant."""

import pytest
import torch

from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.generation.frozen import freeze
from fastcm.networks import build
from fastcm.networks.inference import for_inference
from fastcm.networks.resample import Resample, fir_downsample, fir_upsample

SMALL = {"resolution": 8, "widths": (32, 64), "blocks": 1, "norm_groups": 8, "num_classes": 3}
PLAIN = {"down_blocks": ("DownBlock2D", "AttnDownBlock2D"), "up_blocks": ("AttnUpBlock2D", "UpBlock2D"), "head_channels": 16}
RESNET = {
    "down_blocks": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_blocks": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_upsample": True,
    "scale_shift_norm": True,
    "numbered_classes": True,
}
SKIP = {
    "widths": (32, 64),
    "down_blocks": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_blocks": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "norm_groups": None,
    "embedding": "fourier",
    "middle_scale": 2.0**0.5,
    "input_gain": 0.5,
    "input_shift": 0.5,
}
KINDS = {"plain": PLAIN, "resnet": RESNET, "skip": SKIP}


def make(**options):
    torch.manual_seed(0)
    network = build("unet2d", {**SMALL, **options}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_folded_levels_and_the_form_for_drawing_are_the_same_function(kind):
    network = make(**KINDS[kind])
    denoiser = Denoiser(network, Preconditioning(form="v", c_noise="ln sigma / 4")).requires_grad_(False)
    x, labels, sigma = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 1]), 1.7
    expected = denoiser(x, torch.full((4,), sigma), labels)
    assert not torch.allclose(expected, denoiser(x, torch.full((4,), 0.9 * sigma), labels), atol=1e-3)
    for worker in (None, for_inference(network)):
        level = freeze(denoiser, sigma, classes=3, worker=worker)
        torch.testing.assert_close(level(x, labels), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(level(x, labels.flip(0)), expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_gradient_and_recomputation_changes_none(kind):
    gradients = []
    for checkpoint in (False, True):
        network = make(**KINDS[kind], checkpoint=checkpoint).train()
        network(torch.linspace(-1, 1, 384).view(2, 3, 8, 8), torch.tensor([0.3, 2.0]), torch.tensor([0, 2])).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-3)


def test_the_filters_are_those_of_the_taps():
    x = torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(fir_downsample(x), Resample("down", (1, 3, 3, 1))(x))
    torch.testing.assert_close(fir_upsample(x), Resample("up", (1, 3, 3, 1))(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"down_blocks": ("DownBlock2D",)}, "network.down_blocks"),
        ({"up_blocks": ("UpBlock2D", "CrossAttnUpBlock2D")}, "network.up_blocks"),
        ({"widths": (31, 64)}, "network.widths"),
        ({"widths": "32"}, "network.widths"),
        ({"head_channels": 24}, "network.head_channels: 24"),
        ({"norm_groups": 5}, "network.norm_groups: 5"),
        ({"norm_groups": None}, "network.norm_groups: None"),
        ({"resolution": 9}, "network.resolution: 9"),
        ({"freq_shift": 2}, "network.freq_shift: 2"),
        ({"embedding": "learned"}, "network.embedding: learned"),
        ({"norm_eps": 0}, "network.norm_eps: 0"),
    ],
)
def test_settings_that_cannot_be_meant(options, words):
    with pytest.raises(InputError) as error:
        build("unet2d", {**SMALL, **PLAIN, **options})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_labels_need_classes():
    with pytest.raises(InputError, match="unconditional"):
        make(**PLAIN, num_classes=None)(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
