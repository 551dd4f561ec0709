"""`--task denoise`: a diffusion model's D(x, sigma, labels) as a graph that other people's samplers loop over."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported_models import TINY, once, tiny_denoiser
from test_generator import randomised

from fastcm import api, cli, networks
from fastcm.consistency.betas import Betas
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError, RunError
from fastcm.export.to_onnx import export_onnx
from fastcm.generation.generator import Generator
from fastcm.generation.onnx_contract import Contract
from fastcm.generation.onnx_generator import OnnxGenerator
from fastcm.weights.model_folder import save_model

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
TEACHER = {"training": {"method": "edm"}, "classes": ["ant", "bee", "cat"]}
CHAIN = {"betas": Betas(), "sigma_min": 0.01, "sigma_max": 157.0}


def teacher(classes=3, **noise) -> Denoiser:
    return Denoiser(tiny_denoiser(classes=classes).network, Preconditioning(**{"form": "edm", **noise}))


def unet2d(**noise) -> Denoiser:
    options = {"resolution": 8, "in_channels": 1, "out_channels": 1, "widths": (8, 8), "blocks": 1, "norm_groups": 4}
    kinds = {"down_blocks": ("DownBlock2D", "AttnDownBlock2D"), "up_blocks": ("AttnUpBlock2D", "UpBlock2D")}
    return Denoiser(randomised(networks.build("unet2d", {**options, **kinds})), Preconditioning(**noise))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "options"),
    [
        (lambda: unet2d(form="epsilon", c_noise="interpolated step", **CHAIN), {}),
        pytest.param(lambda: unet2d(form="v", c_noise="nearest step", **CHAIN), {"target": "tensorrt"}, marks=pytest.mark.long),
        pytest.param(lambda: teacher(form="ve", c_noise="ln(sigma / 2)"), {"batch": 3}, marks=pytest.mark.long),
        (lambda: teacher(None, form="edm", c_noise="ln sigma / 4"), {"precision": "fp16"}),
        pytest.param(
            lambda: teacher(form="sample", c_noise="interpolated step", betas=Betas(schedule="continuous", start=0.1, end=20.0)),
            {},
            marks=pytest.mark.long,
        ),
    ],
    ids=["epsilon", "v, nearest", "ve", "edm, half", "sample, continuous"],
)
def test_the_graph_is_the_denoiser_at_every_level(made, options, tmp_path):
    denoiser = made()
    classes = getattr(denoiser.network.config, "num_classes", None)
    done = export_onnx(
        denoiser, TEACHER if classes else {"training": {"method": "edm"}}, out=tmp_path / "d.onnx", task="denoise", **options
    )
    graph = onnx.load(done.path).graph
    assert [value.name for value in graph.input] == ["x", "sigma", *(["labels"] if classes else [])]
    assert done.contract.steps == 0 and done.sigmas == () and done.variation > 0.05

    run = OnnxGenerator(done.path, "cpu").run
    sigma = torch.tensor([0.02, 0.7, 5.0, 33.0, 60.0, 1.0])
    x = sigma[:, None, None, None] * torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    feeds, labels = {"x": x.numpy(), "sigma": sigma.numpy()}, None
    if classes:
        labels = torch.tensor([0, 1, 2, -1, 1, 0])
        feeds["labels"] = labels.numpy()
    with torch.no_grad():
        expected = denoiser(x, sigma, labels).numpy()
    unit = np.maximum(sigma.numpy(), 1)[:, None, None, None]
    assert np.abs((run(feeds) - expected) / unit).max() < (5e-3 if options.get("precision") else 1e-4)


@pytest.fixture(scope="module")
def folder():
    """Holds teacher.onnx, written by the command."""

    def make(folder):
        save_model(folder / "teacher", teacher(), {**TEACHER, "resolution": 8, "channels": 1})
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main(["export", str(folder / "teacher"), "--onnx", str(folder / "teacher.onnx"), "--task", "denoise"]) == 0
        assert "fp32, sigmas an input)" in out.getvalue()
        return folder

    return once("denoise", make)


@pytest.mark.slow
def test_the_pages_loop_draws_what_heun_draws(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["info", "teacher.onnx"]) == 0
    assert "sigmas an input" in capsys.readouterr().out

    (program,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if '"sigma"' in block]
    names: dict = {}
    exec(program, names)
    noise, labels = names["noise"], names["labels"]
    expected = Generator(teacher(), TEACHER, device="cpu")
    from fastcm.generation.sampler import GivenNoise, heun

    with torch.no_grad():
        images = heun(
            expected.denoiser, GivenNoise([torch.from_numpy(noise)]), names["levels"].tolist(), labels=torch.from_numpy(labels), clip=False
        )
    np.testing.assert_allclose(names["x"], images.numpy(), atol=2e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 2}, "no place for: --steps"),
        ({"sigmas": (80.0,)}, "no place for: --sigmas"),
        ({"seeded": True}, "no place for: --seeded"),
        ({"uint8": True}, "no place for: --uint8"),
        ({"target": "mobile"}, "in --task: denoise. Use another target"),
        ({"factor": 2}, "an option for superres alone"),
    ],
)
def test_what_a_denoiser_cannot_be(options, words, tmp_path):
    with pytest.raises(InputError, match=words):
        export_onnx(teacher(), TEACHER, out=tmp_path / "d.onnx", task="denoise", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_denoiser_is_no_generator(folder):
    path = folder / "teacher.onnx"
    generator = api.load(path)
    with pytest.raises(InputError, match="a denoiser in MODEL.*It needs a solver"):
        generator([0])
    with pytest.raises(InputError, match="wrong shape in input sigma"):
        generator.run({"x": np.zeros((1, 1, 8, 8), np.float32), "sigma": np.ones((1, 1), np.float32), "labels": np.zeros(1, np.int64)})
    form = json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["fastcm.graph"])
    for wrong in ({"steps": 1}, {"task": "generate"}, {"gain": 0.5}, {"gain": "1"}):
        with pytest.raises(ValueError):
            Contract(**{**form, **wrong}).checked()


def test_a_wrong_graph_is_noticed_at_every_level(tmp_path, monkeypatch):
    """A c_noise that is wrong at low levels alone."""
    from fastcm.export.parity import check_images
    from fastcm.export.program import build

    contract = Contract(0, 1, 8, 3, task="denoise")
    right, wrong = (build(teacher(c_noise="ln sigma / 4", sigma_data=data).eval(), (), contract) for data in (0.5, 0.501))
    run = lambda feeds: wrong(*(torch.from_numpy(array) for array in feeds.values())).detach().numpy()  # noqa: E731
    with pytest.raises(RunError, match="disagrees with torch in x: .* for fp32"):
        check_images(run, right, contract, name="x")


def test_a_gain_loosens_the_tolerance_as_rounding_needs():
    plain = Contract(1, 1, 8, 3)
    assert plain.tolerance == plain._replace(gain=10.0).tolerance == 1e-4
    assert plain._replace(gain=157.0).tolerance == pytest.approx(1.57e-3)
    assert plain._replace(gain=157.0, precision="fp16").tolerance == plain._replace(precision="fp16").tolerance
    assert plain._replace(gain=157.0, uint8=True).tolerance == 1
    assert TINY["channels"] == 8
