"""The picture rule with golden pixels, and bad files by name and reason."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from random_pictures import random_pixels, write_folder

from fastcm.data.dataset import open_dataset
from fastcm.data.decoding import BadImageError, decode, read_header, to_pixels
from fastcm.errors import InputError


def golden(tmp_path, image, name="x.png", *, channels=3, resolution=2, **options):
    image.save(tmp_path / name, **options)
    return decode(tmp_path / name, resolution=resolution, channels=channels).tolist()


def test_alpha_lies_over_white(tmp_path):
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0]], [[0, 0, 0, 128], [0, 0, 200, 51]]], dtype=np.uint8)
    expected = [[[255, 255], [127, 204]], [[0, 255], [127, 204]], [[0, 255], [127, 244]]]
    assert golden(tmp_path, Image.fromarray(pixels)) == expected
    assert golden(tmp_path, Image.fromarray(pixels[:, :, 2:]), channels=1) == [[[0, 255], [127, 244]]]


def test_palette_transparency_and_one_bit(tmp_path):
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2, 1])
    assert golden(tmp_path, image) == [[[10, 40], [70, 40]], [[20, 50], [80, 50]], [[30, 60], [90, 60]]]
    assert golden(tmp_path, image, transparency=1) == [[[10, 255], [70, 255]], [[20, 255], [80, 255]], [[30, 255], [90, 255]]]
    bits = Image.new("1", (2, 2))
    bits.putdata([1, 0, 0, 1])
    assert golden(tmp_path, bits, channels=1) == [[[255, 0], [0, 255]]]


def test_sixteen_bits_are_scaled(tmp_path):
    image = Image.fromarray(np.array([[0, 128], [129, 65535]], dtype=np.uint16))
    assert golden(tmp_path, image, channels=1) == [[[0, 0], [1, 255]]]
    assert golden(tmp_path, image) == [[[0, 0], [1, 255]]] * 3
    assert golden(tmp_path, image, "x.tif", channels=1) == [[[0, 0], [1, 255]]]


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = np.array(golden(tmp_path, image, "x.jpg", resolution=16, quality=100)).reshape(3, -1).mean(1)
    assert red > 250 and green < 5 and blue < 5


def test_cmyk_without_loss(tmp_path):
    image = Image.new("CMYK", (2, 2))
    image.putdata([(0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255), (10, 20, 30, 0)])
    assert golden(tmp_path, image, "x.tif") == [[[255, 0], [0, 245]], [[0, 255], [0, 235]], [[0, 0], [0, 225]]]


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(BadImageError, match="32-bit float"):
        decode(tmp_path / "x.tif", resolution=2, channels=1)


@pytest.mark.parametrize(("orientation", "expected"), [(1, [[1, 2], [3, 4]]), (3, [[4, 3], [2, 1]]), (6, [[3, 1], [4, 2]])])
def test_exif_orientation_is_applied(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.array([[1, 2], [3, 4]], dtype=np.uint8))
    assert golden(tmp_path, image, channels=1, exif=exif) == [expected]


@pytest.mark.parametrize("place", ["x.tif", "x.webp", "xmp png", "xmp webp"])
def test_orientation_wherever_it_is_written(tmp_path, place):
    image = Image.fromarray(np.array([[1, 2], [3, 4]], dtype=np.uint8)).convert("RGB" if "webp" in place else "L")
    text = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    exif, info = Image.Exif(), PngInfo()
    exif[0x0112] = 6
    info.add_itxt("XML:com.adobe.xmp", text)
    name, options = {
        "x.tif": ("x.tif", {"exif": exif}),
        "x.webp": ("x.webp", {"exif": exif, "lossless": True}),
        "xmp png": ("x.png", {"pnginfo": info}),
        "xmp webp": ("x.webp", {"xmp": text.encode(), "lossless": True}),
    }[place]
    assert golden(tmp_path, image, name, channels=1, **options) == [[[3, 1], [4, 2]]]


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (2, 2), (value, value, value)) for value in (9, 200)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if name == "x.webp" else {}))
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 2
    assert decode(tmp_path / name, resolution=2, channels=1).tolist() == [[[9, 9], [9, 9]]]


def test_crop_and_resize_rule():
    # 9x16 at resolution 4: one box halving (to 4x8, the odd row dropped by the box), then the centre 4x4.
    pixels = random_pixels(8, 16, 1)[:, :, 0]
    halved = np.round(pixels.reshape(4, 2, 8, 2).astype(np.float64).mean((1, 3)) + 1e-9)
    result = to_pixels(Image.fromarray(pixels), resolution=4)
    assert np.abs(result[0] - halved[:, 2:6]).max() <= 1 and result.shape == (1, 4, 4)
    # Enlarging takes the bicubic step alone.
    picture = Image.fromarray(random_pixels(5, 3, 3))
    np.testing.assert_array_equal(
        to_pixels(picture, resolution=6).transpose(1, 2, 0), np.asarray(picture.resize((6, 10), Image.Resampling.BICUBIC))[2:8]
    )


def test_grey_only_when_every_picture_is_grey(tmp_path):
    (tmp_path / "set").mkdir()
    for index in range(2):
        Image.fromarray(random_pixels(4, 4, seed=index)).save(tmp_path / "set" / f"{index}.png")
    assert open_dataset(tmp_path / "set").channels == 1
    Image.fromarray(random_pixels(4, 4, 3)).save(tmp_path / "set" / "colour.png")
    mixed = open_dataset(tmp_path / "set")
    assert mixed.channels == 3
    np.testing.assert_array_equal(mixed.images[0], np.repeat(random_pixels(1, 4, 4, seed=0), 3, axis=0))


def bomb_png():
    """A valid header of 30000 x 30000 pixels with next to nothing behind it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def damaged(kind, tmp_path):
    Image.fromarray(random_pixels(64, 64, 3)).save(tmp_path / "whole.jpg")
    Image.fromarray(random_pixels(64, 64, 3)).save(tmp_path / "whole.png")
    jpeg, png = (tmp_path / "whole.jpg").read_bytes(), (tmp_path / "whole.png").read_bytes()
    middle = png.index(b"IDAT") + 200
    return {
        "truncated": jpeg[: len(jpeg) // 2],
        "crc": png[:middle] + bytes([png[middle] ^ 255]) + png[middle + 1 :],
        "empty": b"",
        "text": b"Hello, I am not a picture.\n",
        "bomb": bomb_png(),
    }[kind]


REASONS = {
    "truncated": "truncated",
    "crc": "broken",
    "empty": r"the file is empty \(0 bytes\)",
    "text": "not a picture",
    "bomb": r"decompression bomb: .*900000000 pixels",
}


@pytest.mark.parametrize("kind", REASONS)
def test_bad_picture_is_named(tmp_path, kind):
    write_folder(tmp_path / "set", [(64, 64)] * 3)
    (tmp_path / "set" / "1x.jpg").write_bytes(damaged(kind, tmp_path))
    cache = tmp_path / "cache"
    with pytest.raises(InputError, match=rf"unreadable picture in --data: .*set/1x\.jpg \(.*{REASONS[kind]}.*pass --bad-images skip"):
        open_dataset(tmp_path / "set", cache_dir=cache, progress=False)
    assert not any(cache.iterdir()), "a failed build left something behind"


def test_bomb_is_refused_by_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb_png())
    with pytest.raises(BadImageError, match="decompression bomb"):
        read_header(tmp_path / "bomb.png")
    Image.new("L", (9500, 9500)).save(tmp_path / "large.png")  # 90 megapixels: Pillow alone would only warn
    with pytest.raises(BadImageError, match="decompression bomb"):
        read_header(tmp_path / "large.png")
