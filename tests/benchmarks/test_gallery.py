"""The page of generation shows what was run: every command with its picture, none without."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcm.benchmarks.quality import gallery
from fastcm.benchmarks.quality.gallery import MODELS, Shown, painting, put_block
from fastcm.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "generation.md"


def block(name):
    return re.search(f"<!-- {name} -->(.*?)<!-- {name} -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


def shown():
    """(model, what it shows) of the models that the page has."""
    return [(model, item) for name, model in MODELS.items() if block(name).strip() for item in (*model.samples(), *model.edits())]


def test_the_page_has_the_gallerys_commands_and_their_pictures():
    assert {model.name for model, _ in shown()} >= {"digits"}
    for model, item in shown():
        assert item.markdown() in block(model.name)
        assert Image.open(ROOT / "docs" / "generation" / item.name).width > 64


def test_the_pictures_say_that_these_commands_drew_them():
    for _, item in shown():
        if not item.name.endswith(".png"):
            continue
        text, words = Image.open(ROOT / "docs" / "generation" / item.name).text, item.command.split()
        assert text.get("fastcm:task", "sample") == (words[2] if words[1] == "edit" else "sample")
        if "--labels" in words:
            assert set(text["fastcm:labels"].split(",")) == {words[words.index("--labels") + 1]}


def test_small_pictures_and_none_besides():
    folder = ROOT / "docs" / "generation"
    inputs = {f"{name}-{end}" for name in MODELS for end in ("picture.png", "painting.png", "noisy.npy")}
    assert {path.name for path in folder.iterdir()} - inputs == {item.name for _, item in shown()}
    assert max(path.stat().st_size for path in folder.iterdir()) < 400_000


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_command_is_one_that_fastcm_takes(model):
    for item in (*model.samples(), *model.edits()):
        words = item.command.split()
        assert words[0] == "fastcm" and build_parser(words[1]).parse_args(words[1:]).model == f"runs/{model.name}"


def test_every_task_of_editing_is_shown():
    from fastcm.cli.edit import TASKS

    assert {item.command.split()[2] for item in MODELS["emoji32"].edits()} == set(TASKS)
    assert {item.command.split()[2] for item in MODELS["digits"].edits()} == set(TASKS) - {"colorize"}


def test_committed_inputs_are_the_data_sets_pictures():
    for name in {model.name for model, _ in shown()}:
        for end, image in MODELS[name].inputs().items():
            kept = np.array(Image.open(ROOT / "docs" / "generation" / f"{name}-{end}.png"))
            assert np.array_equal(kept.reshape(image.shape), image)
        assert np.array_equal(np.load(ROOT / "docs" / "generation" / f"{name}-noisy.npy"), MODELS[name].noisy())


def test_a_painting_has_few_colours_in_squares():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    painted = painting(image, 4)
    assert painted.shape == (8, 8, 3) and set(np.unique(painted)) <= {0, 127, 255}
    assert np.array_equal(painted[::4, ::4], painted[3::4, 3::4])


def test_blocks_are_replaced_and_their_absence_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- digits -->\nold\n<!-- digits -->\nz\n")
    for _ in range(2):
        put_block(page, "digits", "new \\1\n")
        assert page.read_text() == "a\n<!-- digits -->\nnew \\1\n<!-- digits -->\nz\n"
    with pytest.raises(SystemExit, match="emoji32"):
        put_block(page, "emoji32", "new\n")


def test_a_trained_model_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, calls = MODELS["digits"], []
    assert not gallery.is_trained(model)
    run = tmp_path / "runs" / "digits"
    (run / "checkpoints" / "step-000000002").mkdir(parents=True)
    (run / "checkpoints" / "step-000000002" / "state.json").write_text('{"threads": 3}')
    (run / "config.json").write_text('{"duration_kimg": 2}')
    for nimg, done in ((1999, False), (2000, True)):
        (run / "log.jsonl").write_text(f'{{"nimg": {nimg}, "images_per_s": 100.0}}\n')
        assert gallery.is_trained(model) == done
    monkeypatch.setattr(gallery, "call", calls.append)
    monkeypatch.setattr(gallery.Model, "samples", lambda self: [])
    item = Shown("Title", "Text.", "fastcm edit x", "docs/generation/made.png", "made.png")
    monkeypatch.setattr(gallery.Model, "edits", lambda self: [item, item])
    told = gallery.drawn(model)
    assert calls == ["fastcm edit x"] and told.count(item.markdown()) == 2
    assert told.startswith("`fastcm train digits`: 2 kimg in about 0 minutes on ")
