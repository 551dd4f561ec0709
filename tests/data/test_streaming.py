"""Sets whose cache would not fit on the disk: decoded in each batch, the same batches as from the cache."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from random_pictures import random_pixels, write_folder, write_shards, write_zip

from fastcm.data import streaming
from fastcm.data.dataset import open_dataset
from fastcm.data.prefetch import Prefetcher
from fastcm.errors import InputError


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """open_dataset on a full disk, decoding in this process."""
    monkeypatch.setattr(streaming, "cores", lambda: 0)

    def opened(source, **options):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10))
            return open_dataset(source, cache_dir=tmp_path / "stream-cache", progress=False, **options)

    return opened


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_batches_are_those_of_the_cache(tmp_path, stream, kind, capfd):
    root = tmp_path / "größe ü"
    if kind == "tar":
        write_shards(root, random_pixels(15, 12, 10, 3), np.arange(15) % 3, per_shard=4)
    else:
        write_folder(root, [(12, 10)] * 5, classes=("a", "b", "c"))
    if kind == "zip":
        write_zip(tmp_path / "set.zip", {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.png")})
        root = tmp_path / "set.zip"
    streamed, cached = stream(root, resolution=8), open_dataset(root, resolution=8, cache_dir=tmp_path / "cache", progress=False)
    assert "no room for 0.0 GB" in capfd.readouterr().err
    assert isinstance(streamed.images, streaming.StreamedImages) and streamed.images.shape == cached.images.shape
    assert streamed.class_names == cached.class_names and (streamed.channels, streamed.resolution) == (3, 8)
    for nimg in (0, 11, 40):
        for ours, theirs in zip(streamed.batch(nimg, 7, seed=5), cached.batch(nimg, 7, seed=5), strict=True):
            assert ours.equal(theirs)
    np.testing.assert_array_equal(streamed.images[2:5], cached.images[2:5])
    np.testing.assert_array_equal(streamed.images[3], cached.images[3])
    np.testing.assert_array_equal(np.asarray(streamed.subset([7, 1]).images), cached.images[[7, 1]])
    np.testing.assert_array_equal(streamed.subset(slice(3, 9)).subset([1]).images[0], cached.images[4])
    with Prefetcher(streamed, seed=5, size=7, stride=7) as source:
        assert source.batch(0)[0].equal(cached.batch(0, 7, seed=5)[0])
    again = stream(root, resolution=8)
    assert again.fingerprint == streamed.fingerprint != cached.fingerprint
    assert "no room" not in capfd.readouterr().err, "listed again"


def test_processes_decode_it(tmp_path, stream, monkeypatch):
    pictures = write_folder(tmp_path / "set", [(8, 8)] * 9)
    monkeypatch.setattr(streaming, "cores", lambda: 2)
    dataset = stream(tmp_path / "set")
    np.testing.assert_array_equal(dataset.images[[8, 0, 3]], np.stack([pictures[i] for i in (8, 0, 3)]).transpose(0, 3, 1, 2))
    processes = dataset.images._pool._processes
    assert len(processes) == 2
    processes = list(processes)
    del dataset
    assert all(process.wait(timeout=10) == 0 for process in processes), "processes outlive the data set"


def test_grey_pictures_stay_grey(tmp_path, stream):
    (tmp_path / "set").mkdir()
    for index in range(3):
        Image.fromarray(random_pixels(8, 8, seed=index)).save(tmp_path / "set" / f"{index}.png")
    dataset = stream(tmp_path / "set")
    assert dataset.channels == 1
    np.testing.assert_array_equal(dataset.images[1][0], random_pixels(8, 8, seed=1))


def test_unreadable_pictures(tmp_path, stream, monkeypatch):
    pictures = write_folder(tmp_path / "set", [(8, 8)] * 150)
    names = sorted(f"{index}.png" for index in range(150))
    (tmp_path / "set" / names[7]).write_bytes(b"")
    with pytest.raises(InputError, match=rf"unreadable picture in --data: .*{names[7]} \(the file is empty .*--bad-images skip"):
        stream(tmp_path / "set").images[:20]
    dataset = stream(tmp_path / "set", bad_images="skip")
    following = pictures[int(names[8].split(".")[0])].transpose(2, 0, 1)
    np.testing.assert_array_equal(dataset.images[7], following)
    np.testing.assert_array_equal(dataset.images[5:10][2], following)
    assert list(dataset.images.bad) == [7]
    (tmp_path / "set" / names[8]).unlink()
    with pytest.raises(InputError, match=r"more than 1% unreadable pictures in --data: .*\(2 or more of 150"):
        dataset.images[7:12]


def test_a_picture_that_changed_is_noticed(tmp_path, stream):
    write_folder(tmp_path / "set", [(8, 8)] * 3)
    dataset = stream(tmp_path / "set")
    os.utime(tmp_path / "set" / "1.png", ns=(5, 5))
    with pytest.raises(InputError, match=r"changed while it was read, in --data: .*1\.png"):
        dataset.images[:]


def test_another_size_is_named(tmp_path, stream):
    write_folder(tmp_path / "set", [(8, 8), (8, 8), (9, 8)])
    with pytest.raises(InputError, match=r"not all of one square size in --data: .*set \(8x8, 8x9\)"):
        stream(tmp_path / "set").images[:]
