"""A network's second time: nothing at first, an embedding of its own later, zero where it is left out; what draws and edits with it."""

import numpy as np
import pytest
import torch
from test_generator import randomised

from fastcm import networks
from fastcm.consistency.denoiser import FLOW_TIME, Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.generation.frozen import freeze
from fastcm.generation.generator import Generator
from fastcm.weights.diffusers import write_diffusers
from fastcm.weights.openai import write_openai

SIZES = {"resolution": 8, "in_channels": 1, "out_channels": 1, "channels": 8, "channel_mult": (1,), "blocks": 1, "num_classes": 3}
KINDS = {"adm": {**SIZES, "head_channels": 8, "attention_resolutions": (8,)}, "song": {**SIZES, "attention_resolutions": ()}}
FLOW = Preconditioning(form="flow", c_noise=FLOW_TIME)
X, C_NOISE, LABELS = torch.linspace(-1, 1, 128).view(2, 1, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([0, 2])


def network(kind="adm", second_time="gap"):
    return randomised(networks.build(kind, {**KINDS[kind], "second_time": second_time}))


@pytest.mark.parametrize("kind", KINDS)
def test_it_adds_one_layer_which_is_zero_at_first(kind):
    fresh, plain = (networks.build(kind, {**KINDS[kind], "second_time": second}) for second in ("gap", None))
    assert set(fresh.state_dict()) - set(plain.state_dict()) == {"second_embed.weight"}
    with torch.no_grad():
        made = network(kind)
        made.second_embed.weight.zero_()
        at_zero, later = (made(X, C_NOISE, LABELS, end=end) for end in (torch.zeros(2), torch.tensor([0.3, 0.1])))
    assert fresh.second_embed.weight.abs().max() == 0 and torch.equal(at_zero, later)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_embedded(kind):
    for second_time in ("gap", "end"):
        made = network(kind, second_time).requires_grad_(False)
        end = torch.tensor([0.3, 0.1])
        assert torch.equal(made(X, C_NOISE, LABELS), made(X, C_NOISE, LABELS, end=torch.zeros(2)))
        assert ((made(X, C_NOISE, LABELS, end=end) - made(X, C_NOISE, LABELS)).abs().amax((1, 2, 3)) > 1e-3).all()
        seen = []
        made.second_embed.register_forward_hook(lambda module, arguments, result, seen=seen: seen.append(result))
        told = C_NOISE - end if second_time == "gap" else end
        made.embed(C_NOISE, LABELS, end=end)
        made.second_embed.kind = "end"
        made.embed(C_NOISE, LABELS, end=told)
        assert torch.equal(*seen)


@pytest.mark.parametrize(("write", "form"), [(write_openai, "OpenAI"), (write_diffusers, "diffusers")])
def test_other_formats_have_none(tmp_path, write, form):
    with pytest.raises(InputError, match=rf"no {form} form in network\.second_time: gap"):
        write(tmp_path / "x", Denoiser(network(), Preconditioning()), {})
    assert not list(tmp_path.iterdir())


def test_an_unknown_embedding_and_an_end_without_one_are_refused():
    with pytest.raises(InputError, match=r"network\.second_time: gpa\. .*Did you mean 'gap'"):
        network(second_time="gpa")
    for kind in KINDS:
        with pytest.raises(InputError, match=r"network\.second_time: None"):
            network(kind, None)(X, C_NOISE, LABELS, end=torch.zeros(2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_level_is_the_denoiser(kind):
    denoiser = Denoiser(network(kind), FLOW).requires_grad_(False)
    level, x = freeze(denoiser, 80.0, classes=3), 80 * X
    assert level.table is not None
    torch.testing.assert_close(level(x, LABELS), denoiser(x, torch.full((2,), 80.0), LABELS), rtol=1e-4, atol=1e-4)


def test_it_draws_in_steps_and_edits():
    generator = Generator(Denoiser(network(), FLOW), {}, device="cpu")
    images, mask = generator(seeds=[0, 1], labels=[0, 1], steps=2), np.zeros((8, 8), dtype=bool)
    mask[2:5] = True
    assert len(set(images.flatten().tolist())) > 8
    edited = generator.inpaint(images[0], mask, seeds=[7], labels=[0])
    assert (edited[0][~mask] == images[0][~mask]).all() and (edited[0][mask] != images[0][mask]).any()
