"""Every exporter on models that are told a guidance weight, have a second time, or are EDM2's: the images are torch's."""

import argparse
import json
import sys
from functools import cache

import numpy as np
import pytest
from exported_models import INFO, TINY, once
from tensorrt_stand_in import StandIn, cpu_as_cuda
from test_aot_package import gcc
from test_edm2_unet import make as edm2
from test_generator import SMALL, randomised
from test_mobile import assert_draws_the_same
from test_second_time import FLOW
from test_second_time import network as with_second_time
from test_web import false_package

import fastcm
from fastcm import networks
from fastcm.cli import main
from fastcm.cli.sample import guidance_options
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.export.program import build
from fastcm.export.to_onnx import export_onnx
from fastcm.export.to_tensorrt import Profile, build_engine
from fastcm.generation import tensorrt_bindings
from fastcm.generation.generator import Generator
from fastcm.networks.inference import with_guidance
from fastcm.weights.model_folder import save_model

DEFAULT, OTHER = 2.5, 3.5  # guidance weights
SEEDS, LABEL = [0, -1, 5], "bee"
# fp16 where GPUs run it.
TARGETS = {"ort": {}, "web": {"target": "web"}, "tensorrt": {"target": "tensorrt", "precision": "fp16"}, "mobile": {"target": "mobile"}}
METHODS = {"told": {"method": "cd", "guidance": [1.0, 4.0]}, "mean flow": {"method": "meanflow"}, "edm2": {"method": "ect"}}
QUICK = [("told", "ort", None), ("told", "web", OTHER), ("told", "tensorrt", OTHER), ("told", "mobile", OTHER)]
QUICK += [("mean flow", "tensorrt", None), ("edm2", "web", None), ("edm2", "tensorrt", None), ("edm2", "mobile", None)]
CASES = [(kind, target, None) for kind in METHODS for target in TARGETS] + [("told", target, OTHER) for target in TARGETS]


def denoiser_of(kind: str, weight: float = DEFAULT) -> Denoiser:
    if kind == "told":
        network = randomised(networks.build("adm", {**SMALL, **TINY, "num_classes": 3, "default_guidance": DEFAULT}))
        return Denoiser(with_guidance(network, weight), Preconditioning())
    if kind == "mean flow":
        return Denoiser(with_second_time(), FLOW)
    return Denoiser(edm2(in_channels=1, out_channels=1, head_channels=8).eval(), Preconditioning(form="edm", c_noise="ln sigma / 4"))


def info_of(kind: str) -> dict:
    return {**INFO, "training": METHODS[kind]}


def generator_of(kind: str, weight: float = DEFAULT) -> Generator:
    """A student in torch that has this weight by default."""
    return Generator(denoiser_of(kind, weight), info_of(kind), device="cpu")


@cache
def torch_images(kind: str, weight: float | None) -> np.ndarray:
    """Float images of SEEDS, drawn at this weight."""
    images = generator_of(kind)(SEEDS, LABEL, guidance=weight, output="float")
    assert images.std() > 0.1
    return images


def graph(kind: str, target: str, weight: float | None):
    """The export, made once for all workers."""

    def export(folder):
        options = {"out": folder / "x.onnx", "guidance": weight, **TARGETS[target]}
        return export_onnx(denoiser_of(kind), info_of(kind), **options)._replace(reference=None)

    return once(f"{kind}-{target}-{weight}", export)


def assert_torchs(generator, kind: str, weight: float | None) -> None:
    atol = 2e-2 if generator.precision == "fp16" else 1e-4
    np.testing.assert_allclose(generator(SEEDS, LABEL, output="float"), torch_images(kind, weight), atol=atol)
    stated = generator.info["network"].get("default_guidance")
    assert stated == ((weight or DEFAULT) if kind == "told" else None)


@pytest.fixture(scope="module")
def student():
    """The folder of a model that is told its weight."""

    def make(folder):
        save_model(folder / "student", denoiser_of("told"), info_of("told"))
        return folder / "student"

    return once("told-folder", make)


def exported(student, *options) -> None:
    """By the command."""
    assert main(["export", str(student), *map(str, options)]) == 0


def test_the_command_draws_at_the_weight(student, tmp_path):
    for weight in (None, OTHER):
        asked = ["sample", str(student), "--seeds", "5", "--labels", LABEL, "--out", str(tmp_path / "x.npz")]
        assert main([*asked, "--device", "cpu", *([] if weight is None else ["--guidance", str(weight)])]) == 0
        expected = np.round((torch_images("told", weight)[SEEDS.index(5)] + 1) * 127.5)
        assert np.abs(np.load(tmp_path / "x.npz")["arr_0"][0] - expected).max() <= 1


@pytest.mark.parametrize("kind", METHODS)
def test_the_kinds_differ_in_what_is_tested(kind):
    """Else an exporter that forgets the weight would pass."""
    weights = {weight: torch_images(kind, weight) for weight in ((None, DEFAULT, OTHER) if kind == "told" else (None,))}
    if kind == "told":
        assert np.array_equal(weights[None], weights[DEFAULT]) and np.abs(weights[OTHER] - weights[DEFAULT]).max() > 0.05
        assert np.array_equal(generator_of(kind, OTHER)(SEEDS, LABEL, output="float"), weights[OTHER])


@pytest.mark.parametrize(
    ("kind", "target", "weight"), [pytest.param(*case, marks=pytest.mark.slow if case in QUICK else pytest.mark.long) for case in CASES]
)
def test_graphs(kind, target, weight):
    done = graph(kind, target, weight)
    assert done.variation > 0.05
    assert_torchs(fastcm.load(done.path, provider="cpu"), kind, weight)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["MNN", "ncnn"])
@pytest.mark.parametrize(("kind", "weight"), [("told", OTHER), ("edm2", None)])
def test_converted_graphs(kind, weight, runtime, tmp_path):
    assert_draws_the_same(runtime, graph(kind, "mobile", weight), tmp_path)


@gcc
@pytest.mark.long
@pytest.mark.parametrize(("kind", "weight"), [("told", None), ("told", OTHER), ("mean flow", None), ("edm2", None)])
def test_compiled_packages(kind, weight, tmp_path):
    save_model(tmp_path / "model", denoiser_of(kind), info_of(kind))
    exported(tmp_path / "model", "--aot", tmp_path / "x.pt2", *([] if weight is None else ["--guidance", weight]))
    assert_torchs(fastcm.load(tmp_path / "x.pt2", trust=True), kind, weight)


@pytest.mark.parametrize(
    ("kind", "weight"),
    [pytest.param("told", OTHER, marks=pytest.mark.slow)]
    + [pytest.param(kind, None, marks=pytest.mark.long) for kind in ("told", "mean flow", "edm2")],
)
def test_engines(kind, weight, tmp_path, monkeypatch):
    """TensorRT's stand-in: the manifest has the weight, and the engine is compared with torch at it."""
    done = graph(kind, "tensorrt", weight)
    denoiser = denoiser_of(kind, weight or DEFAULT)
    done = done._replace(reference=build(denoiser, done.sigmas, done.contract._replace(precision="fp32")))
    torch_images(kind, weight)  # before torch believes in a card
    stand = StandIn([])
    monkeypatch.setitem(sys.modules, "tensorrt", stand)
    cpu_as_cuda(monkeypatch, stand)
    tensorrt_bindings.logger.cache_clear()
    built = build_engine(done, tmp_path / "x.plan", Profile(1, 2, 4))
    assert all(0 < row.max_error < 2e-2 for row in built.comparisons)
    (tmp_path / "x.onnx").write_bytes(done.path.read_bytes())
    assert_torchs(fastcm.load(tmp_path / "x.plan", trust=True), kind, weight)
    tensorrt_bindings.logger.cache_clear()


@pytest.mark.slow
def test_a_servers_versions(student, tmp_path):
    """A weight each."""
    exported(student, "--serving", tmp_path)
    exported(student, "--serving", tmp_path, "--guidance", OTHER)
    for version, weight in ((1, None), (2, OTHER)):
        assert_torchs(fastcm.load(tmp_path / "student" / str(version) / "model.onnx", provider="cpu"), "told", weight)


@pytest.mark.parametrize("weight", [pytest.param(None, marks=pytest.mark.long), pytest.param(OTHER, marks=pytest.mark.slow)])
def test_both_graphs_of_a_page(student, weight, tmp_path):
    site, package = tmp_path / "site", false_package(tmp_path / "package")
    exported(student, "--web", site, "--runtime", package, *([] if weight is None else ["--guidance", weight]))
    assert_torchs(fastcm.load(site / "model.onnx", provider="cpu"), "told", weight)
    picture, mask = np.full((8, 8, 1), 200, np.uint8), np.zeros((8, 8), np.uint8)
    mask[2:6] = 255
    levels = json.loads((site / "manifest.json").read_text())["graphs"]["inpaint"]["sigmas"]
    page = fastcm.load(site / "inpaint.onnx", provider="cpu")
    filled, expected, others = (
        model.inpaint(picture, mask, [3], LABEL, sigmas=levels).astype(int)
        for model in (page, *(generator_of("told", each) for each in (weight or DEFAULT, 1.0)))
    )
    assert np.abs(filled - expected).max() <= 1 and np.abs(filled - others).max() > 5


def test_an_exported_weight_is_no_option_and_others_than_the_trained_are_refused(tmp_path):
    with pytest.raises(InputError, match="weight out of range in guidance: 5. The model was trained from 1 to 4"):
        export_onnx(denoiser_of("told"), info_of("told"), out=tmp_path / "x.onnx", guidance=5)
    for kind in ("mean flow", "edm2"):
        with pytest.raises(InputError, match="guidance of a model whose weight is fixed in guidance: 2"):
            export_onnx(denoiser_of(kind), info_of(kind), out=tmp_path / "x.onnx", guidance=2)
    assert list(tmp_path.iterdir()) == []
    for name in ("x.onnx", "x.pt2", "x.plan"):
        (tmp_path / name).touch()
        asked = argparse.Namespace(model=str(tmp_path / name), guidance=2.0, guidance_interval=None, guide=None)
        words = f"guidance of an exported graph in --guidance: .*{name}. Its weight was chosen with fastcm export --guidance"
        with pytest.raises(InputError, match=words):
            guidance_options(asked)
