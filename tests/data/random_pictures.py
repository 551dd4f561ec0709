"""Random pixels, and random pictures in every kind of source, for the data tests."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
from PIL import Image


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(root, sizes, *, classes=("",), seed=0):
    """Random RGB pictures `0.png` ... of the given (height, width) in each class folder; returns them in the listing's order."""
    pictures = []
    for number, name in enumerate(sorted(classes)):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index, (height, width) in enumerate(sizes):
            pixels = random_pixels(height, width, 3, seed=seed + 100 * number + index)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
            pictures.append(pixels)
    return pictures


def png(pixels):
    """The bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_zip(path, files, *, compression=zipfile.ZIP_DEFLATED):
    """files: {name: bytes}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, *, form=tarfile.USTAR_FORMAT, mode="w"):
    """files: {name: bytes, or a TarInfo of another kind}."""
    with tarfile.open(path, mode, format=form) as archive:
        for name, content in files.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if member is not content:
                member.size = len(content)
            archive.addfile(member, None if member is content else io.BytesIO(content))
    return path


def write_shards(folder, pictures, labels, *, per_shard):
    """WebDataset shards `train-000000.tar` ... of PNGs with their classes (None for none)."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(pictures), per_shard)):
        files = {}
        for index in range(start, min(start + per_shard, len(pictures))):
            files[f"{index:06d}.png"] = png(pictures[index])
            if labels is not None:
                files[f"{index:06d}.cls"] = str(labels[index]).encode()
        write_tar(folder / f"train-{shard:06d}.tar", files)


def cifar_batch(pixels, labels):
    """A batch as published: protocol 2 of Python 2 with a uint8 array [N, 3072] and a list of labels. pixels: uint8 [N, 32, 32, 3]."""
    data = pixels.transpose(0, 3, 1, 2).tobytes()

    def text(value):
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    def number(value):
        return b"J" + value.to_bytes(4, "little", signed=True)

    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    content = b"T" + len(data).to_bytes(4, "little") + data  # BINSTRING
    state = b"(" + number(1) + number(len(pixels)) + number(3072) + b"\x86" + dtype + b"\x89" + content + b"tb"
    items = text(b"data") + array + state + text(b"labels") + b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + items + text(b"batch_label") + text(b"training batch") + b"u."


CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar_files(per_batch):
    """{name: bytes} of a small CIFAR-10, with its pictures uint8 [5 n, 32, 32, 3] and labels [5 n]."""
    pictures = random_pixels(5 * per_batch, 32, 32, 3)
    labels = [index % 10 for index in range(5 * per_batch)]
    files = {
        f"data_batch_{number + 1}": cifar_batch(pictures[rows], labels[rows])
        for number in range(5)
        for rows in [slice(number * per_batch, (number + 1) * per_batch)]
    }
    files["test_batch"] = cifar_batch(random_pixels(2, 32, 32, 3, seed=1), [0, 1])
    files["batches.meta"] = pickle.dumps({"label_names": list(CIFAR_CLASSES), "num_vis": 3072}, protocol=2)
    return files, pictures, labels


def write_cifar(root, *, per_batch):
    """CIFAR-10 as a folder; returns pictures and labels."""
    files, pictures, labels = cifar_files(per_batch)
    root.mkdir(parents=True)
    for name, content in files.items():
        (root / name).write_bytes(content)
    return pictures, labels


def oversized_header():
    """A pax header that claims a gigabyte."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 999_999_999
    return member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


def write_idx(path, array):
    """An array of uint8 or int8 in IDX, compressed where the name ends in .gz; returns the path."""
    kind = {"uint8": 8, "int8": 9}[array.dtype.name]
    content = bytes([0, 0, kind, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
