"""Data sets: what is read from where, classes, sources that are none, batches as a function of (seed, nimg)."""

import io
import os
import shutil
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from random_pictures import random_pixels, write_folder

from fastcm.data.dataset import open_dataset
from fastcm.data.decoding import to_pixels
from fastcm.errors import InputError, RunError


def test_digits():
    digits = open_dataset("digits")
    assert (len(digits), digits.channels, digits.resolution, digits.name) == (1797, 1, 8, "digits")
    assert digits.class_names == tuple("0123456789") and digits.images.dtype == np.uint8
    assert digits.fingerprint == "6abea18476e82fab3bb519833f37b97f7a273533541e265ba9086e2abffb8087"


def test_emoji():
    emoji = open_dataset("emoji32")
    assert (len(emoji), emoji.channels, emoji.resolution, emoji.labels, emoji.class_names) == (1432, 3, 32, None, None)
    assert len({image.tobytes() for image in emoji.images}) == 1432 and (emoji.images[:, :, 0, 0] == 255).all()


@pytest.mark.slow
def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    digits, real = open_dataset("digits"), load_digits()
    np.testing.assert_array_equal(digits.images[:, 0], np.round(real.images * 255 / 16))
    np.testing.assert_array_equal(digits.labels, real.target)


def test_folder_with_classes(tmp_path):
    pictures = write_folder(tmp_path / "süße katzen", [(8, 8)] * 3, classes=("b cat", "a dog"))
    (tmp_path / "süße katzen" / ".hidden").mkdir()
    (tmp_path / "süße katzen" / ".hidden" / "x.png").write_bytes(b"")
    (tmp_path / "süße katzen" / "a dog" / "notes.txt").write_text("not a picture")
    dataset = open_dataset(tmp_path / "süße katzen", progress=False)
    assert dataset.class_names == ("a dog", "b cat") and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1] and dataset.name == "süße katzen"
    np.testing.assert_array_equal(dataset.images, np.stack(pictures).transpose(0, 3, 1, 2))


def test_flat_folder_and_a_single_subfolder_have_no_labels(tmp_path):
    write_folder(tmp_path / "flat", [(8, 8)] * 2)
    write_folder(tmp_path / "nested", [(8, 8)] * 2, classes=("pictures",))
    flat, nested = open_dataset(tmp_path / "flat"), open_dataset(tmp_path / "nested")
    assert flat.labels is None and flat.class_names is None and nested.labels is None
    assert flat.fingerprint == nested.fingerprint  # the same pixels, whatever the folder is called


def test_linked_class_folders_are_followed_once(tmp_path):
    write_folder(tmp_path / "real", [(8, 8)] * 2, classes=("a", "b"))
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "real" / "a", tmp_path / "set" / "a")
    os.symlink(tmp_path / "real" / "b", tmp_path / "set" / "b")
    os.symlink(tmp_path / "set", tmp_path / "real" / "a" / "loop")
    assert open_dataset(tmp_path / "set").labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("in_memory", [True, False])
def test_npz(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr("fastcm.data.dataset.IN_MEMORY_BYTES", 0)
        monkeypatch.setattr("fastcm.data.dataset.BLOCK", 4)
    pixels, labels = random_pixels(10, 8, 8, 3), np.arange(10) % 3
    np.savez_compressed(tmp_path / "set.npz", pixels, labels)
    dataset = open_dataset(tmp_path / "set.npz", cache_dir=tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(dataset.images, pixels.transpose(0, 3, 1, 2))
    assert dataset.labels.tolist() == labels.tolist() and dataset.class_names == ("0", "1", "2")
    assert isinstance(dataset.images, np.memmap) != in_memory and (tmp_path / "cache").exists() != in_memory
    assert dataset.fingerprint == open_dataset((pixels, labels)).fingerprint
    resized = open_dataset(tmp_path / "set.npz", resolution=4, cache_dir=tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(resized.images[7], to_pixels(Image.fromarray(pixels[7]), resolution=4))


def test_arrays():
    grey = open_dataset(random_pixels(5, 8, 8))
    assert grey.images.shape == (5, 1, 8, 8) and grey.labels is None and grey.name == "array"
    assert not grey.images.flags.writeable
    assert open_dataset(random_pixels(5, 12, 8, 3), resolution=8).images.shape == (5, 3, 8, 8)
    assert open_dataset((random_pixels(5, 8, 8), [0, 1, 2, 0, 1])).labels.dtype == np.int64


def test_fingerprint_follows_pixels_labels_and_names():
    pixels, labels = random_pixels(4, 8, 8), np.array([0, 1, 0, 1])
    changed = pixels.copy()
    changed[3, 7, 7] ^= 1
    sets = [open_dataset(s) for s in (pixels, changed, (pixels, labels), (pixels, labels[::-1]))]
    sets += [open_dataset((pixels, labels), classes=3), sets[0].subset([0, 1]), sets[0].subset([1, 0])]
    assert len({dataset.fingerprint for dataset in sets}) == len(sets)


def test_classes_of_a_model():
    pixels = random_pixels(4, 8, 8)
    assert open_dataset((pixels, [0, 1, 0, 1]), classes=3).class_names == ("0", "1", "2")
    dropped = open_dataset((pixels, [0, 1, 0, 1]), classes=0)
    assert dropped.labels is None and dropped.class_names is None
    with pytest.raises(InputError, match=r"label out of range in --data: array: 1 in row 1\. 1 classes are expected"):
        open_dataset((pixels, [0, 1, 0, 1]), classes=1)
    with pytest.raises(InputError, match="no labels in --data: array"):
        open_dataset(pixels, classes=2)


def test_subset():
    digits = open_dataset("digits")
    half = digits.subset(slice(1, None, 2))
    assert len(half) == 898 and np.shares_memory(half.images, digits.images)
    np.testing.assert_array_equal(half.labels, digits.labels[1::2])
    picked = digits.subset([5, 3])
    np.testing.assert_array_equal(picked.images, digits.images[[5, 3]])
    with pytest.raises(InputError, match="an empty subset"):
        digits.subset([])


@pytest.mark.parametrize("index", [slice(3, None), slice(8, 1, -2), [5, 0, 2]])
def test_batches_of_a_part_of_a_cache(tmp_path, index):
    """Rows are read from the file at the places where the view has them."""
    pictures = write_folder(tmp_path / "set", [(8, 8)] * 9)
    part = open_dataset(tmp_path / "set", cache_dir=tmp_path / "cache", progress=False).subset(index)
    plain = open_dataset(np.stack(pictures)[index])
    images, _, _ = part.batch(4, 11, seed=2)
    assert images.equal(plain.batch(4, 11, seed=2)[0])
    few, _, positions = part.batch(4, 11, seed=2, part=slice(3, 7))
    assert few.equal(images[3:7]) and positions.tolist() == [7, 8, 9, 10]


def test_cache_cut_short_or_removed_while_it_is_used(tmp_path):
    pictures = write_folder(tmp_path / "set", [(8, 8)] * 3)
    dataset = open_dataset(tmp_path / "set", cache_dir=tmp_path / "cache", progress=False)
    [file] = (tmp_path / "cache").rglob("images.bin")
    shutil.rmtree(file.parent)
    assert sorted(dataset.batch(0, 3, seed=0)[0][:, 0, 0, 0].tolist()) == sorted(int(p[0, 0, 0]) for p in pictures)
    file.parent.mkdir()
    file.write_bytes(b"short")
    with pytest.raises(RunError, match=r"the image cache was cut short while it was used: .*images\.bin"):
        dataset.batch(0, 3, seed=0)


def test_skipping_bad_pictures(tmp_path):
    pictures = write_folder(tmp_path / "set", [(8, 8)] * 220)
    names = sorted(f"{index}.png" for index in range(220))
    (tmp_path / "set" / names[7]).write_bytes(b"")
    Image.fromarray(pictures[0]).save(tmp_path / "cut.png")
    (tmp_path / "set" / names[100]).write_bytes((tmp_path / "cut.png").read_bytes()[:120])
    dataset = open_dataset(tmp_path / "set", bad_images="skip", cache_dir=tmp_path / "cache", progress=False)
    assert (len(dataset), dataset.skipped) == (218, 2)
    good = [int(name.split(".")[0]) for name in names if name not in (names[7], names[100])]
    np.testing.assert_array_equal(dataset.images, np.stack([pictures[index] for index in good]).transpose(0, 3, 1, 2))
    [listing] = (tmp_path / "cache").rglob("bad_images.txt")
    assert sorted(line.split(": ")[0] for line in listing.read_text().splitlines()) == sorted([names[7], names[100]])
    with pytest.raises(InputError, match="unreadable picture"):
        open_dataset(tmp_path / "set", cache_dir=tmp_path / "cache")  # the cached entry does not hide them
    (tmp_path / "set" / names[150]).write_bytes(b"")
    with pytest.raises(InputError, match=r"more than 1% unreadable pictures in --data: .*3 or more of 220"):
        open_dataset(tmp_path / "set", bad_images="skip", cache_dir=tmp_path / "cache", progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", r"no such file or folder in --data: .*none\. Give a folder"),
        (lambda p: "digitz", r"no such file or folder in --data: digitz\..* Did you mean 'digits'\?"),
        (lambda p: p, r"no picture in --data: .* \(1 files seen\)\. Accepted extensions: \.bmp"),
        (lambda p: p / "a.txt", r"not a data set in --data: .*a\.txt"),
        (lambda p: random_pixels(2, 8, 6), r"not all of one square size in --data: array \(6x8\)\. Pass --resolution"),
        (lambda p: np.zeros((2, 8, 8, 3), np.float32), r"not pictures in --data: array: float32 \[2, 8, 8, 3\]"),
        (lambda p: random_pixels(2, 3, 8, 8), r"not pictures in --data: array: uint8 \[2, 3, 8, 8\]"),
        (lambda p: random_pixels(0, 8, 8), "no picture in --data: array"),
        (lambda p: (random_pixels(3, 8, 8), [0, 1]), r"not one class index per picture in the labels of --data: array: int64 \[2\]"),
        (lambda p: (random_pixels(3, 8, 8), [0.0, 1.0, 2.0]), "not one class index per picture"),
        (lambda p: (random_pixels(3, 8, 8), [0, -1, 2]), "negative label in the labels of --data: array: -1 in row 1"),
    ],
)
def test_sources_that_are_none(tmp_path, make, message):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=message):
        open_dataset(make(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a zip", "unreadable .npz in --data"),
        (b"", "unreadable .npz in --data"),
        ({"x": np.zeros(3)}, r"no array arr_0 in --data: .*set\.npz \(it holds x\.npy\)"),
        ({"arr_0": np.zeros((2, 8, 8), np.int32)}, r"not pictures in arr_0 in --data: .*set\.npz: int32"),
        ({"arr_0": np.array([{}, {}])}, "not pictures in arr_0"),
        ({"arr_0": np.zeros((2, 8, 8), np.uint8), "arr_1": np.array([0, 1, 2])}, r"not one class index per picture in arr_1 in --data"),
        ({"arr_0": np.asfortranarray(random_pixels(2, 8, 8))}, "Fortran order"),
    ],
)
def test_npz_that_is_none(tmp_path, content, message):
    path = tmp_path / "set.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    with pytest.raises(InputError, match=message):
        open_dataset(path)


@pytest.mark.parametrize("cut", [b"), }", b"}"])
def test_npz_with_a_damaged_header(tmp_path, cut):
    """numpy takes such a header apart with Python's tokenizer, which has errors of its own."""
    stream = io.BytesIO()
    np.save(stream, random_pixels(2, 8, 8, 3))
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("arr_0.npy", stream.getvalue().replace(cut, b" " * len(cut)))
    with pytest.raises(InputError, match="unreadable .npz in --data: .*set.npz") as caught:
        open_dataset(tmp_path / "set.npz")
    assert "\n" not in str(caught.value)


def test_truncated_npz(tmp_path):
    np.savez(tmp_path / "set.npz", random_pixels(50, 8, 8))
    whole = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:1500] + bytes([whole[1500] ^ 255]) + whole[1501:])
    for name in ("cut.npz", "flipped.npz"):
        with pytest.raises(InputError, match=name):
            open_dataset(tmp_path / name)


def test_options(tmp_path):
    with pytest.raises(InputError, match=r"unknown value in --bad-images: skp\. .*Did you mean 'skip'\?"):
        open_dataset("digits", bad_images="skp")
    with pytest.raises(InputError, match="impossible picture size in --resolution: 0"):
        open_dataset("digits", resolution=0)
    write_folder(tmp_path / "set", [(8, 8)], classes=("", "a"))
    with pytest.raises(InputError, match="pictures both beside and inside sub-folders"):
        open_dataset(tmp_path / "set")


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


@given(nimg=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(-(2**63), 2**63 - 1))
@pytest.mark.slow
def test_batches_are_a_pure_function_of_seed_and_nimg(nimg, cuts, seed):
    dataset = open_dataset((np.arange(37, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2), np.arange(37) % 5))
    images, labels, positions = dataset.batch(nimg, sum(cuts), seed=seed)
    assert positions.tolist() == list(range(nimg, nimg + sum(cuts)))
    assert labels.tolist() == [int(image[0, 0, 0]) % 5 for image in images]
    start = 0
    for cut in cuts:
        part, part_labels, part_positions = dataset.batch(nimg + start, cut, seed=seed)
        assert part.equal(images[start : start + cut]) and part_labels.equal(labels[start : start + cut])
        assert part_positions.equal(positions[start : start + cut])
        start += cut


def test_each_epoch_is_a_new_order_of_every_picture(digits):
    orders = [_rows(digits, digits.batch(epoch * 1797, 1797, seed=seed)) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    for order in orders:
        assert sorted(order) == sorted(_rows(digits, None))
    agreement = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in ((orders[0], orders[1]), (orders[0], orders[2]))]
    assert max(agreement) < 60, "two orders agree in far more places than chance allows"


def _rows(dataset, batch):
    images = dataset.images if batch is None else batch[0].numpy()
    return [image.tobytes() for image in images]


def test_unlabelled_batch(digits):
    images, labels, positions = digits.subset(slice(0, 10)).batch(5, 7, seed=3)
    assert labels is not None and images.shape == (7, 1, 8, 8) and str(images.dtype) == "torch.uint8"
    images, labels, positions = open_dataset(random_pixels(3, 4, 4)).batch(0, 8, seed=0)
    assert labels is None and len(images) == 8 and str(positions.dtype) == "torch.int64"
