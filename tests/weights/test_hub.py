"""Models on the hub: names, the files that are fetched, the library's cache, uploads, and every refusal, against a hub on the loopback."""

import json

import numpy as np
import pytest
import torch
from hub_server import TOKEN, connected, offline
from test_convert import make

import fastcm
from fastcm.cli import main
from fastcm.errors import InputError, RunError
from fastcm.weights import diffusers, hub
from fastcm.weights.hub import HubId, hub_id
from fastcm.weights.model_folder import save_model
from fastcm.weights.openai import write_openai


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """{path: bytes} of the same model as a model folder, a diffusers folder and an OpenAI file."""
    root = tmp_path_factory.mktemp("models")
    denoiser = make()
    save_model(root / "fastcm", denoiser, {"resolution": 8, "channels": 3, "classes": ["a", "b", "c"]})
    diffusers.write_diffusers(root / "diffusers", denoiser, {})
    write_openai(root / "cd_x.pt", denoiser, {})
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def below(files, folder):
    return {name[len(folder) + 1 :]: content for name, content in files.items() if name.startswith(f"{folder}/")}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with connected(monkeypatch, tmp_path) as started:
        yield started


def images(model):
    return fastcm.load(model, device="cpu")(seeds=[0, 1], labels=[0, 2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:owner/name", ("owner/name", None, None)),
        ("owner/na.me-1", ("owner/na.me-1", None, None)),
        ("owner/name@v1.0", ("owner/name", "v1.0", None)),
        ("hf:owner/name@refs/pr/1:sub/folder", ("owner/name", "refs/pr/1", "sub/folder")),
        ("owner/name:unet", ("owner/name", None, "unet")),
        ("runs/digits/model", None),
        ("/owner/name", None),
        ("./name", None),
        ("../name", None),
        ("models/x.pt", None),
        ("digits", None),
        ("here/name", None),
        ("hf:here/name", ("here/name", None, None)),
    ],
)
def test_names(tmp_path, monkeypatch, text, expected):
    """Bare names are the hub's where their owner is no folder here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_id(text) == (None if expected is None else HubId(*expected))
    if expected is not None and text.startswith("hf:"):
        assert str(hub_id(text)) == text
    with pytest.raises(InputError, match="not a name on the hub: hf:digits"):
        hub_id("hf:digits")


def test_only_the_needed_files_of_each_kind(server, model_files, capsys):
    """Weights and configurations, behind redirects, into the cache; no code; the same model from every layout."""
    extra = {"train.py": b"raise SystemExit", "README.md": b"card", "samples/x.png": b"png", "optimizer.pt": b"no"}
    server.add("a/model", {**below(model_files, "fastcm"), **extra, "README.md": b"card"})
    server.add("a/run", {f"model/{name}": content for name, content in below(model_files, "fastcm").items()} | extra)
    variant = {"unet/diffusion_pytorch_model.fp16.safetensors": b"half", "unet/diffusion_pytorch_model.bin": b"pickle"}
    server.add("a/pipeline", {**below(model_files, "diffusers"), **variant, **extra})
    server.add("a/file", {"cd_x.pt": model_files["cd_x.pt"], "notes.txt": b""})
    expected = {
        "a/model": ["config.json", "model.safetensors"],
        "hf:a/run": ["model/config.json", "model/model.safetensors"],
        "hf:a/pipeline@v1": [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
        ],
    }
    drawn = {}
    for name, wanted in expected.items():
        server.asked.clear()
        drawn[name] = images(name)
        assert sorted(server.downloads()) == wanted and any("/cdn/" in path for _, path in server.asked)
    assert all(np.array_equal(a, drawn["a/model"]) for a in drawn.values())
    assert main(["info", "hf:a/file", "--debug"]) == 2, "an 8-pixel .pt does not tell its size"
    assert "image-size" in capsys.readouterr().err.replace("_", "-")
    assert main(["convert", "hf:a/file:cd_x.pt", "out", "--image-size", "8", "--head-channels", "32"]) == 0
    assert np.array_equal(images("out"), drawn["a/model"])


def test_cache_offline_and_out_of_reach(server, model_files, monkeypatch, capsys):
    """Fetched once; then without a hub, by option and by failure; never fetched or half fetched is one line."""
    repository = server.add("a/model", below(model_files, "fastcm"))
    first = images("hf:a/model")
    server.asked.clear()
    hub.fetch.cache_clear()
    assert np.array_equal(images("hf:a/model"), first) and not server.downloads()
    repository.fault = 429
    hub.fetch.cache_clear()
    assert np.array_equal(images("hf:a/model"), first)
    assert "the hub cannot be reached (" in capsys.readouterr().err
    offline(monkeypatch)
    server.asked.clear()
    assert np.array_equal(images("hf:a/model"), first) and not server.asked
    with pytest.raises(InputError, match="not in the hub's cache, and HF_HUB_OFFLINE is set, in MODEL: hf:b/model"):
        images("hf:b/model")
    [weights] = hub.fetch(hub_id("hf:a/model")).glob("model.safetensors")
    weights.unlink()
    hub.fetch.cache_clear()
    with pytest.raises(InputError, match=r"half-downloaded model in MODEL: hf:a/model \(HF_HUB_OFFLINE is set\)\. Run again with the hub"):
        images("hf:a/model")


def test_a_connection_cut_in_the_middle_goes_on(server, model_files):
    """Where it was, by a range; where it is cut again and again one line says that what came is kept."""
    repository = server.add("a/model", below(model_files, "fastcm"), cuts=2)
    assert images("hf:a/model").shape == (2, 8, 8, 3) and server.ranges
    repository.files["config.json"] += b"\n"
    repository.files["model.safetensors"] += b"\0"
    repository.cuts = 10**6
    hub.fetch.cache_clear()
    with pytest.raises(RunError, match=r"the hub cannot be reached for MODEL: hf:a/model \(.*\)\. Run again: what was fetched is kept"):
        images("hf:a/model")


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({}, "hf:a/absent", "no such repository in MODEL: hf:a/absent"),
        ({}, "a/absent", "no such repository in MODEL: hf:a/absent.* There is no file or folder a/absent here either"),
        ({}, "hf:a/model@v9", "no such revision in MODEL: hf:a/model@v9"),
        ({}, "hf:a/model:sub", r"no such folder or file in MODEL: hf:a/model:sub\. The repository has config\.json, model\.safetensors"),
        ({"gated": True}, "hf:a/model", "a gated repository in MODEL: hf:a/model. Accept its terms"),
        ({"private": True}, "hf:a/model", "no such repository in MODEL: hf:a/model.*a private one needs"),
        ({"fault": 429}, "hf:a/model", "too many requests to the hub for MODEL: hf:a/model. Wait some minutes"),
        ({"fault": 503}, "hf:a/model", "the hub cannot be reached for MODEL: hf:a/model"),
        ({"files": {"README.md": b"x"}}, "hf:a/model", r"no model in MODEL: hf:a/model \(it has README\.md\)"),
        ({"files": {"a.pt": b"x", "b.onnx": b"y"}}, "hf:a/model", r"several models .* \(it has a\.pt, b\.onnx\).*hf:a/model:a\.pt"),
        ({"files": {"m/config.json": b"{}", "m/model.safetensors": b""}}, "hf:a/model", "no model at the top .*Name one, as hf:a/model:m"),
        ({"files": {"config.json": b'{"model_type": "bert"}', "model.safetensors": b""}}, "hf:a/model", "no model of images .*json: bert"),
    ],
)
def test_repositories_that_are_refused(server, model_files, capsys, tmp_path, options, name, message):
    """One line; exit 2 where the name or the access is at fault, 1 where the hub is; no weights are fetched, nothing else is written."""
    options = dict(options)
    server.add("a/model", options.pop("files", {n: b"{}" for n in ("config.json", "model.safetensors")}), **options)
    code = main(["info", name])
    error = capsys.readouterr().err
    assert code == (1 if options.get("fault") else 2) and error.count("\n") == 1
    import re

    assert re.search(message, error), error
    assert not any(file.endswith("safetensors") for file in server.downloads())
    assert {path.name for path in tmp_path.iterdir()} <= {"hub"}


def test_a_token_opens_a_private_repository(server, model_files, monkeypatch):
    server.add("a/model", below(model_files, "fastcm"), private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert images("hf:a/model").shape == (2, 8, 8, 3) and not server.leaked


@pytest.mark.slow
def test_uploads(server, model_files, tmp_path, capsys, monkeypatch):
    """`convert SRC hf:owner/name` after --yes, private unless --public; push_to_hub and save_pretrained from Python; loaded again."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, content in below(model_files, "fastcm").items():
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_bytes(content)
    assert main(["convert", "m", "hf:me/digits"]) == 2
    error = capsys.readouterr().err
    assert "not confirmed in fastcm convert: hf:me/digits would receive" in error and "--yes" in error and not server.repositories
    assert main(["convert", "m", "hf:me/digits", "--yes"]) == 0
    private = server.repositories["models/me/digits"]
    assert private.private and {"config.json", "model.safetensors", "README.md"} <= set(private.files)
    assert private.files["model.safetensors"] == model_files["fastcm/model.safetensors"]
    assert main(["convert", "m", "hf:me/open:diffusers", "--to", "diffusers", "--yes", "--public"]) == 0
    public = server.repositories["models/me/open"]
    assert not public.private and "diffusers/unet/config.json" in public.files
    generator = fastcm.load("m", device="cpu")
    generator.push_to_hub("me/pushed")
    expected = images("m")
    generator.save_pretrained(tmp_path / "saved")
    for model in ("me/digits", "hf:me/open:diffusers", "me/pushed", "saved"):
        assert np.array_equal(images(model), expected), model
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["classes"] == ["a", "b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "m", "saved"]


def test_teacher_and_init_on_the_hub(server, model_files, monkeypatch):
    """Wherever a model is named: --init takes its weights."""
    from fastcm import runs

    server.add("a/model", below(model_files, "fastcm"))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    ready = runs.plan(data=(pixels, np.array([0, 1, 2] * 2)), changes={"init": "a/model"})
    loaded, _ = fastcm.api.load_denoiser("a/model")
    assert torch.equal(ready.init[0].network.state_dict()["out.2.weight"], loaded.network.state_dict()["out.2.weight"])
