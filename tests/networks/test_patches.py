"""Networks on patches: the layers see p x p pixels as channels, and images that patches and levels do not divide are padded and cropped."""

import pytest
import torch
import torch.nn.functional as F

from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.generation.generator import Generator
from fastcm.networks import build, patches
from fastcm.networks.inference import for_inference
from fastcm.weights.diffusers import write_diffusers
from fastcm.weights.openai import write_openai

SMALL = {"resolution": 12, "in_channels": 3, "out_channels": 3, "channels": 8, "channel_mult": (1, 2), "blocks": 1, "num_classes": 3}
OWN = {"adm": {"head_channels": 8, "attention_resolutions": (3,)}, "song": {"encoder": "residual", "attention_resolutions": (3,)}}
LABELS = torch.tensor([0, 2])


def make(kind, **options):
    """A network whose every parameter is random: fresh output layers are zero and would hide mistakes."""
    torch.manual_seed(0)
    network = build(kind, {**SMALL, **OWN[kind], **options}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
    return network.requires_grad_(False)


def inputs(resolution):
    return torch.randn(2, 3, resolution, resolution), torch.tensor([3.0, -1.0]), LABELS


@pytest.mark.parametrize("kind", OWN)
def test_a_patch_is_channels_inside(kind):
    """The same weights on pixel_unshuffle(x), whose result is shuffled back: the state dict has the shapes of that network."""
    network = make(kind, patch=2)
    inner = make(kind, resolution=6, in_channels=12, out_channels=12)
    inner.load_state_dict(network.state_dict())
    x, c_noise, labels = inputs(12)
    expected = F.pixel_shuffle(inner(F.pixel_unshuffle(x, 2), c_noise, labels), 2)
    torch.testing.assert_close(network(x, c_noise, labels), expected)
    assert list(network.state_dict()) == list(make(kind, resolution=6).state_dict())


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize(("resolution", "patch"), [(11, 1), (10, 2), (9, 4)])
def test_other_sizes_are_padded_and_cropped(kind, resolution, patch):
    options = {"patch": patch, "attention_resolutions": ()}
    network = make(kind, resolution=resolution, **options)
    step = 2 * patch
    whole = -(-resolution // step) * step
    larger = make(kind, resolution=whole, **options)
    if kind == "adm":  # the names of a song network's layers hold their sizes, which are equal here as well
        assert list(larger.state_dict()) == list(network.state_dict())
    larger.load_state_dict(network.state_dict())
    x, c_noise, labels = inputs(resolution)
    before = (whole - resolution) // 2
    after = whole - resolution - before
    expected = larger(F.pad(x, (before, after, before, after)), c_noise, labels)[:, :, before : whole - after, before : whole - after]
    found = network(x, c_noise, labels)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(for_inference(network)(x, c_noise, labels), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resolution", [50, 100, 250])
@pytest.mark.parametrize("patch", patches.PATCHES)
def test_patches_and_pixels_are_inverse(resolution, patch):
    config = build("adm", {**SMALL, **OWN["adm"], "resolution": resolution, "patch": patch, "attention_resolutions": ()}).config
    x = torch.randn(1, 3, resolution, resolution)
    inside = patches.to_patches(x, config)
    side = patches.first_side(config)
    assert inside.shape == (1, 3 * patch**2, side, side) and side % 2 == 0 and side * patch - resolution < 2 * patch
    assert torch.equal(patches.to_pixels(inside, config), x)


@pytest.mark.parametrize("patch", [0, 3, 32, 2.0, True, None, "2"])
def test_other_patches_are_refused(patch):
    with pytest.raises(InputError, match=r"network\.patch: .*Choose one of 1, 2, 4, 8, 16\."):
        build("adm", {**SMALL, **OWN["adm"], "patch": patch})


@pytest.mark.parametrize(("options", "field"), [({"patch": 2}, "patch: 2"), ({"resolution": 11}, "resolution: 11")])
@pytest.mark.parametrize(("write", "form"), [(write_openai, "OpenAI"), (write_diffusers, "diffusers")])
def test_other_formats_have_neither(tmp_path, options, field, write, form):
    network = make("adm", attention_resolutions=(), **options)
    with pytest.raises(InputError, match=rf"no {form} form in network\.{field}"):
        write(tmp_path / "x", Denoiser(network, Preconditioning()), {})
    assert not list(tmp_path.iterdir())


def test_a_padded_network_on_patches_draws_and_edits():
    generator = Generator(Denoiser(make("adm", resolution=10, patch=4, attention_resolutions=()), Preconditioning()), {}, device="cpu")
    images = generator(seeds=[0, 1], labels=LABELS.tolist())
    assert images.shape == (2, 10, 10, 3) and len(set(images.flatten().tolist())) > 20
    mask = torch.zeros(10, 10, dtype=torch.bool).numpy()
    mask[2:5] = True
    edited = generator.inpaint(images[0], mask, seeds=[7], labels=[0])
    assert (edited[0][~mask] == images[0][~mask]).all() and (edited[0][mask] != images[0][mask]).any()
