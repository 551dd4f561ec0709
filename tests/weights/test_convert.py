"""fastcm convert: around all formats, refusals that create nothing."""

import pytest
import torch
from edm_pickle import write_pickle
from test_weights_edm import content_of

from fastcm import cli, networks
from fastcm.api import load_denoiser
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.weights.model_folder import save_model
from fastcm.weights.openai import write_openai

TINY = {
    "resolution": 8,
    "channels": 32,
    "channel_mult": (1,),
    "blocks": 1,
    "attention_resolutions": (),
    "head_channels": 32,
    "norm_groups": 32,
}


def make(**options) -> Denoiser:
    torch.manual_seed(0)
    network = networks.build("adm", {**TINY, "num_classes": 3, **options}).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Denoiser(network, Preconditioning())


def convert(*words) -> int:
    return cli.main(["convert", *map(str, words)])


def test_around_all_formats_bit_equal(tmp_path, capsys):
    denoiser = make()
    write_openai(tmp_path / "cd_a.pt", denoiser, {})
    assert convert(tmp_path / "cd_a.pt", tmp_path / "b", "--image-size", 8, "--head-channels", 32) == 0
    assert "(fastcm): adm, 184,355 parameters, 8x8x3, 3 classes, boundary form" in capsys.readouterr().out
    assert convert(tmp_path / "b", tmp_path / "c", "--to", "diffusers") == 0
    assert convert(tmp_path / "c", tmp_path / "new" / "cd_d.pt") == 0
    a, d = (torch.load(path, weights_only=True) for path in (tmp_path / "cd_a.pt", tmp_path / "new" / "cd_d.pt"))
    assert list(a) == list(d) and all(torch.equal(a[key], d[key]) for key in a)
    for folder in ("b", "c"):
        again, info = load_denoiser(tmp_path / folder)
        assert again.preconditioning == denoiser.preconditioning and info["classes"] == ["0", "1", "2"]
        x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([80.0, 0.8]), torch.tensor([0, 2])
        torch.testing.assert_close(again(x, sigma, labels), denoiser(x, sigma, labels), rtol=1e-5, atol=1e-5)


def test_edm_pickle_becomes_a_model_folder(tmp_path, capsys):
    write_pickle(tmp_path / "net.pkl", content_of("ncsnpp"))
    assert convert(tmp_path / "net.pkl", tmp_path / "model") == 0
    assert "song" in capsys.readouterr().out
    denoiser, info = load_denoiser(tmp_path / "model")
    source, _ = load_denoiser(tmp_path / "net.pkl")
    a, b = source.network.state_dict(), denoiser.network.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert denoiser.preconditioning == source.preconditioning and "CC BY-NC-SA" in info["licence"]


def test_lost_noise_range_is_noted(tmp_path, capsys):
    denoiser = make()
    denoiser.preconditioning = Preconditioning(sigma_max=40.0)
    save_model(tmp_path / "m", denoiser, {"resolution": 8, "channels": 3})
    assert convert(tmp_path / "m", tmp_path / "x.pt") == 0
    assert "does not hold sigma_max 40.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["m", "x.pt", "--to", "diffusers"], "ends in .pt"),
        (["m", "x", "--to", "openai"], "ends in .pt"),
        (["m", "m"], "exists already"),
        (["m", "x", "--image-size", "8"], "--image-size"),
        (["m", "x", "--to", "difusers"], "Did you mean 'diffusers'"),
        (["absent", "x"], "no such file"),
        (["m", "edm_x.pt"], "edm_"),
        (["narrow", "x.pt"], "norm_groups"),
    ],
)
def test_refusals_create_nothing(words, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "m", make(), {"resolution": 8, "channels": 3})
    save_model(tmp_path / "narrow", make(norm_groups=4), {"resolution": 8, "channels": 3})
    before = sorted(tmp_path.rglob("*"))
    assert convert(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcm: error: ") and part in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
