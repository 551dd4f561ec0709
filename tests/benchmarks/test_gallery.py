"""The page of generation shows what was run: every command with its picture, none without."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcm.benchmarks.quality import gallery
from fastcm.benchmarks.quality.gallery import MARK, MODEL, Shown, all_shown, painting, put_block
from fastcm.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGE, FOLDER = ROOT / "docs" / "generation.md", ROOT / "docs" / "generation"
INPUTS = {"picture.png", "painting.png", "noisy.npy"}


def test_the_page_has_the_gallerys_commands_and_their_pictures():
    block = re.search(f"<!-- {MARK} -->(.*?)<!-- {MARK} -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    for item in all_shown():
        assert item.markdown() in block
        assert Image.open(FOLDER / item.name).width > 64


def test_the_pictures_say_that_these_commands_drew_them():
    for item in all_shown():
        if not item.name.endswith(".png"):
            continue
        text, words = Image.open(FOLDER / item.name).text, item.command.split()
        assert text.get("fastcm:task", "sample") == (words[2] if words[1] == "edit" else "sample")
        if "--labels" in words:
            assert set(text["fastcm:labels"].split(",")) == {words[words.index("--labels") + 1]}


def test_small_pictures_and_none_besides():
    assert {path.name for path in FOLDER.iterdir()} - INPUTS == {item.name for item in all_shown()}
    assert max(path.stat().st_size for path in FOLDER.iterdir()) < 400_000


def test_every_command_is_one_that_fastcm_takes():
    from fastcm.cli.edit import TASKS

    for item in all_shown():
        words = item.command.split()
        assert words[0] == "fastcm" and build_parser(words[1]).parse_args(words[1:]).model == MODEL
    assert {item.command.split()[2] for item in gallery.edits(0)} == set(TASKS) - {"colorize"}


def test_committed_inputs_are_the_data_sets_pictures():
    for name, image in gallery.inputs().items():
        assert np.array_equal(np.array(Image.open(FOLDER / f"{name}.png")).reshape(image.shape), image)
    assert np.array_equal(np.load(FOLDER / "noisy.npy"), gallery.noisy())


def test_a_painting_has_few_colours_in_squares():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    painted = painting(image, 4)
    assert painted.shape == (8, 8, 3) and set(np.unique(painted)) <= {0, 127, 255}
    assert np.array_equal(painted[::4, ::4], painted[3::4, 3::4])


def test_blocks_are_replaced_and_their_absence_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- one -->\nz\n")
    for _ in range(2):
        put_block(page, "one", "new \\1\n")
        assert page.read_text() == "a\n<!-- one -->\nnew \\1\n<!-- one -->\nz\n"
    with pytest.raises(SystemExit, match="two"):
        put_block(page, "two", "new\n")


def test_a_command_runs_once_for_all_that_it_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "generation.md").write_text(f"<!-- {MARK} -->\n<!-- {MARK} -->\n")
    items = [Shown(name, "Text.", "fastcm edit x", "drawn.png", f"{name}.png") for name in ("a", "b")]
    calls = []
    monkeypatch.setattr(gallery, "all_shown", lambda: items)
    monkeypatch.setattr(gallery, "call", lambda command: calls.append(command) or Path("drawn.png").write_bytes(b"png"))
    assert gallery.main([]) == 0
    assert calls == ["fastcm edit x"] and (tmp_path / "docs/generation/b.png").read_bytes() == b"png"
    assert all(item.markdown() in (tmp_path / "docs" / "generation.md").read_text() for item in items)
