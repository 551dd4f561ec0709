"""Decoded pictures on disk: read back, built again when files change or the entry is damaged, complete or absent."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from random_pictures import random_pixels, write_folder

from fastcm.errors import InputError, RunError
from fastcm.training import data, image_cache
from fastcm.training.data import open_dataset


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


def test_cache_is_read_back_and_follows_its_files(tmp_path, monkeypatch):
    write_folder(tmp_path / "set", [(8, 8)] * 3)
    cache = tmp_path / "cache"
    first = open_dataset(tmp_path / "set", cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode", lambda *args, **options: pytest.fail("decoded again"))
        again = open_dataset(tmp_path / "set", cache_dir=cache)
    assert isinstance(again.images, np.memmap) and again.fingerprint == first.fingerprint and len(entries(cache)) == 1
    Image.fromarray(random_pixels(8, 8, 3, seed=99)).save(tmp_path / "set" / "1.png")
    os.utime(tmp_path / "set" / "1.png", ns=(1, 1))  # the size may be equal, the modification time is not
    changed = open_dataset(tmp_path / "set", cache_dir=cache)
    np.testing.assert_array_equal(changed.images[1].transpose(1, 2, 0), random_pixels(8, 8, 3, seed=99))
    assert changed.fingerprint != first.fingerprint and len(entries(cache)) == 2


@pytest.mark.parametrize("damage", ["manifest", "images", "version"])
def test_damaged_entry_is_built_again(tmp_path, damage):
    pictures = write_folder(tmp_path / "set", [(8, 8)] * 3)
    cache = tmp_path / "cache"
    open_dataset(tmp_path / "set", cache_dir=cache)
    [entry] = cache.iterdir()
    if damage == "manifest":
        (entry / "manifest.json").write_text("{")
    elif damage == "images":
        (entry / "images.bin").write_bytes(b"short")
    else:
        manifest = json.loads((entry / "manifest.json").read_text())
        (entry / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    dataset = open_dataset(tmp_path / "set", cache_dir=cache)
    np.testing.assert_array_equal(dataset.images, np.stack(pictures).transpose(0, 3, 1, 2))
    assert entries(cache) == [entry.name]


def test_a_faster_process_wins(tmp_path):
    entry = tmp_path / "cache" / "entry"
    pixels = random_pixels(2, 1, 4, 4)

    def blocks(bad):
        if not entry.exists():  # the other process finishes while this one is decoding
            image_cache.build_entry(entry, blocks_of_the_other, shape=pixels.shape, labels=None, class_names=None)
        yield np.arange(2), pixels

    def blocks_of_the_other(bad):
        yield np.arange(2), pixels

    opened = image_cache.build_entry(entry, blocks, shape=pixels.shape, labels=None, class_names=None)
    np.testing.assert_array_equal(opened.images, pixels)
    assert entries(tmp_path / "cache") == ["entry"]


def test_no_room_for_the_cache(tmp_path, monkeypatch):
    write_folder(tmp_path / "set", [(8, 8)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10))
    with pytest.raises(RunError, match="no room for the image cache: .* Set FASTCM_CACHE"):
        open_dataset(tmp_path / "set", cache_dir=tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the image cache"):
        open_dataset(tmp_path / "set", cache_dir=tmp_path / "file")


KILLED_WHILE_DECODING = """
import os, sys
from fastcm.training import data
real, count = data.decode, 0
def decode(*args, **options):
    global count
    count += 1
    if count == 300:
        os._exit(9)
    return real(*args, **options)
data.decode = decode
data.open_dataset(sys.argv[1], cache_dir=sys.argv[2], progress=False)
"""


@pytest.mark.slow
def test_killed_while_decoding_leaves_no_entry(tmp_path):
    pictures = write_folder(tmp_path / "set", [(4, 4)] * 320)
    cache = tmp_path / "cache"
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_DECODING, str(tmp_path / "set"), str(cache)], timeout=60, check=False)
    assert process.returncode == 9
    [left] = entries(cache)  # half-made, under a name that no reader opens
    assert left.startswith(".tmp-") and (cache / left / "images.bin").stat().st_size < 320 * 48
    names = sorted(f"{index}.png" for index in range(320))
    dataset = open_dataset(tmp_path / "set", cache_dir=cache, progress=False)
    np.testing.assert_array_equal(dataset.images[17].transpose(1, 2, 0), pictures[int(names[17].split(".")[0])])
