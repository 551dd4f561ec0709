"""IDX, `.npy` and `.mat`: files with known bytes, what finds their labels, and what is refused."""

import gzip
import itertools
import struct

import numpy as np
import pytest
from random_pictures import random_pixels, write_idx

from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError

PIXELS, LABELS = random_pixels(5, 4, 4), [3, 0, 3, 1, 2]


@pytest.fixture
def opened(tmp_path):
    return lambda source, **options: open_dataset(source, cache_dir=tmp_path / "cache", progress=False, **options)


def mnist(folder, *, suffix="", prefix="", split="train"):
    """A file of pictures and one of labels by MNIST's names; the path of the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_idx(folder / f"{prefix}{split}-labels-idx1-ubyte{suffix}", np.array(LABELS, np.uint8))
    return write_idx(folder / f"{prefix}{split}-images-idx3-ubyte{suffix}", PIXELS)


def test_idx_by_its_bytes(tmp_path, opened):
    """The published format, byte by byte: 0x00000803, three sizes, pixels row by row; 0x00000801, one size, labels."""
    (tmp_path / "a-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 7, 200]))
    (tmp_path / "a-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 0])))
    dataset = opened(tmp_path / "a-images-idx3-ubyte")
    assert dataset.images.tolist() == [[[[7]]], [[[200]]]] and dataset.labels.tolist() == [1, 0] and dataset.class_names == ("0", "1")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_as_a_folder(tmp_path, opened, suffix):
    """The training set of the four usual files; as torchvision keeps them, too."""
    images = mnist(tmp_path / "MNIST" / "raw", suffix=suffix)
    mnist(tmp_path / "MNIST" / "raw", suffix=suffix, split="t10k")
    dataset = opened(tmp_path / "MNIST")
    np.testing.assert_array_equal(dataset.images[:, 0], PIXELS)
    assert dataset.labels.tolist() == LABELS and dataset.name == "MNIST"
    assert opened(images.parent).fingerprint == opened(images).fingerprint == dataset.fingerprint


def test_labels_apart(tmp_path, opened):
    images = mnist(tmp_path / "set")
    (tmp_path / "set" / "train-labels-idx1-ubyte").rename(tmp_path / "y.idx")
    assert opened(images).labels is None
    np.save(tmp_path / "y.npy", LABELS)
    np.savez(tmp_path / "y.npz", LABELS)
    np.save(tmp_path / "x.npy", PIXELS)
    expected = opened((PIXELS, np.array(LABELS))).fingerprint
    for source, kind in itertools.product((images, tmp_path / "x.npy"), ("idx", "npy", "npz")):
        assert opened(source, labels_file=tmp_path / f"y.{kind}").fingerprint == expected


def test_emnist_is_upright(tmp_path, opened):
    """EMNIST's files hold each picture transposed; a folder of all its sets asks for one."""
    image = mnist(tmp_path, prefix="emnist-letters-")
    np.testing.assert_array_equal(opened(image).images[:, 0], PIXELS.transpose(0, 2, 1))
    assert opened(tmp_path).labels.tolist() == LABELS
    mnist(tmp_path, prefix="emnist-digits-")
    with pytest.raises(InputError, match=r"several sets in --data: .*\(emnist-digits-train-images.*, emnist-letters.*Name one file"):
        opened(tmp_path)


def test_npy_pair(tmp_path, opened):
    np.save(tmp_path / "train_images.npy", PIXELS)
    np.save(tmp_path / "train_labels.npy", LABELS)
    dataset = opened(tmp_path / "train_images.npy")
    np.testing.assert_array_equal(dataset.images[:, 0], PIXELS)
    assert dataset.labels.tolist() == LABELS


def test_a_large_array_goes_through_the_cache(tmp_path, opened, monkeypatch):
    """In blocks, to the same fingerprint."""
    in_memory = {kind: opened(path).fingerprint for kind, path in (("idx", mnist(tmp_path / "a", suffix=".gz")), ("npy", npy(tmp_path)))}
    monkeypatch.setattr("fastcm.data.dataset.IN_MEMORY_BYTES", 10)
    monkeypatch.setattr("fastcm.data.dataset.BLOCK", 2)
    cached = {"idx": opened(tmp_path / "a"), "npy": opened(tmp_path / "images.npy")}
    assert {kind: dataset.fingerprint for kind, dataset in cached.items()} == in_memory
    assert all(isinstance(dataset.images, np.memmap) for dataset in cached.values())
    (tmp_path / "a" / "train-labels-idx1-ubyte.gz").write_bytes(b"")
    with pytest.raises(InputError, match="truncated file"):
        opened(tmp_path / "a")


def npy(folder):
    np.save(folder / "images.npy", PIXELS)
    return folder / "images.npy"


def test_svhn(tmp_path, opened):
    from scipy import io

    pictures, labels = random_pixels(4, 32, 32, 3), np.array([[1], [10], [9], [3]], np.uint8)
    io.savemat(tmp_path / "train_32x32.mat", {"X": pictures.transpose(1, 2, 3, 0), "y": labels}, do_compression=True)
    dataset = opened(tmp_path / "train_32x32.mat")
    np.testing.assert_array_equal(dataset.images, pictures.transpose(0, 3, 1, 2))
    assert dataset.labels.tolist() == [1, 0, 9, 3] and dataset.class_names == tuple("0123456789")


IDX_HEAD = struct.pack(">BBBBIII", 0, 0, 8, 3, 5, 4, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x-idx3-ubyte", struct.pack(">BBBBI", 0, 0, 8, 1, 5) + bytes(5), r"another magic number in .*: 0x00000801\. .*0x00000803"),
        ("x-idx3-ubyte", b"\x89PNG" + bytes(90), r"another magic number in .*: 0x89504e47"),
        ("x-idx3-ubyte", struct.pack(">BBBBIII", 0, 0, 13, 3, 5, 4, 4) + bytes(320), r"not pictures in --data: .*: >f4 \[5, 4, 4\]"),
        ("x-idx3-ubyte", IDX_HEAD + bytes(79), r"truncated file in --data: .*x-idx3-ubyte \(95 bytes\)"),
        ("x-idx3-ubyte", IDX_HEAD + bytes(81), r"another size than its header says in .*: 97 bytes, 96 for 5x4x4"),
        ("x-idx3-ubyte", IDX_HEAD[:7], "truncated file"),
        ("x-idx3-ubyte", b"", "truncated file"),
        ("x-idx3-ubyte", struct.pack(">BBBBIII", 0, 0, 8, 3, 0, 4, 4), r"no picture in --data"),
        ("x-idx3-ubyte.gz", gzip.compress(IDX_HEAD + bytes(79), mtime=0), "truncated file"),
        ("x-idx3-ubyte.gz", gzip.compress(IDX_HEAD + bytes(81), mtime=0), "another size than its header says"),
        ("x-idx3-ubyte.gz", gzip.compress(IDX_HEAD + bytes(80), mtime=0)[:30], "truncated file"),
        ("x-idx3-ubyte.gz", gzip.compress(IDX_HEAD + bytes(80), mtime=0)[:-4] + b"1234", "unreadable file .*Copy it again"),
        ("x-idx3-ubyte.gz", IDX_HEAD + bytes(80), r"unreadable file in .*\(Not a gzipped file"),
        ("x.npy", b"\x93NUMPY broken", r"unreadable file in --data: .*x\.npy"),
        ("x.mat", b"no MATLAB file" * 20, r"unreadable \.mat in --data: .*x\.mat"),
    ],
)
def test_files_that_are_refused(tmp_path, opened, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        opened(tmp_path / name)
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([1, 2, 3], np.uint8), r"not one class index per picture in the file of labels: .*: uint8 \[3\]\. Expected 5"),
        (PIXELS, r"another magic number in .*: 0x00000803\. Give an IDX file of labels \(0x00000801\)"),
        (np.array([0, 1, -2, 0, 1], np.int8), "negative label in the file of labels: .*: -2 in row 2"),
    ],
)
def test_labels_that_are_refused(tmp_path, opened, labels, message):
    mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_npy_and_mat_of_another_form(tmp_path, opened):
    from scipy import io

    np.save(tmp_path / "x.npy", np.zeros((2, 3, 32, 32), np.float32))
    with pytest.raises(InputError, match=r"not pictures in --data: .*x\.npy: float32 \[2, 3, 32, 32\]"):
        opened(tmp_path / "x.npy")
    io.savemat(tmp_path / "a.mat", {"images": np.zeros(3)})
    with pytest.raises(InputError, match=r"no pictures X with labels y in --data: .*a\.mat \(it holds images\)"):
        opened(tmp_path / "a.mat")
    io.savemat(tmp_path / "b.mat", {"X": random_pixels(8, 8, 3, 2), "y": np.array([11, 1])})
    with pytest.raises(InputError, match=r"label out of range in y in --data: .*b\.mat: 11"):
        opened(tmp_path / "b.mat")
    with pytest.raises(InputError, match="a file of labels for a source that carries its own"):
        opened(tmp_path / "b.mat", labels_file=tmp_path / "x.npy")


# Channels


@pytest.mark.parametrize(("channels", "expected"), [(None, 4), (4, 4), (3, 3), (1, 1)])
def test_channels_of_an_array(opened, channels, expected):
    """Transparency over white for three channels and one; kept for four."""
    pixels = np.array([[[[255, 0, 0, 0]]], [[[10, 20, 30, 255]]]], np.uint8)
    images = opened(pixels, channels=channels).images
    shown = {4: [[255, 0, 0, 0], [10, 20, 30, 255]], 3: [[255, 255, 255], [10, 20, 30]], 1: [[255], [18]]}[expected]
    assert images.shape == (2, expected, 1, 1) and images[:, :, 0, 0].tolist() == shown
    with pytest.raises(InputError, match="impossible number of channels in --channels: 2"):
        opened(pixels, channels=2)


def test_channels_of_a_folder(tmp_path, opened):
    from PIL import Image

    (tmp_path / "set").mkdir()
    pixels = random_pixels(2, 2, 4)
    Image.fromarray(pixels).save(tmp_path / "set" / "a.png")
    Image.new("L", (2, 2), 9).save(tmp_path / "set" / "b.png")
    rgba = opened(tmp_path / "set", channels=4)
    np.testing.assert_array_equal(rgba.images[0], pixels.transpose(2, 0, 1))
    assert rgba.images[1, :, 0, 0].tolist() == [9, 9, 9, 255]
    assert [opened(tmp_path / "set", channels=channels).channels for channels in (None, 1, 3)] == [3, 1, 3]
