"""Tar shards in the WebDataset layout: by folder, pattern and file, in every form of tar, and what is refused, by name."""

import gzip
import os
import tarfile

import numpy as np
import pytest
from random_pictures import oversized_header, png, random_pixels, write_shards, write_tar

from fastcm.data import tar_shards
from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError

PIXELS = random_pixels(6, 8, 8, 3)


@pytest.fixture
def opened(tmp_path):
    return lambda source, **options: open_dataset(source, cache_dir=tmp_path / "cache", progress=False, **options)


def nchw(pixels):
    return np.asarray(pixels).transpose(0, 3, 1, 2)


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
        (oversized_header(), r"an oversized header in --data: .*x\.tar: 999,999,999 bytes"),
    ):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(InputError, match=message):
            opened(tmp_path / "x.tar")
    with pytest.raises(InputError, match=r"no such shard in --data: .*y-1\.tar \(from .*y-\{1\.\.3\}\.tar\)"):
        opened(tmp_path / "y-{1..3}.tar")
    with pytest.raises(InputError, match="too many shards"):
        opened(tmp_path / "y-{1..999999999}.tar")


def test_sparse_members_are_refused(tmp_path, opened):
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with pytest.raises(InputError, match="a sparse file in --data"):
        opened(write_tar(tmp_path / "x.tar", {"a": member}, form=tarfile.PAX_FORMAT))
