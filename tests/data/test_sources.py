"""Folders and zips of pictures: what classes they show, and what is refused, by name."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image
from random_pictures import png, random_pixels, write_folder, write_shards, write_zip

from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError

PIXELS = random_pixels(6, 8, 8, 3)


@pytest.fixture
def opened(tmp_path):
    return lambda source, **options: open_dataset(source, cache_dir=tmp_path / "cache", progress=False, **options)


def nchw(pixels):
    return np.asarray(pixels).transpose(0, 3, 1, 2)


# Classes by names


def test_classes_by_the_beginning_of_the_name(tmp_path, opened):
    names = ["n02_1.png", "n02_2.png", "n01_x_1.png", "n01_x_2.png"]
    root = tmp_path / "flat"
    root.mkdir()
    for name, pixels in zip(names, PIXELS, strict=False):
        Image.fromarray(pixels).save(root / name)
    dataset = opened(root)
    assert dataset.class_names == ("n01", "n02") and dataset.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(dataset.images, nchw(PIXELS[[2, 3, 0, 1]]))
    Image.fromarray(PIXELS[0]).save(root / "n03_1.png")
    assert opened(root).labels is None, "a class of one picture is a number in a name"
    (root / "n03_1.png").rename(root / "n02.png")
    assert opened(root).labels is None, "every name needs a beginning"
    for name in names:
        (root / name).rename(root / f"img_{name}")
    (root / "n02.png").unlink()
    assert opened(root).labels is None, "one beginning is no class"


def test_one_folder_around_all_is_passed_over(tmp_path, opened):
    write_folder(tmp_path / "outer" / "inner", [(8, 8)] * 2, classes=("a", "b"))
    assert opened(tmp_path / "outer").class_names == ("a", "b")


# Zip


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_is_its_folder(tmp_path, opened, compression):
    write_folder(tmp_path / "süß" / "set", [(8, 8)] * 3, classes=("b ü", "a"))
    files = {p.relative_to(tmp_path / "süß").as_posix(): p.read_bytes() for p in (tmp_path / "süß").rglob("*.png")}
    write_zip(tmp_path / "ein set.zip", {"__MACOSX/x.png": b"", ".hidden/x.png": b"", **files}, compression=compression)
    folder, archive = opened(tmp_path / "süß"), opened(tmp_path / "ein set.zip")
    assert archive.fingerprint == folder.fingerprint and archive.name == "ein set" and archive.class_names == ("a", "b ü")


def test_edm_zip(tmp_path, opened):
    """Folders 00000 and 00001 are no classes there: dataset.json has them, or says that there are none."""
    files = {f"{i // 3:05d}/img{i:08d}.png": png(pixels) for i, pixels in enumerate(PIXELS)}
    labels = [[name, (i * 2) % 5] for i, name in enumerate(files)]
    labelled = opened(write_zip(tmp_path / "a.zip", {**files, "dataset.json": json.dumps({"labels": labels[::-1]}).encode()}))
    assert labelled.labels.tolist() == [0, 2, 4, 1, 3, 0] and labelled.class_names == ("0", "1", "2", "3", "4")
    np.testing.assert_array_equal(labelled.images, nchw(PIXELS))
    assert opened(write_zip(tmp_path / "b.zip", {**files, "dataset.json": b'{"labels": null}'})).labels is None


def test_damaged_zip_members(tmp_path, opened):
    path = write_zip(tmp_path / "x.zip", {f"{i}.bmp": bmp(pixels) for i, pixels in enumerate(PIXELS)}, compression=zipfile.ZIP_STORED)
    whole = path.read_bytes()
    place = whole.index(bmp(PIXELS[3])) + 100
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    with pytest.raises(InputError, match=r"unreadable picture in --data: .*x\.zip:3\.bmp \(damaged archive: its checksum differs\)"):
        opened(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"unreadable zip in --data: .*x\.zip"):
        opened(path)


def bmp(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "bmp")
    return file.getvalue()


def test_zip_bomb_is_not_inflated(tmp_path, opened, monkeypatch):
    path = write_zip(tmp_path / "x.zip", {"a.png": bytes(10_000_000), "b.png": png(PIXELS[0])})
    monkeypatch.setattr("fastcm.data.spans.MAX_BYTES", 1_000_000)
    with pytest.raises(InputError, match=r"x\.zip:a\.png \(a file of 10,000,000 bytes \(1,000,000 at most\)\)"):
        opened(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"x"}, r"no picture in --data: .*x\.zip \(1 files seen\)"),
        ({"a.png": b"1", "./a.png": b"2"}, r"two members of one name in --data: .*x\.zip: a\.png"),
    ],
)
def test_zips_that_are_none(tmp_path, opened, files, message):
    with pytest.raises(InputError, match=message):
        opened(write_zip(tmp_path / "x.zip", files))


def test_zip_by_an_unknown_method(tmp_path, opened):
    with pytest.raises(InputError, match=r"compressed by method 14 in --data: .*a\.png\. Write it stored or deflated"):
        opened(write_zip(tmp_path / "x.zip", {"a.png": png(PIXELS[0])}, compression=zipfile.ZIP_LZMA))


def test_labels_beside_a_source_that_has_them(tmp_path, opened):
    write_shards(tmp_path / "set", PIXELS, None, per_shard=6)
    with pytest.raises(InputError, match="a file of labels for a source that carries its own"):
        opened(tmp_path / "set", labels_file=tmp_path / "labels.csv")


def test_files_that_are_no_pictures(tmp_path, opened):
    write_folder(tmp_path / "set", [(8, 8)] * 2)
    os.mkfifo(tmp_path / "set" / "pipe.png")
    with pytest.raises(InputError, match=r"set/pipe\.png \(not a regular file\)"):
        opened(tmp_path / "set")
    (tmp_path / "set" / "pipe.png").unlink()
    os.symlink("nowhere", tmp_path / "set" / "link.png")
    with pytest.raises(InputError, match=r"set/link\.png \(No such file or directory\)"):
        opened(tmp_path / "set")
