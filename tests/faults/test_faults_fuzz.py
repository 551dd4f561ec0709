"""Mutated files of every accepted kind, in processes that may fall: none does, none takes much memory or time, none writes anything."""

import json

import numpy as np
import pytest
from edm_pickle import write_pickle
from exported_models import INFO, exported, tiny_denoiser
from fault_counts import times
from forked_commands import called
from fuzz_worker import fuzz
from random_pictures import png, random_pixels, write_tar, write_zip
from test_faults_checkpoint import saved
from test_weights_edm import content_of
from test_weights_openai import ONE_LEVEL, make

from fastcm.weights.model_folder import save_model
from fastcm.weights.openai import write_openai

PIXELS = random_pixels(4, 8, 8, 3)


def a_model(folder):
    save_model(folder, tiny_denoiser(), INFO)
    return folder


def an_onnx(folder):
    (folder / "x.onnx").write_bytes(exported("plain").path.read_bytes())
    return folder / "x.onnx"


def an_npz(folder):
    np.savez(folder / "x.npz", PIXELS, np.arange(4))
    return folder / "x.npz"


def a_picture(folder, kind):
    from PIL import Image

    Image.fromarray(random_pixels(24, 24, 3)).save(folder / f"x.{kind}")
    return folder / f"x.{kind}"


def a_pt(folder):
    write_openai(folder / "x.pt", make(**ONE_LEVEL, head_channels=32), {})
    return folder / "x.pt"


def a_pkl(folder):
    write_pickle(folder / "x.pkl", content_of("ncsnpp"))
    return folder / "x.pkl"


PICTURES = {f"{index:03}.{kind}": content for index in range(4) for kind, content in (("png", png(PIXELS[index])), ("cls", b"1"))}
FILES = {
    "onnx": an_onnx,
    "safetensors": lambda folder: a_model(folder) / "model.safetensors",
    "config": lambda folder: a_model(folder) / "config.json",
    "npz": an_npz,
    "tar": lambda folder: write_tar(folder / "x.tar", PICTURES),
    "zip": lambda folder: write_zip(folder / "x.zip", {name: content for name, content in PICTURES.items() if name.endswith("png")}),
    "png": lambda folder: a_picture(folder, "png"),
    "jpg": lambda folder: a_picture(folder, "jpg"),
    "pt": a_pt,
    "pkl": a_pkl,
    "manifest": lambda folder: saved(folder, 1) / "step-000000001" / "manifest.json",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_mutants_are_read_or_refused(tmp_path, kind, record_property):
    folder = tmp_path / "hostile"
    folder.mkdir()
    count = times(60, 5000)
    code, text = called(fuzz, (kind, str(FILES[kind](folder)), count, 12), tmp_path / "text", seconds=550 if count < 5000 else 7200)
    assert code == 0, text[-3000:]
    outcome = json.loads(text.splitlines()[-1])
    assert outcome["faults"] == [], "\n".join(outcome["faults"][:10])
    assert outcome["refused"] + outcome["read"] == count and outcome["refused"] > count // 20
    assert outcome["new"] == [], "written beside the file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile", "text"]
    record_property("tries", count)
    record_property("seen", f"{kind}: {outcome['refused']} refused, {outcome['read']} read, {outcome['peak_mb']} MB at most")
