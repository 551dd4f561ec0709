"""State dicts as trainers save them: wrapped, prefixed, averaged, in parts, in any of the usual files; what is none of them is named."""

import argparse
import json
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_weights_diffusers import DIGITS, make, save_parts
from test_weights_openai import ONE_LEVEL
from test_weights_openai import make as make_openai

from fastcm import cli, networks
from fastcm.api import load_denoiser, resolve_model
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.weights.diffusers import read_diffusers, to_state, write_diffusers
from fastcm.weights.openai import read_openai

OPTIONS = {"image_size": 8, "head_channels": 32}


@pytest.fixture(scope="module")
def state():
    return make_openai(**ONE_LEVEL, head_channels=32).network.state_dict()


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def other(state):
    """Weights that must not be taken."""
    return {name: value + 1 for name, value in state.items()}


def same(network, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


CONTENTS = {
    "bare": lambda s: s,
    "parallel": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: prefixed(s, "_orig_mod.module."),
    "compiled parts": lambda s: {name.replace("middle_block.", "middle_block._orig_mod."): value for name, value in s.items()},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": prefixed(s, "module."), "optimizer": {"state": {}, "param_groups": []}, "step": torch.tensor(7)},
    "ema": lambda s: {"model": other(s), "ema": s, "args": argparse.Namespace(lr=1e-4), "best": np.float64(0.5)},
    "ema inside": lambda s: {"ema": {"state_dict": prefixed(s, "model.")}, "model": other(s)},
    "ema prefix": lambda s: {**prefixed(other(s), "online_model."), **prefixed(s, "ema_model."), "step": torch.tensor(3)},
    "averaged": lambda s: {"n_averaged": torch.tensor(5), **prefixed(s, "module.")},
    "lightning": lambda s: {"state_dict": {**prefixed(s, "model."), "loss.weight": torch.ones(2)}, "out": pathlib.PosixPath("/x")},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_wrapped_state_dicts(name, state, tmp_path):
    torch.save(CONTENTS[name](state), tmp_path / "x.ckpt")
    network, _, info = read_openai(tmp_path / "x.ckpt", **OPTIONS)
    assert same(network, state)
    assert ("ema" in info["source"]) == name.startswith("ema")


def test_every_ending_is_read(state, tmp_path):
    for ending in (".pt", ".pth", ".bin", ".ckpt"):
        torch.save({"model": state}, tmp_path / f"x{ending}")
    save_file(prefixed(state, "module."), tmp_path / "x.safetensors")
    for ending in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        path = tmp_path / f"x{ending}"
        assert resolve_model(path) == ("openai", path)
        assert same(load_denoiser(path, **OPTIONS)[0].network, state)


def refusal(path) -> str:
    with pytest.raises(InputError) as error:
        load_denoiser(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_an_optimizer_is_named_as_such(tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save(optimizer, tmp_path / "opt000100.pt")
    torch.save({"optimizer": optimizer, "epoch": 3}, tmp_path / "state.ckpt")
    for name in ("opt000100.pt", "state.ckpt"):
        message = refusal(tmp_path / name)
        assert "state of an optimizer" in message and "model's weights" in message


def test_diffusers_weights_alone_ask_for_their_folder(tmp_path):
    write_diffusers(tmp_path, make(**DIGITS), {})
    assert "folder" in refusal(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")


def test_diffusers_folders_in_parts_in_bin_and_under_old_names(tmp_path):
    denoiser = make(**DIGITS)
    state = to_state(denoiser.network)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(name):
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        return name

    for form in ("parts", "variant", "bin", "old names"):
        write_diffusers(tmp_path / form, denoiser, {})
        weights = tmp_path / form / "unet" / "diffusion_pytorch_model.safetensors"
        weights.unlink()
        if form == "parts":
            save_parts(weights, state)
        elif form == "variant":
            save_parts(weights, state, variant="fp16")
        elif form == "bin":
            torch.save(prefixed(state, "module."), weights.with_suffix(".bin"))
        else:
            renamed = {old_name(name): value for name, value in state.items()}
            assert sum(".query." in name for name in renamed) >= 2
            save_file(renamed, weights)
        assert same(read_diffusers(tmp_path / form)[0], denoiser.network.state_dict()), form


def test_parts_that_are_missing_or_elsewhere(tmp_path):
    write_diffusers(tmp_path, make(**DIGITS), {})
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    save_parts(weights, to_state(make(**DIGITS).network))
    index = weights.with_name(f"{weights.name}.index.json")
    names = json.loads(index.read_text())["weight_map"]
    for wrong, part in (("../x.safetensors", "../x.safetensors"), ("absent.safetensors", "no such file"), (3, "illegal value")):
        index.write_text(json.dumps({"weight_map": {**names, "conv_in.weight": wrong}}))
        with pytest.raises(InputError, match=part):
            read_diffusers(tmp_path)
    index.unlink()
    with pytest.raises(InputError, match="index"):
        read_diffusers(tmp_path)


def test_averaged_weights_beside_the_last_ones(tmp_path):
    averaged, last = make(**DIGITS), make(**DIGITS)
    torch.nn.init.ones_(last.network.out[2].bias)
    write_diffusers(tmp_path / "checkpoint-5", last, {})
    write_diffusers(tmp_path / "ema", averaged, {})
    (tmp_path / "checkpoint-5" / "model_index.json").unlink()
    (tmp_path / "ema" / "unet").rename(tmp_path / "checkpoint-5" / "unet_ema")
    denoiser, info = load_denoiser(tmp_path / "checkpoint-5")
    assert same(denoiser.network, averaged.network.state_dict()) and "unet_ema" in info["source"]
    assert same(load_denoiser(tmp_path / "checkpoint-5" / "unet")[0].network, last.network.state_dict())


def test_output_channels_other_than_input_channels(tmp_path, capsys):
    network = networks.build("adm", {**ONE_LEVEL, "head_channels": 32, "norm_groups": 32, "out_channels": 6})
    with pytest.raises(InputError, match="out_channels: 6 channels of 3"):
        Denoiser(network, Preconditioning())
    options = {"resolution": 8, "channels": 8, "channel_mult": (1,), "blocks": 1, "attention_resolutions": (), "out_channels": 4}
    song = networks.build("song", options)
    with pytest.raises(InputError, match="4 channels of 3"):
        Denoiser(song, Preconditioning())
    torch.save(network.state_dict(), tmp_path / "six.pt")
    words = ["convert", tmp_path / "six.pt", tmp_path / "out", "--image-size", "8", "--head-channels", "32"]
    assert cli.main(list(map(str, words))) == 2
    assert f"in {tmp_path / 'six.pt'}: the variance that it predicts. Give fastcm convert --betas" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    write_diffusers(tmp_path / "d", make(**DIGITS), {})
    config = tmp_path / "d" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "out_channels": 2}))
    weights = config.with_name("diffusion_pytorch_model.safetensors")
    state = to_state(make(**DIGITS).network)
    save_file({**state, "conv_out.weight": state["conv_out.weight"].repeat(2, 1, 1, 1), "conv_out.bias": torch.zeros(2)}, weights)
    assert "2 channels of 1" in refusal(tmp_path / "d")
