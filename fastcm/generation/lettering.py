"""Text in pictures, in a font that has its letters: Pillow's own has those of ASCII."""

from functools import cache

from PIL import ImageDraw, ImageFont

# What systems commonly have, looked for where they keep fonts.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc")
SIZE = 10
NO_LETTER = chr(0x10FFFF)


@cache
def fonts() -> tuple:
    """Pillow's font, then those of FONTS that this machine has."""
    found = [ImageFont.load_default()]
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, SIZE))
        except (OSError, ImportError):  # not there, or a Pillow without FreeType
            continue
    return tuple(found)


@cache
def has_letter(font, letter: str) -> bool:
    """False where the font draws the sign of a missing letter."""
    try:
        return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask(NO_LETTER))
    except UnicodeError:  # a font of pixels, which knows one byte a letter
        return letter.isascii()


def font_of(text: str):
    """The first font that has every letter of the text, or None."""
    return next((font for font in fonts() if all(has_letter(font, letter) for letter in set(text))), None)


def class_caption(name: str, number: int) -> str:
    """The name of a class, or its number where no font has its letters."""
    return name if font_of(name) is not None else f"class {number}"


def width(text: str) -> float:
    """Pixels from the first letter to the last."""
    font, text = _drawn(text)
    return font.getlength(text)


def write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, most: int | None = None) -> None:
    """Draws the text, cut where it would be wider than `most` pixels."""
    font, text = _drawn(text)
    if most is not None and font.getlength(text) > most:
        while text and font.getlength(f"{text}..") > most:
            text = text[:-1]
        text = f"{text}.."
    draw.text(place, text, fill="black", font=font)


def _drawn(text: str):
    """(font, text) with a question mark in the place of a letter that no font has."""
    font = font_of(text)
    if font is not None:
        return font, text
    return fonts()[0], "".join(letter if has_letter(fonts()[0], letter) else "?" for letter in text)
