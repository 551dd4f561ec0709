"""From one picture file to uint8 pixels, by a stated rule.

The rule, in this order:
1. The first frame of an animated file is taken; EXIF orientation is applied.
2. 16-bit grey (`I;16`, and `I` as older Pillow opens it) is scaled by 255/65535; 32-bit float (`F`) has no stated range and is refused.
3. Transparency (RGBA, LA, PA, tRNS) is laid over white, except where four channels are asked for.
4. Grey stays grey only when the whole data set is grey or one channel is asked for, otherwise every picture becomes RGB; palette, CMYK,
   YCbCr, LAB and HSV become RGB by Pillow's conversion; a palette counts as colour, whatever its entries are. Of four channels the last is
   opacity, 255 where a picture has none.
5. Crop and resize as in guided-diffusion (openai/guided-diffusion, image_datasets.py, `center_crop_arr`): halve with a box filter while
   the short side is at least twice the resolution, resize the short side to the resolution (bicubic), cut the centre square. Of a picture
   that is to be enlarged and more than 8 times as long as wide, the rest is cut off before, so that no header asks for more.
"""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastcm.generation.pictures import MODES

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
TRANSPARENT_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
MOST_ASPECT = 8  # of what is enlarged: how much longer than wide
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def ending(name: str) -> str:
    """The ending of a file's name, in small letters."""
    return os.path.splitext(name)[1].lower() or "without ending"


def is_picture(name: str) -> bool:
    return ending(name) in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a part of the path is one that systems hide, and no picture of a set."""
    return any(part.startswith((".", "__MACOSX")) and part != ".." for part in name.split("/"))


ORIENTATION_INFO = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where Pillow finds an orientation outside TIFF


class BadImageError(Exception):
    """A file that is not a readable picture; the text says why, without the file's name."""


class OtherSizeError(Exception):
    """A picture of another size than all are expected to have; `size` is (width, height)."""

    def __init__(self, size: tuple[int, int]):
        super().__init__(f"{size[0]}x{size[1]}")
        self.size = size


class Header(NamedTuple):
    """What a file says about itself before its pixels are decoded; width and height in pixels, before EXIF orientation."""

    width: int
    height: int
    is_grey: bool


def read_header(picture: Path | bytes) -> Header:
    """Reads size and mode of a file, or of a file's bytes, without decoding.

    Raises BadImageError, also for more pixels than `PIL.Image.MAX_IMAGE_PIXELS`. Not for threads, like `decode`: Pillow's bomb warning
    becomes an error by the process-wide warning filters.
    """
    with _opened(picture) as image:
        return Header(*image.size, image.mode in GREY_MODES)


def decode(picture: Path | bytes, *, resolution: int, channels: int, exact: bool = False) -> np.ndarray:
    """Returns a file, or a file's bytes, as uint8 [channels, resolution, resolution]; channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    exact: raise OtherSizeError instead of cropping and resizing. Raises BadImageError.
    """
    with _opened(picture) as image:
        if exact and image.size != (resolution, resolution):
            raise OtherSizeError(image.size)
        image.load()
        # Looking for it in vain would cost a tenth of a small PNG. TIFF, which newer Pillow turns by itself, keeps it in its tags.
        if hasattr(image, "tag_v2") or not ORIENTATION_INFO.isdisjoint(image.info):
            ImageOps.exif_transpose(image, in_place=True)
        return to_pixels(eight_bits(image, channels=channels), resolution=resolution)


@contextmanager
def _opened(picture: Path | bytes) -> Iterator[Image.Image]:
    """The picture, whatever goes wrong with it turned into BadImageError."""
    with nullcontext() if _bombs_raise_everywhere else warnings.catch_warnings():
        if not _bombs_raise_everywhere:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture)) as image:
                yield image
        except (BadImageError, OtherSizeError):
            raise
        except Exception as error:  # hostile files make Pillow raise nearly anything: struct.error, SyntaxError, IndexError
            raise BadImageError(_reason(picture, error)) from error


_bombs_raise_everywhere = False


def bombs_raise() -> None:
    """Makes Pillow's bomb warning an error for all of this process: for one that does nothing but decode, where doing it per file costs."""
    global _bombs_raise_everywhere
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    _bombs_raise_everywhere = True


def eight_bits(image: Image.Image, *, channels: int) -> Image.Image:
    """Converts any mode to `L`, `RGB` or `RGBA` (1, 3, 4 channels) by points 2 to 4 of the module's rule; BadImageError for mode `F`."""
    if image.mode == "F":
        raise BadImageError("32-bit float pixels have no stated range")
    if image.mode in SIXTEEN_BIT_MODES:
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    elif channels == 4:
        image = image.convert("RGB")  # Pillow does not know every mode's way to RGBA
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def to_pixels(image: Image.Image, *, resolution: int) -> np.ndarray:
    """Crops and resizes an `L`, `RGB` or `RGBA` picture by point 5; returns uint8 [C, resolution, resolution]."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    if scale > 1:
        image = _middle(image, most=MOST_ASPECT * min(image.size))
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    if image.size != (resolution, resolution):
        left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _middle(image: Image.Image, *, most: int) -> Image.Image:
    """The middle of the picture, no side longer than `most`."""
    size = [min(side, most) for side in image.size]
    left, top = ((whole - side) // 2 for whole, side in zip(image.size, size, strict=True))
    return image if size == list(image.size) else image.crop((left, top, left + size[0], top + size[1]))


def is_transparent(picture: Path) -> bool:
    """Whether a pixel of a picture's file is not opaque. Raises BadImageError."""
    with _opened(picture) as image:
        if image.mode not in TRANSPARENT_MODES and "transparency" not in image.info:
            return False
        return image.convert("RGBA").getextrema()[3][0] < 255


def _reason(picture: Path | bytes, error: Exception) -> str:
    """Pillow's message in the words of somebody who looks for the broken file."""
    try:
        if (len(picture) if isinstance(picture, bytes) else picture.stat().st_size) == 0:
            return "the file is empty (0 bytes)"
    except OSError as problem:
        return problem.strerror or str(problem)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"decompression bomb: {str(error).split(', could be')[0]}"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, whatever its name says"
    return " ".join(str(error).split()) or type(error).__name__
