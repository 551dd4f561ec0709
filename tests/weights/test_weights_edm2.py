"""EDM2's pickles: published names and shapes, arguments that the published networks lack."""

import pytest
import torch
from edm_pickle import SOURCE, edm2_content, write_pickle

import fastcm
from fastcm import networks, runs
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.weights.edm import read_edm

KWARGS = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "label_dim": 3, "channels_per_head": 16}
OPTIONS = {"resolution": 8, "channels": 16, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,), "num_classes": 3}
OPTIONS |= {"head_channels": 16}


def network(**options):
    torch.manual_seed(0)
    made = networks.build("edm2", {**OPTIONS, **options})
    for name, parameter in made.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, 0.5)
    return made.half().float()


def published(state):
    """Under EDM2's names, with its order of qkv's channels, (heads, d, 3)."""
    names = {"emb_linear.gain": "emb_gain", "out_conv.gain": "out_gain"}
    renamed = {}
    for name, value in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = value.view(3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape) if "qkv" in name else value
    return renamed


def test_published_layout(tmp_path):
    exact = network().eval()
    state = published(exact.state_dict())
    assert {"emb_fourier.freqs", "emb_fourier.phases", "emb_noise.weight", "emb_label.weight", "out_gain", "out_conv.weight"} <= set(state)
    assert {"enc.8x8_conv.weight", "enc.4x4_down.emb_gain", "enc.4x4_block0.attn_qkv.weight", "dec.4x4_in0.attn_proj.weight"} <= set(state)
    assert {"dec.8x8_block1.conv_skip.weight", "dec.8x8_up.conv_res0.weight", "dec.4x4_in1.emb_linear.weight"} <= set(state)
    write_pickle(tmp_path / "edm2.pkl", edm2_content(state, {**KWARGS, "dropout": 0.1, "concat_balance": 0.5}))
    assert SOURCE.encode() in (tmp_path / "edm2.pkl").read_bytes()
    read, preconditioning, info = read_edm(tmp_path / "edm2.pkl")
    assert preconditioning == Preconditioning(form="edm", c_noise="ln sigma / 4")
    assert (info["resolution"], info["channels"], info["classes"]) == (8, 3, ["0", "1", "2"]) and read.config.dropout == 0.1
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 20.0]), torch.tensor([2, 0])
    read.load_state_dict({**read.state_dict(), **{name: exact.state_dict()[name] for name in ("emb_fourier.freqs", "emb_fourier.phases")}})
    found, expected = (Denoiser(each, preconditioning)(x, sigma, labels) for each in (read, exact))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - x / (1 + sigma[:, None, None, None] ** 2 / 0.25)).abs().max() > 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"res_balance": 0.4}, "res_balance 0.4, not 0.3"),
        ({"channel_mult_emb": 4}, "channel_mult_emb 4, not None"),
        ({"second_time": True}, "unknown argument second_time"),
        ({"model_channels": 12}, "network.head_channels: 16"),
        ({"num_blocks": 2}, "weights of another architecture"),
    ],
)
def test_other_networks_are_refused(tmp_path, arguments, words):
    write_pickle(tmp_path / "edm2.pkl", edm2_content(published(network().state_dict()), {**KWARGS, **arguments}))
    with pytest.raises(InputError, match=words) as error:
        read_edm(tmp_path / "edm2.pkl")
    assert str(tmp_path / "edm2.pkl") in str(error.value)


@pytest.mark.slow
def test_ect_is_tuned_from_a_pickle_with_its_network_and_noise(tmp_path):
    digits = {"in_channels": 1, "out_channels": 1, "num_classes": 10}
    arguments = {**KWARGS, "img_channels": 1, "label_dim": 10}
    exact = network(**digits)
    write_pickle(tmp_path / "edm2.pkl", edm2_content(published(exact.state_dict()), arguments))
    changes = {"batch": 4, "duration_kimg": 0.004, "lr": 1e-9, "precision": "fp32", "device": "cpu", "compile": "off"}
    ready = runs.plan("digits", method="ect", out=tmp_path / "run", changes={**changes, "init": str(tmp_path / "edm2.pkl")})
    assert ready.config.network["kind"] == "edm2" and ready.config.noise == Preconditioning(form="edm", c_noise="ln sigma / 4")
    runs.start(ready)
    tuned = fastcm.load(tmp_path / "run").denoiser.network.state_dict()
    for name, value in exact.state_dict().items():
        if name.startswith("emb_fourier"):
            continue  # whose frequencies the file rounds to fp16
        rows = value if not name.endswith("weight") else value / value.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (value.ndim - 1))
        torch.testing.assert_close(tuned[name], rows, rtol=1e-3, atol=1e-3)
