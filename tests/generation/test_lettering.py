"""Text in pictures: a font that has its letters, or a number."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from fastcm.generation import lettering


@pytest.fixture
def pillows_alone(monkeypatch):
    monkeypatch.setattr(lettering, "fonts", lambda: (ImageFont.load_default(),))


def test_a_name_whose_letters_no_font_has_is_a_number(pillows_alone):
    assert lettering.class_caption("cat 2", 7) == "cat 2"
    assert lettering.class_caption("chat zébré", 7) == "class 7" and lettering.class_caption("\u732b", 7) == "class 7"


def test_a_font_that_has_the_letters_is_taken():
    accented = [font for font in lettering.fonts() if lettering.has_letter(font, "é")]
    if not accented:
        pytest.skip("this machine has no font with accents")
    assert lettering.class_caption("zébré", 7) == "zébré" and lettering.font_of("zébré") is accented[0]
    assert lettering.font_of("zebra") is lettering.fonts()[0]


def test_what_no_font_has_is_a_question_mark_and_long_text_is_cut(pillows_alone):
    def drawn(text, most=None):
        image = Image.new("L", (80, 12), "white")
        lettering.write(ImageDraw.Draw(image), (0, 0), text, most)
        return np.array(image)

    assert np.array_equal(drawn("\u732b a"), drawn("? a")) and drawn("? a").min() < 100
    cut = drawn("a long text that ends", 40)
    assert (cut[:, 41:] == 255).all() and (cut[:, :40] < 100).any()
