"""CIFAR-10's python batches: as a folder and as the published archive, and files that are refused without running anything."""

import gzip
import os
import pickle

import numpy as np
import pytest
from random_pictures import CIFAR_CLASSES, cifar_batch, cifar_files, oversized_header, random_pixels, write_cifar, write_tar

from fastcm.data import cifar
from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError


@pytest.fixture
def opened(tmp_path):
    return lambda source, **options: open_dataset(source, cache_dir=tmp_path / "cache", progress=False, **options)


def nchw(pixels):
    return np.asarray(pixels).transpose(0, 3, 1, 2)


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
    path.write_bytes(gzip.compress(oversized_header() + bytes(1000)))
    monkeypatch.setattr(cifar, "MAX_BYTES", 10_000_000)
    with pytest.raises(InputError, match=r"unreadable archive in --data: .*a member or header of [\d,]+ bytes"):
        opened(path)
