"""Guidance when pictures are drawn: teachers by any solver, students at a weight of their range, folded and exported."""

import logging

import numpy as np
import pytest
import torch
from analytic import gaussian_teacher
from test_generator import SMALL, randomised, small_denoiser
from test_guidance import DATA_STD, KINDS, SHIFT, expected

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.generation.generator import Generator
from fastcm.generation.guided import student_weight
from fastcm.generation.sampler import TEACHER_SAMPLERS, SeedNoise, euler, teacher_grid
from fastcm.weights.diffusers import write_diffusers
from fastcm.weights.model_folder import load_model

TEACHER = {"training": {"method": "edm", "label_drop": 0.1}}
CHAIN = {"c_noise": "interpolated step", "betas": {"steps": 40}, "sigma_min": 0.02, "sigma_max": 0.7}
STUDENT = {"training": {"method": "cd", "guidance": [1.0, 4.0]}}


def teacher(info=TEACHER, **noise):
    network = randomised(networks.build("adm", {**SMALL, "num_classes": 6}))
    return Generator(Denoiser(network, Preconditioning(form="edm", **noise)), info, device="cpu")


def student(kind="adm", info=STUDENT, **options):
    network = randomised(networks.build(kind, {**KINDS[kind], "default_guidance": 2.5, **options}))
    return Generator(Denoiser(network, Preconditioning(c_noise="ln sigma / 4")), info, device="cpu")


@pytest.mark.parametrize("sampler", TEACHER_SAMPLERS)
def test_every_solver_takes_guidance_and_one_is_none_to_the_bit(sampler):
    model, how = teacher(**(CHAIN if sampler == "ddim" else {})), {"steps": 3, "sampler": sampler, "output": "float"}
    plain = model(range(3), **how)
    assert np.array_equal(model(range(3), guidance=1, guidance_interval=(0.1, 5), **how), plain)
    assert np.array_equal(model(range(3), guidance=3, guidance_interval=(200, 300), **how), plain)
    strong = model(range(3), guidance=3, **how)
    assert np.abs(strong - plain).max() > 0.01
    guide = Generator(small_denoiser(None, seed=4), {}, device="cpu")
    assert np.abs(model(range(3), guidance=3, guide=guide, **how) - strong).max() > 0.01


def test_the_guided_solver_in_closed_form():
    teacher = gaussian_teacher("edm", data_std=DATA_STD)
    teacher.network.class_shift = SHIFT
    info = {**TEACHER, "resolution": 4, "channels": 1, "classes": list("abcdef")}
    images = Generator(teacher, info, device="cpu")(range(4), [0, 1, 2, 5], steps=5, sampler="euler", guidance=2.5, output="float")
    p, labels = teacher.preconditioning, torch.tensor([0, 1, 2, 5])
    grid = teacher_grid(5, sigma_min=p.sigma_min, sigma_max=p.sigma_max, rho=p.rho)
    known = euler(lambda x, s, labels: expected(x, s, 2.5, labels), SeedNoise(torch.arange(4), (1, 4, 4)), grid, labels=labels)
    np.testing.assert_allclose(images, known.permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_folded_is_the_weight_that_is_told(kind):
    model = student(kind)
    x, labels = 80 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    F = model.denoiser
    c_skip, c_out, c_in, c_noise = F.coefficients(torch.full((4,), 80.0))
    for weight in (1.0, 3.5):
        told = F.network(c_in[:, None, None, None] * x, c_noise, labels, guidance=torch.full((4,), weight))
        D_x = c_skip[:, None, None, None] * x + c_out[:, None, None, None] * told
        torch.testing.assert_close(model.level(80.0, weight)(x, labels), D_x, rtol=1e-4, atol=1e-4)
    drawn = {weight: model(range(3), guidance=weight, output="float") for weight in (None, 1, 2.5, 3.5)}
    assert np.array_equal(drawn[None], drawn[2.5]) and np.abs(drawn[1] - drawn[3.5]).max() > 0.01
    with_solver = [model(range(3), guidance=weight, sampler="heun", steps=3, output="float") for weight in (2.5, 3.5)]
    assert np.abs(with_solver[0] - with_solver[1]).max() > 0.01


def test_an_unfolded_level_has_its_weight_too(monkeypatch):
    from fastcm.generation import frozen

    folded = student()(range(3), guidance=3.5, output="float")
    monkeypatch.setattr(frozen, "can_fold", lambda *_, **__: False)
    np.testing.assert_allclose(student()(range(3), guidance=3.5, output="float"), folded, atol=1e-4)


def test_the_default_weight_is_in_the_model_folder(tmp_path):
    model = student()
    model.save_pretrained(tmp_path / "model")
    loaded = Generator(*load_model(tmp_path / "model"), device="cpu")
    assert np.array_equal(loaded(range(2)), model(range(2), guidance=2.5)) and loaded.denoiser.network.config.default_guidance == 2.5


@pytest.mark.parametrize(
    ("model", "how", "words"),
    [
        (student, {"guidance": 4.5}, "weight out of range in guidance: 4.5. The model was trained from 1 to 4"),
        (student, {"guidance": 2, "guidance_interval": (1, 2)}, "an option for diffusion teachers"),
        (lambda: Generator(small_denoiser(), {}, device="cpu"), {"guidance": 2}, "weight is fixed in guidance: 2 (none was given to it)"),
        (lambda: student(info={"training": {"guidance": 2.0, "method": "cd"}}, default_guidance=None), {"guidance": 2}, "trained with 2"),
        (teacher, {"guidance": -1}, "illegal value in guidance: -1"),
        (teacher, {"guidance": float("nan")}, "illegal value in guidance: nan"),
        (teacher, {"guidance": 2, "guidance_interval": (5, 1)}, "illegal value in guidance_interval: (5, 1)"),
        (teacher, {"guidance_interval": (1, 5)}, "no weight for guidance_interval"),
        (teacher, {"guidance": 2, "sampler": "consistency"}, "needs a solver"),
        (lambda: teacher({"training": {"method": "edm"}}), {"guidance": 2}, "the model always saw its labels"),
        (lambda: Generator(small_denoiser(None), TEACHER, device="cpu"), {"guidance": 2}, "the model has no classes"),
        (teacher, {"guidance": 2, "guide": Generator(small_denoiser(3), {}, device="cpu")}, "another number of classes in guide: 3"),
        (teacher, {"guidance": 2, "guide": teacher(sigma_max=40)}, "fewer noise levels in guide: 0.002 to 40 (needed are 0.002 to 80)"),
        (teacher, {"guidance": 2, "guide": object()}, "an exported graph in guide: object"),
    ],
)
def test_guidance_that_the_model_cannot_have(model, how, words):
    with pytest.raises(InputError) as caught:
        model()(range(2), **how)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["adm", "unet2d"])
def test_other_formats_have_no_place_for_the_weight(form, tmp_path):
    with pytest.raises(InputError, match=r"no diffusers form in network.default_guidance: 2.5. Export it at one weight"):
        write_diffusers(tmp_path / "out", student(form).denoiser, {})
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_models_are_guided_with_a_line(caplog):
    with caplog.at_level(logging.WARNING, "fastcm"):
        teacher({})(range(1), steps=1, sampler="euler", guidance=2)
    assert "trained without its labels now and then" in caplog.text
    assert student_weight(torch.nn.Identity(), {}, None) is None
