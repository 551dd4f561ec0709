"""Work and memory are bounded by what a person asked for, not by what a header says."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from random_pictures import png, random_pixels

from fastcm.data import dataset as datasets
from fastcm.data.dataset import open_dataset
from fastcm.data.decoding import MOST_ASPECT, decode
from fastcm.errors import InputError


@pytest.fixture
def resized(monkeypatch):
    """The sizes that pictures are brought to."""
    sizes, resize = [], Image.Image.resize

    def recorded(image, size, *arguments, **options):
        sizes.append(size)
        assert size[0] * size[1] < 10_000_000, "far more than was asked for"
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    return sizes


@pytest.mark.parametrize("shape", [(60_000, 1, 3), (1, 60_000, 3)])
def test_a_thin_picture_is_cut_before_it_is_enlarged(shape, resized):
    pixels = random_pixels(*shape)
    found = decode(png(pixels), resolution=256, channels=3)
    assert found.shape == (3, 256, 256) and resized == [(256, 256 * MOST_ASPECT) if shape[1] == 1 else (256 * MOST_ASPECT, 256)]
    middle = pixels[29_996:30_004] if shape[1] == 1 else pixels[:, 29_996:30_004]
    np.testing.assert_array_equal(found, decode(png(middle), resolution=256, channels=3))


def test_what_is_not_much_longer_than_wide_is_enlarged_whole(resized):
    decode(png(random_pixels(8, 64, 3)), resolution=16, channels=3)
    assert resized == [(128, 16)]


def npz_of(path, shape, content=b""):
    """An .npz whose header promises `shape`."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", file.getvalue() + content)
    return path


def test_arrays_of_pictures_that_no_picture_may_have(tmp_path):
    with pytest.raises(InputError, match=r"pictures too large in arr_0 in --data: .*x\.npz: shape \[1, 100000, 100000, 3\]"):
        open_dataset(npz_of(tmp_path / "x.npz", (1, 100_000, 100_000, 3)), cache_dir=tmp_path / "cache")


def test_arrays_are_enlarged_in_blocks_and_outside_of_memory(tmp_path, monkeypatch):
    """Small files whose pictures are large at the resolution that was asked for."""
    pixels = random_pixels(20, 4, 4, 3)
    np.savez(tmp_path / "x.npz", pixels)
    whole = open_dataset(tmp_path / "x.npz", resolution=16, cache_dir=tmp_path / "cache")
    assert not isinstance(whole.images, np.memmap)
    seen, formed = [], datasets._formed
    monkeypatch.setattr(datasets, "_formed", lambda images, *form: seen.append(len(images)) or formed(images, *form))
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 20 * 16 * 16 * 3 - 1)
    monkeypatch.setattr(datasets, "BLOCK_BYTES", 6 * 16 * 16 * 3)
    cached = open_dataset(tmp_path / "x.npz", resolution=16, cache_dir=tmp_path / "cache", progress=False)
    assert isinstance(cached.images, np.memmap) and seen == [6, 6, 6, 2]
    np.testing.assert_array_equal(cached.images, whole.images)
