"""`fastcm edit` on every task: the files that it writes, and one line for what it cannot do."""

import numpy as np
import pytest
from PIL import Image
from test_editing import colour_denoiser, picture

from fastcm import cli
from fastcm.generation.generator import Generator
from fastcm.weights.model_folder import save_model


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colour") / "model"
    save_model(folder, colour_denoiser(), {"classes": ["ant", "bee", "cat"]})
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch, colour_model):
    """A colour model `model` and pictures, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(colour_model)
    Image.fromarray(picture()).save("small.png")
    Image.fromarray(picture()[:2, :2]).save("tiny.png")
    Image.fromarray(picture(1)[..., 0]).save("grey.png")
    Image.fromarray(np.kron(picture(), np.ones((3, 3, 1), np.uint8))).save("large.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(0 * mask).save("black.png")
    Image.fromarray(np.stack([mask, 255 - mask], axis=-1)).save("holes.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    np.save("flat.npy", np.zeros(8))
    return tmp_path


def edit(*arguments):
    return cli.main(["edit", *map(str, arguments), "--device", "cpu"])


FAST = ("--sigmas", "80,2")


def test_inpaint_from_the_command_line(folder, capsys):
    assert edit("inpaint", "model", "--image", "small.png", "--mask", "mask.png", "--labels", "bee", "--out", "out.png", *FAST) == 0
    result = Image.open("out.png")
    assert result.size == (8, 8) and result.mode == "RGB" and result.text["fastcm:seeds"] == "0"
    assert np.array_equal(np.array(result)[:, :4], picture()[:, :4]) and not np.array_equal(np.array(result)[:, 4:], picture()[:, 4:])
    assert result.text["fastcm:labels"] == "1" and result.text["fastcm:sigmas"] == "80,2" and result.text["fastcm:model"] == "model"
    compare = Image.open("out-compare.png")
    assert capsys.readouterr().out == "out.png\nout-compare.png\n" and compare.text == result.text
    tiles = [np.array(compare)[2:66, x : x + 64] for x in (2, 68, 134)]  # the picture, what is known of it, the result: enlarged
    hole = np.where(np.arange(8)[None, :, None] >= 4, np.uint8(128), picture())
    for tile, expected in zip(tiles, (picture(), hole, np.array(result)), strict=True):
        assert np.array_equal(tile[::8, ::8], expected)
    assert edit("inpaint", "model", "--image", "small.png", "--box", "1,2,3,8", "--seeds", "3,5", *FAST) == 0
    for seed in (3, 5):
        changed = (np.array(Image.open(f"inpaint-{seed}.png")) != picture()).any(axis=-1)
        assert changed[2:8, 1:3].mean() > 0.5 and changed.sum() == changed[2:8, 1:3].sum()


@pytest.mark.parametrize(
    "arguments",
    [
        ("colorize", "model", "--image", "grey.png", *FAST),
        ("superres", "model", "--image", "tiny.png", *FAST),
        ("superres", "model", "--image", "large.png", "--factor", "2", *FAST),
        ("stroke", "model", "--image", "large.png"),
        ("stroke", "model", "--image", "small.png", "--sigma", "1.5"),
        ("denoise", "model", "--image", "small.png", "--sigma", "0.5", "--labels", "2"),
    ],
)
def test_tasks_from_the_command_line(folder, arguments):
    assert edit(*arguments) == 0
    result = np.array(Image.open(f"{arguments[0]}.png"))
    assert result.shape == (8, 8, 3) and result.std() > 5
    assert Image.open(f"{arguments[0]}-compare.png").size[0] > 128


def test_a_small_picture_is_enlarged_as_it_is(folder):
    assert edit("superres", "model", "--image", "tiny.png", "--seeds", "4", *FAST) == 0
    generator = Generator(colour_denoiser(), {"classes": ["ant", "bee", "cat"]}, device="cpu")
    expected = generator.superres(picture()[:2, :2], 4, seeds=[4], sigmas=(80.0, 2.0))[0]
    assert np.array_equal(np.array(Image.open("superres.png")), expected)
    assert np.array_equal(np.array(Image.open("superres-compare.png"))[2:66:32, 2:66:32], picture()[:2, :2])


def test_denoise_takes_noise_beyond_the_range_of_pixels(folder):
    noisy = np.random.default_rng(1).standard_normal((8, 8, 3)).astype(np.float32) * 2
    np.save("noisy.npy", noisy)
    assert edit("denoise", "model", "--image", "noisy.npy", "--sigma", "2", "--labels", "1") == 0
    generator = Generator(colour_denoiser(), {"classes": ["ant", "bee", "cat"]}, device="cpu")
    assert np.array_equal(np.array(Image.open("denoise.png")), generator.denoise(noisy, 2.0, 1)[0])
    assert not np.array_equal(generator.denoise(noisy, 2.0, 1), generator.denoise(noisy.clip(-1, 1), 2.0, 1))


def test_a_picture_in_colour_is_shown_beside_its_grey(folder):
    assert edit("colorize", "model", "--image", "small.png", "--seeds", "0-2", *FAST) == 0
    compare = Image.open("colorize-compare.png")
    assert compare.size[0] == 5 * 66 + 2 and compare.text["fastcm:seeds"] == "0,1,2" and compare.text["fastcm:labels"] == "0,1,2"
    assert np.array_equal(np.array(compare)[2:66:8, 2:66:8], picture())


def test_interpolate_from_the_command_line(folder):
    assert edit("interpolate", "model", "--seeds", "7,8", "--labels", "0", "--frames", "6", "--out", "way.png") == 0
    assert Image.open("way.png").size == (48, 8)
    animation = Image.open("way.gif")
    assert animation.n_frames > 6 and animation.size == (128, 128) and b"fastcm:seeds: 7,8" in animation.info["comment"]
    compare = Image.open("way-compare.png")
    assert compare.size == (6 * 66 + 2, 66 + 12 + 2) and compare.text["fastcm:labels"] == "0"
    assert np.array_equal(np.array(compare)[2:66:8, 68:132:8], np.array(Image.open("way.png"))[:, 8:16])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("paint", "model"), "paint"),
        (("inpaint", "model", "--image", "small.png"), "missing option for inpaint: --mask or --box"),
        (("inpaint", "model", "--box", "0,0,4,4"), "missing option for inpaint: --image"),
        (("inpaint", "model", "--image", "small.png", "--box", "4,0,4,4"), "empty rectangle in --box"),
        (("inpaint", "model", "--image", "small.png", "--box", "0,0,9,4"), "outside the picture in --box"),
        (("inpaint", "model", "--image", "small.png", "--mask", "black.png"), "an all-black mask"),
        (("inpaint", "model", "--image", "small.png", "--mask", "holes.png"), "a mask with transparency in --mask: holes.png"),
        (("inpaint", "model", "--image", "small.png", "--mask", "tiny.png"), "another size in --mask: tiny.png has 2x2"),
        (("inpaint", "model", "--image", "grey.png", "--box", "0,0,4,4"), "greyscale for a colour model in --image: grey.png"),
        (("inpaint", "model", "--image", "none.png", "--box", "0,0,4,4"), "no such file in --image: none.png"),
        (("inpaint", "model", "--image", "broken.png", "--box", "0,0,4,4"), "unreadable picture in --image: broken.png"),
        (("inpaint", "model", "--image", "small.png", "--box", "0,0,4,4", "--labels", "4"), "class out of range in labels: 4"),
        (("denoise", "model", "--image", "small.png"), "missing option for denoise: --sigma"),
        (("denoise", "model", "--image", "none.npy", "--sigma", "1"), "no such file in --image: none.npy"),
        (("denoise", "model", "--image", "broken.npy", "--sigma", "1"), "unreadable array in --image: broken.npy"),
        (("denoise", "model", "--image", "flat.npy", "--sigma", "1"), "wrong form of array in --image: flat.npy"),
        (("denoise", "model", "--image", "small.png", "--sigma", "99"), "noise level out of range"),
        (("superres", "model", "--image", "small.png", "--factor", "5"), "illegal value in factor: 5"),
        (("superres", "model", "--image", "small.png", "--factor", "0"), "illegal value in factor: 0"),
        (("superres", "model", "--image", "small.png", "--sigma", "2"), "an option that superres does not take: --sigma"),
        (("denoise", "model", "--image", "small.png", "--sigma", "1", "--seeds", "2"), "an option that denoise does not take: --seeds"),
        (("inpaint", "model", "--image", "small.png", "--box", "0,0,4,4", "--factor", "2"), "does not take: --factor"),
        (("stroke", "model", "--image", "small.png", "--sigma", "1", "--sigmas", "2,1"), "two options that exclude each other"),
        (("stroke", "model", "--image", "small.png", "--sigmas", "5,x"), "not a list of numbers in --sigmas: 5,x"),
        (("interpolate", "model", "--image", "small.png"), "an option that interpolate does not take: --image"),
        (("stroke", "model", "--image", "small.png", "--out", "x.jpg"), "unknown kind of file in --out: x.jpg"),
        (("stroke", "nowhere", "--image", "small.png"), "no such file or folder in MODEL"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(folder, capsys, arguments, words):
    before = sorted(folder.rglob("*"))
    assert edit(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcm: error: ") and words in error and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "own", "image", "options"),
    [("inpaint", (), "small.png", ("--mask", "mask.png")), ("superres", ("--factor", "2"), "large.png", ())],
)
def test_an_exported_task_edits_like_its_folder(folder, capsys, task, own, image, options):
    """A graph's own factor need not be named again; other tasks and samples are refused in one line."""
    least = {"channels": 8, "head_channels": 8, "channel_mult": (1,), "attention_resolutions": ()}
    save_model(folder / "least", colour_denoiser(**least), {"classes": ["ant", "bee", "cat"]})
    assert cli.main(["export", "least", "--onnx", "x.onnx", "--task", task, *own, *FAST]) == 0
    asked = (task, "--image", image, *options, "--seeds", "0-2", "--labels", "bee")
    assert edit(asked[0], "x.onnx", *asked[1:], "--provider", "cpu", "--out", "graph.png") == 0
    assert edit(asked[0], "least", *asked[1:], *own, *FAST, "--out", "folder.png") == 0
    for seed in range(3):
        graph, torch = (np.array(Image.open(f"{name}-{seed}.png")).astype(int) for name in ("graph", "folder"))
        assert np.abs(graph - torch).max() <= 1 and graph.std() > 10
    if task == "inpaint":
        assert np.array_equal(graph[:, :4], picture()[:, :4])
    capsys.readouterr()
    other = "superres" if task == "inpaint" else "inpaint"
    for arguments, words in (
        ((other, "--image", "small.png", *(("--box", "0,0,4,4") if other == "inpaint" else ())), f"no {other} in an exported graph"),
        (("colorize", "--image", "small.png"), "no colorize in an exported graph in MODEL: x.onnx. Edit with the folder"),
        (("interpolate",), "no interpolate in an exported graph"),
        ((task, "--image", image, *options, "--sigmas", "80,3"), "other noise levels than the graph's"),
    ):
        assert edit(arguments[0], "x.onnx", *arguments[1:], "--out", "refused.png") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert cli.main(["sample", "x.onnx", "--out", "refused.png"]) == 2 and f"Use fastcm edit {task}" in capsys.readouterr().err
    assert not list(folder.glob("refused*"))
