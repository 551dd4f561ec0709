"""Diffusion models in OpenAI's names: their attention's order, their variance, their chain by name or option."""

import pytest
import torch
from test_weights_openai import make

from fastcm import cli
from fastcm.api import load_denoiser
from fastcm.errors import InputError
from fastcm.weights.openai import read_openai

SHAPE = {
    "resolution": 32,
    "channels": 32,
    "channel_mult": (1, 2, 2, 2),
    "blocks": 1,
    "attention_resolutions": (16,),
    "resblock_updown": False,
}


def their_state(network, *, legacy: bool, variance: bool = True):
    """The state dict as guided-diffusion keeps it: attention in one dimension, one head's q, k and v after the other, six channels out."""
    state = {}
    for name, value in network.state_dict().items():
        if ".qkv." in name and legacy:
            heads = network.config.heads(len(value) // 3)
            rows = torch.arange(len(value)).view(3, heads, -1)
            order = torch.cat([rows[part, head] for head in range(heads) for part in range(3)])
            value = value[order]
        if name.endswith((".qkv.weight", ".proj_out.weight")):
            value = value[..., 0]
        if name.startswith("out.2.") and variance:
            value = torch.cat([value, torch.full_like(value, 7.0)])
        state[name] = value
    return state


@pytest.mark.parametrize(
    ("file", "options", "legacy", "heads", "given"),
    [
        ("256x256_diffusion_uncond.pt", {"head_channels": 16}, True, None, {}),
        ("64x64_diffusion.pt", {"head_channels": 16}, False, None, {}),
        ("cifar10_uncond_50M_500K.pt", {"num_heads": 4}, True, None, {}),
        ("mine.pt", {"num_heads": 2}, True, 2, {"betas": "linear"}),
        ("mine.pt", {"num_heads": 2}, False, 2, {"betas": "cosine", "prediction": "v_prediction", "new_attention_order": True}),
    ],
)
def test_published_networks_are_the_same_functions(file, options, legacy, heads, given, tmp_path):
    denoiser = make(**SHAPE, **{"head_channels": 16, **options})
    torch.save(their_state(denoiser.network, legacy=legacy), tmp_path / file)
    arguments = {"image_size": 32, "head_channels": 16, **({"heads": heads} if heads else {}), **given}
    network, preconditioning, info = read_openai(tmp_path / file, **arguments)
    x, c_noise = torch.randn(2, 3, 32, 32), torch.tensor([3.0, 700.0])
    torch.testing.assert_close(network(x, c_noise), denoiser.network(x, c_noise), rtol=1e-5, atol=1e-5)
    assert network.config.out_channels == 3 and "without the variance" in info["source"]
    assert preconditioning.form == ("v" if "prediction" in given else "epsilon")
    schedule = "squaredcos_cap_v2" if given.get("betas") == "cosine" or file[0] in "6c" else "linear"
    assert preconditioning.betas.schedule == schedule
    steps = 4000 if file.startswith("cifar10") else 1000
    assert preconditioning.betas.steps == steps and preconditioning.betas.scale == 1000 / steps


def test_a_chain_that_no_name_tells_is_asked_for(tmp_path, capsys):
    denoiser = make(**SHAPE, head_channels=16)
    torch.save(their_state(denoiser.network, legacy=True), tmp_path / "mine.pt")
    with pytest.raises(InputError, match=r"Give fastcm convert --betas"):
        load_denoiser(tmp_path / "mine.pt")
    words = ["convert", tmp_path / "mine.pt", tmp_path / "out", "--head-channels", 16, "--betas", "linear"]
    assert cli.main([str(word) for word in words]) == 0
    assert load_denoiser(tmp_path / "out")[0].preconditioning.form == "epsilon"
    assert cli.main(["convert", str(tmp_path / "out"), str(tmp_path / "back.pt")]) == 2
    assert "no OpenAI form in noise" in capsys.readouterr().err
    words[2], words[-1] = tmp_path / "other", "linaer"
    assert cli.main([str(word) for word in words]) == 2
    assert "Did you mean 'linear'" in capsys.readouterr().err and not (tmp_path / "other").exists()
