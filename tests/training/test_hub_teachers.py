"""Other people's diffusion models as teachers: what a run takes from them, and one that ends in a file without fastcm."""

import json

import numpy as np
import pytest
import torch

from fastcm import cli, runs
from fastcm.api import load, load_denoiser
from fastcm.consistency.betas import Betas
from fastcm.consistency.denoiser import BOUNDARY_FORMS, Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.networks import build
from fastcm.weights.model_folder import save_model

NETWORK = {
    "resolution": 8,
    "in_channels": 1,
    "out_channels": 1,
    "widths": (16, 16),
    "blocks": 1,
    "down_blocks": ("DownBlock2D", "AttnDownBlock2D"),
    "up_blocks": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_groups": 4,
}
NOISES = {
    "epsilon": {"betas": Betas(), "c_noise": "interpolated step", "sigma_min": 0.0101, "sigma_max": 157.0},
    "v": {"betas": Betas(), "c_noise": "interpolated step", "sigma_min": 0.0101, "sigma_max": 157.0},
    "sample": {"betas": Betas(schedule="squaredcos_cap_v2"), "c_noise": "nearest step", "sigma_min": 0.02, "sigma_max": 80.0},
    "ve": {"c_noise": "ln(sigma / 2)", "sigma_min": 0.02, "sigma_max": 100.0},
    "edm": {"c_noise": "ln sigma / 4"},
}
SHORT = {
    "lr": 1e-5,
    "duration_kimg": 0.064,
    "batch": 16,
    "checkpoint_every_s": 600,
    "precision": "fp32",
    "objective.s0": 6,
    "objective.s1": 6,
}


def save_teacher(folder, base: str, **network):
    torch.manual_seed(0)
    module = build("unet2d", {**NETWORK, **network})
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else 0.5 * parameter[0].numel() ** -0.5)
    info = {"resolution": 8, "channels": 1, "classes": list("0123456789") if network.get("num_classes") else None}
    save_model(folder, Denoiser(module, Preconditioning(form=base, **NOISES[base])), info)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("base", NOISES)
def test_distillation_follows_its_teacher_in_every_form(base, tmp_path):
    teacher = save_teacher(tmp_path / "teacher", base)
    ready = runs.plan(data="digits", method="cd", teacher=teacher, out=tmp_path / "cd", changes=SHORT)
    p = ready.config.noise
    assert p.form == BOUNDARY_FORMS[base] and p.base == base
    assert {name: getattr(p, name) for name in NOISES[base]} == NOISES[base]
    assert ready.config.network["widths"] == (16, 16) and ready.config.network["num_classes"] is None
    result = runs.start(ready)
    student, info = load_denoiser(result.model)
    assert student.preconditioning == p and info["training"]["method"] == "cd"
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(student(x, torch.full((2,), p.sigma_min)), x)
    moved = [(a - b).abs().max().item() for a, b in zip(student.parameters(), ready.teacher[0].parameters(), strict=True)]
    assert 0 < max(moved) < 0.05  # it started from the teacher's weights, and moved
    assert load(result.model, device="cpu")(range(2)).shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("method", "base", "form"),
    [
        ("ect", "sample", "sample-boundary"),
        pytest.param("ect", "epsilon", "epsilon", marks=pytest.mark.slow),
        pytest.param("edm", "v", "v", marks=pytest.mark.slow),
    ],
)
def test_tuning_starts_from_a_model_and_keeps_its_form(method, base, form, tmp_path):
    init = save_teacher(tmp_path / "teacher", base, num_classes=10)
    short = {name: value for name, value in SHORT.items() if not name.startswith("objective")}
    ready = runs.plan(data="digits", method=method, out=tmp_path / "run", changes={**short, "init": init})
    assert ready.config.noise.form == form and ready.config.network["num_classes"] == 10
    denoiser, info = load_denoiser(runs.start(ready).model)
    assert denoiser.preconditioning.form == form and len(info["classes"]) == 10


@pytest.mark.slow
@pytest.mark.parametrize("base", ["epsilon", "ve"])
def test_continuous_distillation_of_other_forms(base, tmp_path):
    teacher = save_teacher(tmp_path / "teacher", base)
    short = {name: value for name, value in SHORT.items() if not name.startswith("objective")}
    ready = runs.plan(data="digits", method="scd", teacher=teacher, out=tmp_path / "scd", changes=short)
    assert ready.config.noise.form == base and ready.config.objective.tangent == "finite-difference"
    assert load_denoiser(runs.start(ready).model)[0].preconditioning.form == base


@pytest.mark.slow
def test_sigma_max_is_kept_or_lowered(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", "epsilon")
    asked = {"data": "digits", "method": "cd", "teacher": teacher, "out": tmp_path / "cd"}
    assert runs.plan(**asked, changes=SHORT).config.noise.sigma_max == 157.0
    ready = runs.plan(**asked, changes={**SHORT, "noise.sigma_max": 80.0})
    assert load_denoiser(runs.start(ready).model)[0].preconditioning.sigma_max == 80.0
    with pytest.raises(InputError, match=r"noise\.sigma_max: 300"):
        runs.plan(**asked, changes={**SHORT, "noise.sigma_max": 300.0})


@pytest.mark.parametrize(
    ("arguments", "base", "words"),
    [
        ({"data": "emoji32", "changes": {"resolution": 16}}, "epsilon", "another resolution in --teacher: 8 (the run has 16)"),
        ({"method": "scd"}, "sample", "nearest step"),
        ({"changes": {"noise.form": "v-boundary"}}, "epsilon", "another form in --teacher: epsilon"),
        ({"changes": {"noise.form": "epsilon"}}, "epsilon", "cd trains the epsilon-boundary form"),
        ({"changes": {"noise.sigma_min": 0.001}}, "epsilon", "another sigma_min in --teacher"),
        ({"changes": {"noise.c_noise": "nearest step"}}, "epsilon", "another c_noise in --teacher"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(arguments, base, words, tmp_path):
    teacher = save_teacher(tmp_path / "teacher", base)
    asked = {"data": "digits", "method": "cd", "teacher": teacher, "out": tmp_path / "run", **arguments}
    changes = asked.pop("changes", {})
    short = {name: value for name, value in SHORT.items() if asked["method"] == "cd" or not name.startswith("objective")}
    with pytest.raises(InputError) as error:
        runs.start(runs.plan(**asked, changes={**short, **changes}))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_consistency_model_is_no_teacher(tmp_path):
    module = build("unet2d", NETWORK)
    save_model(
        tmp_path / "m", Denoiser(module, Preconditioning(form="epsilon-boundary", **NOISES["epsilon"])), {"resolution": 8, "channels": 1}
    )
    with pytest.raises(InputError, match="not a diffusion model in --teacher"):
        runs.plan(data="digits", method="cd", teacher=str(tmp_path / "m"), out=tmp_path / "run", changes=SHORT)


@pytest.mark.slow
def test_from_a_hub_style_folder_to_an_onnx_file(tmp_path, capsys):
    """The walk of docs/training.md, by its commands."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
    )
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    teacher, run, file = (str(tmp_path / name) for name in ("ddpm", "cd", "cd.onnx"))

    def command(*words):
        assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "epsilon form" in command("info", teacher)
    command("sample", teacher, "--sampler", "ddim", "--steps", 5, "--seeds", "0-1", "--out", tmp_path / "ddim.png")
    out = command("train", "--data", "digits", "--method", "cd", "--teacher", teacher, "--out", run, "--duration", "0.064", "--batch", 16)
    assert "epsilon-boundary form, sigma 0.01 to 157.4" in out
    command("export", run, "--onnx", file)
    seeds = range(3)
    np.testing.assert_allclose(
        load(file, provider="cpu")(seeds, output="float"), load(run, device="cpu")(seeds, output="float"), rtol=0, atol=2e-3
    )
    assert cli.main(["convert", run, str(tmp_path / "cm"), "--to", "diffusers"]) == 2
    assert "noise.form: epsilon-boundary" in capsys.readouterr().err and not (tmp_path / "cm").exists()
    command("convert", run, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["preconditioning"]["betas"]["steps"] == 1000
    assert load_denoiser(tmp_path / "ours")[0].preconditioning == load_denoiser(run)[0].preconditioning
