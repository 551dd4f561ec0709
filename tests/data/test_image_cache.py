"""Decoded pictures on disk: read back, decoded again when files change or the entry is damaged, gone on with after a kill."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from random_pictures import random_pixels, write_folder

from fastcm.data import cache_building, decode_pool, image_cache, sources
from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError, RunError


def entries(cache):
    return sorted(path.name for path in cache.iterdir() if path.name != "opened")


@pytest.fixture
def no_decoding(monkeypatch):
    """Any further decoding or listing fails the test."""

    def forbid():
        monkeypatch.setattr(cache_building, "build", lambda *args, **options: pytest.fail("decoded again"))
        monkeypatch.setattr("fastcm.data.sources.Source.listing", lambda self, cache: pytest.fail("listed again"))

    return forbid


def test_cache_is_read_back_and_follows_its_files(tmp_path, no_decoding, capfd):
    write_folder(tmp_path / "set", [(8, 8)] * 3)
    cache = tmp_path / "cache"
    first = open_dataset(tmp_path / "set", cache_dir=cache, progress=False)
    Image.fromarray(random_pixels(8, 8, 3, seed=99)).save(tmp_path / "set" / "1.png")
    os.utime(tmp_path / "set" / "1.png", ns=(1, 1))  # the size may be equal, the modification time is not
    assert capfd.readouterr().err == ""
    changed = open_dataset(tmp_path / "set", cache_dir=cache, progress=False)
    assert re.search(r"set/1\.png changed since .*/set was decoded", capfd.readouterr().err)
    np.testing.assert_array_equal(changed.images[1].transpose(1, 2, 0), random_pixels(8, 8, 3, seed=99))
    assert changed.fingerprint != first.fingerprint and len(entries(cache)) == 2
    no_decoding()
    again = open_dataset(tmp_path / "set", cache_dir=cache)
    assert isinstance(again.images, np.memmap) and again.fingerprint == changed.fingerprint


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_changed_folder_is_noticed(tmp_path, change, capfd):
    write_folder(tmp_path / "set", [(8, 8)] * 3, classes=("a", "b"))
    options = {"cache_dir": tmp_path / "cache", "progress": False}
    open_dataset(tmp_path / "set", **options)
    one = tmp_path / "set" / "b" / "1.png"
    if change == "added":
        shutil.copy(one, one.with_name("9.png"))
    elif change == "removed":
        one.unlink()
    else:
        one.rename(one.with_name("9.png"))
    found = open_dataset(tmp_path / "set", **options)
    assert len(found) == {"added": 7, "removed": 5, "renamed": 6}[change] and "changed since" in capfd.readouterr().err


def test_same_content_elsewhere_shares_the_entry(tmp_path, monkeypatch):
    write_folder(tmp_path / "set", [(8, 8)] * 3)
    shutil.copytree(tmp_path / "set", tmp_path / "again" / "set")  # with its times
    cache = tmp_path / "cache"
    open_dataset(tmp_path / "set", cache_dir=cache)
    monkeypatch.setattr(cache_building, "build", lambda *args, **options: pytest.fail("decoded again"))
    assert len(open_dataset(tmp_path / "again" / "set", cache_dir=cache)) == 3


def test_equal_names_sizes_and_times_are_not_equal_content(tmp_path):
    for name, value in (("one", 10), ("two", 200)):
        (tmp_path / name / "set").mkdir(parents=True)
        Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / name / "set" / "x.bmp")
        os.utime(tmp_path / name / "set" / "x.bmp", ns=(1, 1))
    reds = [int(open_dataset(tmp_path / name / "set", cache_dir=tmp_path / "cache").images[0, 0, 0, 0]) for name in ("one", "two")]
    assert reds == [10, 200]


@pytest.mark.parametrize("damage", ["manifest", "images", "version"])
def test_damaged_entry_is_built_again(tmp_path, damage):
    pictures = write_folder(tmp_path / "set", [(8, 8)] * 3)
    cache = tmp_path / "cache"
    open_dataset(tmp_path / "set", cache_dir=cache)
    [name] = entries(cache)
    entry = cache / name
    if damage == "manifest":
        (entry / "manifest.json").write_text("{")
    elif damage == "images":
        (entry / "images.bin").write_bytes(b"short")
    else:
        manifest = json.loads((entry / "manifest.json").read_text())
        (entry / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    dataset = open_dataset(tmp_path / "set", cache_dir=cache)
    np.testing.assert_array_equal(dataset.images, np.stack(pictures).transpose(0, 3, 1, 2))
    assert entries(cache) == [name]


def test_a_faster_process_wins(tmp_path):
    entry = tmp_path / "cache" / "entry"
    pixels = random_pixels(2, 1, 4, 4)
    options = {"shape": pixels.shape, "labels": None, "class_names": None}

    def blocks():
        image_cache.build_entry(entry, [pixels], **options)  # the other process finishes while this one is reading
        yield pixels

    opened = image_cache.build_entry(entry, blocks(), **options)
    np.testing.assert_array_equal(opened.images, pixels)
    assert entries(tmp_path / "cache") == ["entry"]


def test_processes_that_want_one_entry_decode_it_once(tmp_path, monkeypatch, capfd):
    write_folder(tmp_path / "set", [(8, 8)] * 3)
    real, calls = cache_building._build, []

    def slow(*args):
        calls.append(1)
        time.sleep(0.3)
        real(*args)

    monkeypatch.setattr(cache_building, "_build", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(open_dataset(tmp_path / "set", cache_dir=tmp_path / "c"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(calls) == 1 and "waiting for another process" in capfd.readouterr().err
    assert len(entries(tmp_path / "c")) == 1, "a lock or a partial entry was left"


def test_no_room_for_the_cache(tmp_path, monkeypatch):
    np.savez(tmp_path / "set.npz", random_pixels(4, 8, 8))
    monkeypatch.setattr("fastcm.data.dataset.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10))
    with pytest.raises(RunError, match="no room for the image cache: .* Set FASTCM_CACHE"):
        open_dataset(tmp_path / "set.npz", cache_dir=tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the image cache"):
        open_dataset(tmp_path / "set.npz", cache_dir=tmp_path / "file")


def test_full_disk_names_the_cache(tmp_path, monkeypatch):
    write_folder(tmp_path / "set", [(8, 8)] * 3)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"cannot write the image cache: .*No space left on device.*Make room"):
        open_dataset(tmp_path / "set", cache_dir=tmp_path / "cache", progress=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_pool_decodes_as_one_process_does(tmp_path, monkeypatch, workers):
    pictures = write_folder(tmp_path / "größe ünd raum", [(8, 8)] * 10, classes=("a b", "c"))
    monkeypatch.setattr(cache_building, "cores", lambda: workers)
    monkeypatch.setattr(cache_building, "IN_PROCESS_BYTES", 0)
    monkeypatch.setattr(cache_building, "BLOCK", 3)
    real, started = decode_pool.DecodePool._start, []
    monkeypatch.setattr(decode_pool.DecodePool, "_start", lambda self: started.append(real(self)) or started[-1])
    dataset = open_dataset(tmp_path / "größe ünd raum", cache_dir=tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(dataset.images, np.stack(pictures).transpose(0, 3, 1, 2))
    assert len(started) == workers and all(process.returncode == 0 for process in started)


def test_dead_worker_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "set", [(8, 8)] * 4)
    monkeypatch.setattr(cache_building, "cores", lambda: 1)
    monkeypatch.setattr(cache_building, "IN_PROCESS_BYTES", 0)
    real = decode_pool.DecodePool._start

    def start(self):
        process = real(self)
        process.kill()
        process.wait()
        return process

    monkeypatch.setattr(decode_pool.DecodePool, "_start", start)
    with pytest.raises(RunError, match=r"a decoding process died with code -9 at .*set/0\.png or one of the 3 pictures after it"):
        open_dataset(tmp_path / "set", cache_dir=tmp_path / "cache", progress=False)


KILLED_WHILE_DECODING = """
import os, signal, sys
from fastcm.data import cache_building, dataset
cache_building.BLOCK, cache_building.SYNC_EVERY_S = 16, 0.0
real, count = cache_building.Journal.add, 0
def add(*args):
    global count
    real(*args)
    count += 1
    if count == 12:
        os.kill(os.getpid(), signal.SIGKILL)
cache_building.Journal.add = add
dataset.open_dataset(sys.argv[1], cache_dir=sys.argv[2], progress=False)
"""


@pytest.mark.slow
def test_killed_while_decoding_goes_on(tmp_path, monkeypatch):
    pictures = write_folder(tmp_path / "set", [(4, 4)] * 320)
    cache = tmp_path / "cache"
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_DECODING, str(tmp_path / "set"), str(cache)], timeout=60, check=False)
    assert process.returncode == -9
    [partial] = [name for name in entries(cache) if not name.startswith(".lock")]  # half-made, under a name that no reader opens
    assert partial.startswith(".partial-") and len((cache / partial / "journal.jsonl").read_text().splitlines()) == 13
    monkeypatch.setattr(cache_building, "BLOCK", 16)
    real, decoded = decode_pool.DecodePool.decode, []
    monkeypatch.setattr(decode_pool.DecodePool, "decode", lambda self, jobs: real(self, (decoded.append(job[0]) or job for job in jobs)))
    dataset = open_dataset(tmp_path / "set", cache_dir=cache, progress=False)
    assert decoded == list(range(12 * 16, 320, 16)), "finished blocks were decoded again, or others left out"
    names = sorted(f"{index}.png" for index in range(320))
    expected = np.stack([pictures[int(name.split(".")[0])] for name in names]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(dataset.images, expected)
    assert dataset.fingerprint == open_dataset(expected.transpose(0, 2, 3, 1)).fingerprint
    assert entries(cache) == [partial.removeprefix(".partial-")]


def test_failed_build_goes_on_with_what_it_had(tmp_path, monkeypatch):
    """A bad picture under "fail", then "skip": the finished blocks stay, the rows close up."""
    pictures = write_folder(tmp_path / "set", [(8, 8)] * 210)
    names = sorted(f"{index}.png" for index in range(210))
    (tmp_path / "set" / names[60]).write_bytes(b"")
    monkeypatch.setattr(cache_building, "BLOCK", 25)
    options = {"cache_dir": tmp_path / "cache", "progress": False}
    with pytest.raises(InputError, match=rf"unreadable picture in --data: .*{re.escape(names[60])} \(the file is empty"):
        open_dataset(tmp_path / "set", **options)
    [partial] = (tmp_path / "cache").glob(".partial-*")
    assert [json.loads(line)[0] for line in (partial / "journal.jsonl").read_text().splitlines()[1:]] == [0, 25]
    dataset = open_dataset(tmp_path / "set", bad_images="skip", **options)
    kept = [int(name.split(".")[0]) for name in names if name != names[60]]
    np.testing.assert_array_equal(dataset.images, np.stack([pictures[index] for index in kept]).transpose(0, 3, 1, 2))
    assert dataset.skipped == 1 and len(entries(tmp_path / "cache")) == 1


def test_picture_that_changes_while_it_is_decoded(tmp_path, monkeypatch):
    write_folder(tmp_path / "set", [(8, 8)] * 3)
    real = sources.Source.listing

    def listing(self, cache):
        found = real(self, cache)
        os.utime(tmp_path / "set" / "2.png", ns=(5, 5))
        return found

    monkeypatch.setattr("fastcm.data.sources.Source.listing", listing)
    with pytest.raises(InputError, match=r"changed while it was read, in --data: .*2\.png"):
        open_dataset(tmp_path / "set", cache_dir=tmp_path / "cache", progress=False)


def test_opening_a_million_pictures_takes_less_than_a_second(tmp_path, no_decoding):
    """A sparse entry of a million 64x64 pictures (12 GB) whose folder has a thousand classes and 20,000 watched files."""
    root, cache = tmp_path / "set", tmp_path / "cache"
    entry, count = cache / "million", 1_000_000
    entry.mkdir(parents=True)
    with open(entry / "images.bin", "wb") as file:
        file.truncate(count * 3 * 64 * 64)
    np.save(entry / "labels.npy", np.arange(count) % 1000)
    manifest = {
        "version": image_cache.VERSION,
        "shape": [count, 3, 64, 64],
        "labelled": True,
        "classes": [str(i) for i in range(1000)],
        "bad": 0,
        "fingerprint": "f" * 64,
    }
    (entry / "manifest.json").write_text(json.dumps(manifest))
    root.mkdir()
    for index in range(2000):
        (root / f"{index}.png").write_bytes(b"")
    watched = [str(root / f"{index % 2000}.png") for index in range(image_cache.WATCHED_FILES)]
    image_cache.remember(cache, sources.find(str(root)).key(64, None), "million", image_cache.stamps([str(root), *watched]))
    no_decoding()
    seconds = []
    for _ in range(3):  # other tests' threads count too: the quietest time is the opening's own
        began = time.process_time()  # everything is in memory: a busy machine changes the wall clock alone
        dataset = open_dataset(root, resolution=64, cache_dir=cache)
        images, labels, _ = dataset.batch(5_000_000, 64, seed=3)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 1.0
    assert len(dataset) == count and images.shape == (64, 3, 64, 64) and len(set(labels.tolist())) > 50


MEMORY = """
import json, sys
from pathlib import Path
import numpy as np
from fastcm.data import image_cache
from fastcm.data.dataset import Dataset
entry, count = Path(sys.argv[1]), int(sys.argv[2])
entry.mkdir()
with open(entry / "images.bin", "wb") as file:
    file.truncate(count * 3072)
manifest = {"version": image_cache.VERSION, "shape": [count, 3, 32, 32], "labelled": False, "classes": None, "bad": 0, "fingerprint": "f"}
(entry / "manifest.json").write_text(json.dumps(manifest))
opened = image_cache.open_entry(entry)
dataset = Dataset(opened.images, None, None, "sparse", "f")
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
dataset.batch(0, 128, seed=0)
before = resident()
for step in range(1, 300):
    dataset.batch(step * 128, 128, seed=0)
print(json.dumps([len(dataset), before, resident()]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """Resident megabytes of a process that draws 38,400 pictures at random out of 10 GB; the file is sparse."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "entry"), str(3_300_000)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    count, before, after = json.loads(result.stdout)
    assert count * 3072 > 10e9 and after - before < 40, (before, after)
