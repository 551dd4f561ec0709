"""Configurations that others wrote: each field of the kind that is needed, or refused by its name."""

import json

import pytest
import torch
from test_weights_diffusers import DIGITS, IMAGENET64, edit, make, pipeline_images, save_pipeline
from test_weights_diffusers import our_images as images_of

from fastcm.api import load_denoiser
from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError
from fastcm.weights.diffusers import read_diffusers, write_diffusers
from fastcm.weights.diffusers_unet import read_config
from fastcm.weights.model_folder import save_model

UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
INFO = {"resolution": 8, "channels": 1, "classes": list("abcdefghij")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers folder and a fastcm folder of one small network."""
    path = tmp_path_factory.mktemp("models")
    write_diffusers(path / "theirs", make(**DIGITS), {})
    save_model(path / "ours", make(**DIGITS), INFO)
    return path


def refusal(path, file, changes) -> str:
    """The message at reading the folder with `changes` to one of its files, which is put back; a path of names is a nested field."""
    before = (path / file).read_text()
    content = json.loads(before)
    for names, value in changes.items():
        *outer, last = names.split(".")
        part = content
        for name in outer:
            part = part[name]
        part[last] = value
    (path / file).write_text(json.dumps(content))
    try:
        with pytest.raises(InputError) as error:
            load_denoiser(path)
    finally:
        (path / file).write_text(before)
    message = str(error.value)
    assert str(path / file) in message and "\n" not in message and len(message) < 500
    return message


WRONG = (None, "8", [8], {}, True, -8, 0, 8.5, 10**400)
COUNTS = ("sample_size", "in_channels", "out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim", "num_class_embeds")


@pytest.mark.parametrize("name", COUNTS)
def test_a_number_of_another_kind_is_named(name, folder):
    nullable = name in ("attention_head_dim", "num_class_embeds")
    for value in WRONG[nullable:]:
        assert name in refusal(folder / "theirs", UNET, {name: value}), value


@pytest.mark.parametrize(
    ("file", "name", "values"),
    [
        (UNET, "block_out_channels", [None, 8, [], [24, "48"], [24, 0], "24,48", [24]]),
        (UNET, "down_block_types", [None, "DownBlock2D", [1, 2]]),
        (UNET, "resnet_time_scale_shift", [None, "spatial", 1]),
        (UNET, "attn_norm_num_groups", [True, "32"]),
        (UNET, "time_embedding_dim", [0, "96"]),
        (UNET, "dropout", [None, "0", 2, True]),
        (SCHEDULER, "sigma_min", [None, "0.002", 0, -1, True, [1]]),
        (SCHEDULER, "num_train_timesteps", [None, "40", 0, 1.5]),
    ],
)
def test_other_fields_of_diffusers(file, name, values, folder):
    for value in values:
        message = refusal(folder / "theirs", file, {name: value})
        assert name in message, value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("network", [None, [], "adm"]),
        ("network.kind", [None, ["adm"], 3]),
        ("network.channels", ["24", True, 10**400]),
        ("network.channel_mult", [2, "12", [1, None], None]),
        ("network.scale_shift_norm", ["false", 1, None]),
        ("network.dropout", ["0", True]),
        ("preconditioning", [None, []]),
        ("preconditioning.sigma_data", ["0.5", True, None]),
        ("resolution", ["8", 16, True]),
        ("channels", [3, "1"]),
        ("classes", ["abcdefghij", [1] * 10, ["a"]]),
        ("sampling", [[], {"2": 80}, {"2": ["80", 1]}]),
        ("training", ["ict"]),
        ("licence", [3]),
    ],
)
def test_our_own_config(name, values, folder):
    for value in values:
        assert name.split(".")[-1] in refusal(folder / "ours", "config.json", {name: value}), value


def test_square_sizes_in_two_numbers_and_oblong_ones(folder, tmp_path):
    write_diffusers(tmp_path, make(**DIGITS), {})
    edit(tmp_path / UNET, sample_size=[8, 8])
    assert read_config(tmp_path / UNET).resolution == 8
    assert "oblong" in refusal(tmp_path, UNET, {"sample_size": [8, 16]})
    assert "sample_size is null" in refusal(tmp_path, UNET, {"sample_size": None})


def test_null_means_one_head_a_layer_as_in_diffusers(tmp_path):
    pipeline = save_pipeline(tmp_path / "theirs", {**IMAGENET64, "num_heads": 1})
    assert pipeline.unet.config.attention_head_dim is None
    network, preconditioning, _ = read_diffusers(tmp_path / "theirs")
    want = pipeline_images(pipeline, [4, 0, 2], num_inference_steps=1)
    torch.testing.assert_close(images_of(Denoiser(network, preconditioning), [4, 0, 2], [80.0]), want, rtol=0, atol=1e-4)
    write_diffusers(tmp_path / "ours", Denoiser(network, preconditioning), {})
    assert json.loads((tmp_path / "ours" / UNET).read_text())["attention_head_dim"] is None
