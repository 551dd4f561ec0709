"""Sources of pictures: zip, tar shards, CIFAR-10, what classes they show, and what is refused, by name."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from random_pictures import (
    CIFAR_CLASSES,
    cifar_batch,
    cifar_files,
    png,
    random_pixels,
    write_cifar,
    write_folder,
    write_shards,
    write_tar,
    write_zip,
)

from fastcm.errors import InputError
from fastcm.training import cifar, tar_shards
from fastcm.training.data import open_dataset

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
    monkeypatch.setattr("fastcm.training.picture_files.MAX_BYTES", 1_000_000)
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


# Tar shards


def test_shards_by_folder_pattern_and_file(tmp_path, opened):
    write_shards(tmp_path / "ein satz", PIXELS, [0, 2, 1, 0, 2, 1], per_shard=2)
    folder = opened(tmp_path / "ein satz")
    assert folder.labels.tolist() == [0, 2, 1, 0, 2, 1] and folder.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(folder.images, nchw(PIXELS))
    for pattern in ("train-{000000..000002}.tar", "train-00000[0-2].tar", "train-00000{0,1,2}.tar", "*.tar"):
        assert opened(tmp_path / "ein satz" / pattern).fingerprint == folder.fingerprint
    assert opened(tmp_path / "ein satz" / "train-000001.tar").labels.tolist() == [1, 0]
    write_shards(tmp_path / "plain", PIXELS, None, per_shard=6)
    assert opened(tmp_path / "plain").labels is None
    np.testing.assert_array_equal(opened(tmp_path / "plain").images, nchw(PIXELS))


def test_a_shard_that_changed_is_noticed(tmp_path, opened, capfd):
    write_shards(tmp_path / "set", PIXELS, None, per_shard=6)
    opened(tmp_path / "set")
    write_shards(tmp_path / "set", PIXELS[::-1], None, per_shard=6)
    np.testing.assert_array_equal(opened(tmp_path / "set").images, nchw(PIXELS[::-1]))
    assert "train-000000.tar changed since" in capfd.readouterr().err


def test_brace_patterns():
    assert list(tar_shards._braces("a-{08..11}.{x,y}")) == [f"a-{n}.{e}" for n in ("08", "09", "10", "11") for e in "xy"]
    assert list(tar_shards._braces("{3..1}")) == ["3", "2", "1"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_in_every_form_of_tar(tmp_path, opened, form):
    """Keys run to the first dot of the last part; folders and other members are passed over."""
    key = "ordner mit ü/" + "x" * 90 + "/" + "y" * 60
    folder = tarfile.TarInfo("ordner mit ü")
    folder.type = tarfile.DIRTYPE
    files = {"d": folder, f"{key}.png": png(PIXELS[0]), f"{key}.cls": b"7\n", f"{key}.seg.png.json": b"{}"}
    files |= {"a.b/1.png": png(PIXELS[1]), "a.b/1.cls": b"3"}
    dataset = opened(write_tar(tmp_path / "x.tar", files, form=form))
    assert dataset.labels.tolist() == [7, 3]
    np.testing.assert_array_equal(dataset.images, nchw(PIXELS[:2]))


def special(kind, **facts):
    member = tarfile.TarInfo("evil")
    member.type = kind
    for name, value in facts.items():
        setattr(member, name, value)
    return {"evil": member, "a.png": png(PIXELS[0])}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (special(tarfile.SYMTYPE, linkname="/etc/passwd"), r"a symbolic link in --data: .*x\.tar: evil\. Shards hold regular files only"),
        (special(tarfile.LNKTYPE, linkname="a.png"), "a hard link in --data"),
        (special(tarfile.CHRTYPE, devmajor=1), "a device in --data"),
        (special(tarfile.FIFOTYPE), "a named pipe in --data"),
        (special(b"Q"), "a member of type 'Q' in --data"),
        ({"a.txt": b"x"}, r"no picture in --data: .*x\.tar \(1 shards\)"),
        ({"a.png": png(PIXELS[0]), "a.jpg": b"x"}, r"two pictures or labels of one key in --data: .*x\.tar: a\."),
        ({"a.png": png(PIXELS[0]), "a.cls": b"x"}, r"label out of range in --data: .*x\.tar:a\.cls: 'x'"),
        ({"a.png": png(PIXELS[0]), "a.cls": b"-1"}, r"x\.tar:a\.cls: '-1'"),
        ({"a.png": png(PIXELS[0]), "a.cls": b"99999999999"}, "Expected a whole number from 0 to 99999"),
        ({"a.png": png(PIXELS[0]), "a.cls": b"1", "b.png": png(PIXELS[1])}, r"no \.cls beside a picture in --data: x\.tar:b\.png"),
        ({"a.png": png(PIXELS[0]), "b.png": png(PIXELS[1]), "b.cls": b"1"}, r"no \.cls beside a picture in --data: x\.tar:a\.png"),
        ({"../../a.png": b"not a picture"}, r"unreadable picture in --data: .*x\.tar:\.\./\.\./a\.png \(not a picture"),
    ],
)
def test_shards_that_are_refused(tmp_path, opened, files, message):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=message):
        opened(write_tar(tmp_path / "x.tar", files))
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "x.tar"]) or set(os.listdir(tmp_path)) == {*before, "x.tar", "cache"}


def test_damaged_shards(tmp_path, opened):
    whole = write_tar(tmp_path / "x.tar", {"a.png": png(PIXELS[0]), "b.png": png(PIXELS[1])}).read_bytes()
    for content, message in (
        (whole[:700], r"truncated file in --data: .*x\.tar \(it ends inside a\.png\)"),
        (whole[:1300], "truncated file"),
        (b"", "truncated file"),
        (b"x" * 2048, r"not an uncompressed tar in --data: .*x\.tar \(damaged header at byte 0\)"),
        (gzip.compress(whole) + bytes(512), "not an uncompressed tar"),
        (whole[:1034] + b"9" + whole[1035:], "damaged header at byte 1,024"),
        (oversized(), r"an oversized header in --data: .*x\.tar: 999,999,999 bytes"),
    ):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(InputError, match=message):
            opened(tmp_path / "x.tar")
    with pytest.raises(InputError, match=r"no such shard in --data: .*y-1\.tar \(from .*y-\{1\.\.3\}\.tar\)"):
        opened(tmp_path / "y-{1..3}.tar")
    with pytest.raises(InputError, match="too many shards"):
        opened(tmp_path / "y-{1..999999999}.tar")


def oversized():
    """A pax header that claims a gigabyte."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 999_999_999
    return member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


def test_sparse_members_are_refused(tmp_path, opened):
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with pytest.raises(InputError, match="a sparse file in --data"):
        opened(write_tar(tmp_path / "x.tar", {"a": member}, form=tarfile.PAX_FORMAT))


# CIFAR-10


def test_cifar_folder_and_archive(tmp_path, opened):
    pictures, labels = write_cifar(tmp_path / "up" / cifar.FOLDER, per_batch=4)
    dataset = opened(tmp_path / "up")
    assert dataset.name == "cifar10" and dataset.class_names == CIFAR_CLASSES and dataset.labels.tolist() == labels
    np.testing.assert_array_equal(dataset.images, nchw(pictures))
    files = {f"{cifar.FOLDER}/{name}": content for name, content in cifar_files(4)[0].items()}
    archive = opened(write_tar(tmp_path / "cifar-10-python.tar.gz", files, mode="w:gz"))
    assert archive.fingerprint == dataset.fingerprint == opened(tmp_path / "up" / cifar.FOLDER).fingerprint
    assert opened(tmp_path / "up", resolution=16).images.shape == (20, 3, 16, 16)


def test_cifar_written_again_by_python_3(tmp_path, opened):
    pictures, labels = write_cifar(tmp_path / "set", per_batch=2)
    for number in range(5):
        batch = {"data": nchw(pictures[2 * number : 2 * number + 2]).reshape(2, 3072), "labels": labels[2 * number : 2 * number + 2]}
        (tmp_path / "set" / f"data_batch_{number + 1}").write_bytes(pickle.dumps(batch, protocol=2 + number % 3))
    np.testing.assert_array_equal(opened(tmp_path / "set").images, nchw(pictures))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "it asks for posix.system, which is not in the list"),
        (pickle.dumps({"data": Evil()}, protocol=2), "it asks for posix.system"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), "an array of other than uint8"),
        (pickle.dumps({"data": np.zeros((2, 3000), np.uint8), "labels": [0, 1]}), "no pictures of 3x32x32"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, -1]}), "negative label in --data: .*data_batch_2: -1 in row 1"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "not one class index per picture"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": "01"}), "no list of labels"),
        (pickle.dumps([1, 2]), "no pictures of 3x32x32"),
        (cifar_batch(random_pixels(2, 32, 32, 3), [0, 1])[:3000], "damaged or cut short"),
        (b"", "damaged or cut short"),
        (None, r"no CIFAR-10 in --data: .*set \(it lacks data_batch_2\)"),
    ],
)
def test_cifar_batches_that_are_refused(tmp_path, opened, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "set", per_batch=2)
    (tmp_path / "set" / "data_batch_2").unlink() if content is None else (tmp_path / "set" / "data_batch_2").write_bytes(content)
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "set")
    assert not (tmp_path / "evil-was-here").exists()


def test_cifar_archives_that_are_refused(tmp_path, opened, monkeypatch):
    path = tmp_path / "cifar-10-python.tar.gz"
    whole = write_tar(path, cifar_files(4)[0], mode="w:gz").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"unreadable archive in --data: .*Compressed file ended"):
        opened(path)
    path.write_bytes(gzip.compress(bytes(10_000)))
    with pytest.raises(InputError, match=r"no CIFAR-10 in --data: .*\(it lacks data_batch_1"):
        opened(path)
    path.write_bytes(gzip.compress(oversized() + bytes(1000)))
    monkeypatch.setattr(cifar, "MAX_BYTES", 10_000_000)
    with pytest.raises(InputError, match=r"unreadable archive in --data: .*a member or header of [\d,]+ bytes"):
        opened(path)


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
