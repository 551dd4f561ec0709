"""Data sets: uint8 pictures in a fixed order, and batches that are a pure function of (seed, nimg)."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastcm import kernels
from fastcm.errors import InputError, nearest
from fastcm.training import image_cache, sources
from fastcm.training.image_decoding import BadImageError, Header, decode, read_header, to_pixels

BUILT_IN = ("digits",)
BAD_LIMIT = 0.01  # the share of unreadable files above which `bad_images="skip"` stops as well
BLOCK = 256  # pictures decoded between two writes
IN_MEMORY_BYTES = 64 << 20  # an .npz below this is read at once; above, it goes through the memory-mapped cache


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures with an order.

    images: uint8 [N, C, H, W], a read-only memory-map when it comes from a cache; labels: int64 [N] or None; class_names: one per
    class or None; fingerprint: sha256 over pixels, labels and class names, the same wherever the data lies; skipped: unreadable files.
    """

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    name: str
    fingerprint: str
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"Dataset({self.name}: {len(self)} pictures of {self.channels}x{self.resolution}x{self.resolution}{classes})"

    @property
    def resolution(self) -> int:
        return self.images.shape[2]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def batch(self, nimg: int, batch_size: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Returns (images uint8 [B, C, H, W], labels int64 [B] or None, positions int64 [B] = nimg + arange(B)), on the CPU.

        Image i of the run is row permute(i mod N) of epoch i div N: every picture once per epoch, in an order that depends on
        (seed, epoch) alone, so that neither resuming nor the batch size nor the number of processes changes it.
        """
        positions = nimg + np.arange(batch_size, dtype=np.int64)
        epochs, places = np.divmod(positions, len(self))
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = kernels.permute(places[here], len(self), seed=seed, epoch=int(epoch))
        labels = None if self.labels is None else torch.from_numpy(self.labels[rows])
        return torch.from_numpy(np.ascontiguousarray(self.images[rows])), labels, torch.from_numpy(positions)

    def subset(self, index: slice | Sequence[int] | np.ndarray) -> "Dataset":
        """The rows that `index` names, in its order: a view for a slice, a copy in memory for a list of rows."""
        rows = np.arange(len(self))[index]
        if len(rows) == 0:
            raise InputError(f"an empty subset of {self.name}: {index}. Name at least one row.")
        digest = hashlib.sha256(self.fingerprint.encode() + rows.astype("<i8").tobytes()).hexdigest()
        labels = None if self.labels is None else self.labels[rows]
        images = self.images[index if isinstance(index, slice) else rows]
        return Dataset(images, labels, self.class_names, self.name, digest, self.skipped)


def open_dataset(
    source: str | os.PathLike | np.ndarray | tuple[np.ndarray, np.ndarray],
    *,
    resolution: int | None = None,
    classes: int | Sequence[str] | None = None,
    bad_images: str = "fail",
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Dataset:
    """Opens `digits`, a folder of pictures, an `.npz` file, an array uint8 [N, H, W, C], or a tuple (array, labels int [N]).

    resolution: side of the square pictures; None takes theirs, if they are all of one square size.
    classes: what a model expects: names, by which labels are renumbered, or a number that labels must stay below; 0 drops the labels.
    bad_images: "fail" stops at an unreadable file; "skip" leaves it out, lists it in bad_images.txt and stops above 1 %.
    cache_dir: where decoded folders and large .npz files are kept; None is $FASTCM_CACHE, else ~/.cache/fastcm.
    progress: shows a bar on a terminal while decoding.
    Raises InputError naming the file or the option.
    """
    if bad_images not in ("fail", "skip"):
        raise InputError(f"unknown value in --bad-images: {bad_images}. Choose fail or skip.{nearest(bad_images, ('fail', 'skip'))}")
    if resolution is not None and not 1 <= resolution <= 4096:
        raise InputError(f"impossible picture size in --resolution: {resolution}. Choose 1 to 4096.")
    if isinstance(source, tuple | np.ndarray):
        images, labels = source if isinstance(source, tuple) else (source, None)
        return _with_classes(_from_arrays(np.asarray(images), labels, resolution, "array"), classes)
    path = Path(source)
    cache = image_cache.cache_folder(cache_dir)
    if str(source) in BUILT_IN:
        with resources.as_file(resources.files("fastcm") / "data" / f"{source}.npz") as file:
            dataset = _from_npz(file, resolution, cache, progress)
    elif path.is_dir():
        dataset = _from_folder(path, resolution, bad_images, cache, progress)
    elif path.is_file() and path.suffix.lower() == ".npz":
        dataset = _from_npz(path, resolution, cache, progress)
    else:
        kind = "not a data set" if path.exists() else "no such file or folder"
        remedy = "Give a folder of pictures, an .npz file, or a built-in set: digits."
        raise InputError(f"{kind} in --data: {source}. {remedy}{nearest(str(source), BUILT_IN)}")
    return _with_classes(dataset, classes)


def _from_folder(root: Path, resolution: int | None, bad_images: str, cache: Path, progress: bool) -> Dataset:
    listing = sources.list_folder(root)
    stats = [(str(path.relative_to(root)), (status := path.stat()).st_size, status.st_mtime_ns) for path in listing.files]
    entry = cache / f"{root.resolve().name or 'root'}-{resolution or 'own'}-{image_cache.entry_key([root.resolve(), resolution, *stats])}"
    opened = image_cache.open_entry(entry)
    if opened is None:
        headers, bad = _read_headers(listing, bad_images, progress)
        side = resolution or _own_resolution(headers, root)
        grey = all(header.is_grey for header in headers.values())

        def blocks(unreadable: list[str]) -> image_cache.Blocks:
            unreadable += bad
            yield from _decode_all(listing, sorted(headers), side, grey, unreadable, bad_images, progress)

        shape = (len(headers), 1 if grey else 3, side, side)
        opened = image_cache.build_entry(entry, blocks, shape=shape, labels=listing.labels, class_names=listing.class_names)
    if opened.bad and bad_images == "fail":
        raise _unreadable(root, opened.bad[0])
    return Dataset(opened.images, opened.labels, opened.class_names, root.resolve().name, opened.fingerprint, len(opened.bad))


def _read_headers(listing: sources.Listing, bad_images: str, progress: bool) -> tuple[dict[int, Header], list[str]]:
    """Headers of the readable files by row, and the lines that name the others."""
    headers, bad = {}, []
    for row, path in enumerate(tqdm(listing.files, "reading headers", unit="file", leave=False, disable=None if progress else True)):
        try:
            headers[row] = read_header(path)
        except BadImageError as error:
            _note_bad(listing, row, error, bad, bad_images)
    return headers, bad


def _decode_all(
    listing: sources.Listing, rows: list[int], resolution: int, grey: bool, bad: list[str], bad_images: str, progress: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows int64 [n], pixels uint8 [n, C, H, W]) in the listing's order; Pillow decodes outside Python's lock, so threads pay."""

    def attempt(row: int) -> np.ndarray | BadImageError:
        try:
            return decode(listing.files[row], resolution=resolution, grey=grey)
        except BadImageError as error:
            return error

    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(rows), desc="decoding", unit="img", disable=None if progress else True) as bar:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            results = dict(zip(block, pool.map(attempt, block), strict=True))
            for row, result in results.items():
                if isinstance(result, BadImageError):
                    _note_bad(listing, row, result, bad, bad_images)
            good = [row for row in block if not isinstance(results[row], BadImageError)]
            if good:
                yield np.array(good, dtype=np.int64), np.stack([results[row] for row in good])
            bar.update(len(block))


def _note_bad(listing: sources.Listing, row: int, error: BadImageError, bad: list[str], bad_images: str) -> None:
    """Writes an unreadable file down, or stops: at the first one ("fail"), or once the share passes BAD_LIMIT ("skip")."""
    bad.append(f"{listing.files[row].relative_to(listing.root)}: {error}")
    if bad_images == "fail":
        raise _unreadable(listing.root, bad[0]) from error
    if len(bad) > BAD_LIMIT * len(listing.files):
        raise InputError(
            f"more than {BAD_LIMIT:.0%} unreadable pictures in --data: {listing.root} ({len(bad)} or more of {len(listing.files)}: "
            f"{'; '.join(bad[:3])}). Repair or remove them."
        ) from error


def _unreadable(root: Path, line: str) -> InputError:
    name, _, reason = line.partition(": ")
    return InputError(f"unreadable picture in --data: {root / name} ({reason}). Repair or remove it, or pass --bad-images skip.")


def _own_resolution(headers: dict[int, Header], root: Path) -> int:
    """The side that all pictures share; InputError where they do not."""
    sizes = sorted({(header.width, header.height) for header in headers.values()})
    if len(sizes) == 1 and sizes[0][0] == sizes[0][1]:
        return sizes[0][0]
    shown = ", ".join(f"{width}x{height}" for width, height in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
    raise InputError(f"pictures that are not all of one square size in --data: {root} ({shown}). Pass --resolution N to crop and resize.")


def _from_npz(path: Path, resolution: int | None, cache: Path, progress: bool) -> Dataset:
    arrays = sources.open_npz(path)
    count, height, width, channels = arrays.images_shape
    if count * height * width * channels <= IN_MEMORY_BYTES:
        images = np.concatenate(list(arrays.blocks(count)))
        return _from_arrays(images, arrays.labels, resolution, path.stem)
    side = resolution or _own_resolution({0: Header(width, height, channels == 1)}, path)
    status = path.stat()
    entry = cache / f"{path.stem}-{side}-{image_cache.entry_key([path.resolve(), side, status.st_size, status.st_mtime_ns])}"
    opened = image_cache.open_entry(entry)
    if opened is None:

        def blocks(_: list[str]) -> image_cache.Blocks:
            start = 0
            with tqdm(total=count, desc="reading", unit="img", disable=None if progress else True) as bar:
                for block in arrays.blocks(BLOCK):
                    yield np.arange(start, start + len(block)), _resized(block, side)
                    start += len(block)
                    bar.update(len(block))

        names = _numbered_classes(arrays.labels)
        opened = image_cache.build_entry(entry, blocks, shape=(count, channels, side, side), labels=arrays.labels, class_names=names)
    return Dataset(opened.images, opened.labels, opened.class_names, path.stem, opened.fingerprint)


def _from_arrays(images: np.ndarray, labels: np.ndarray | None, resolution: int | None, name: str) -> Dataset:
    count, height, width, channels = sources.check_images(images.shape, images.dtype, f"--data: {name}")
    side = resolution or _own_resolution({0: Header(width, height, channels == 1)}, Path(name))
    labels = None if labels is None else sources.check_labels(labels, count, f"the labels of --data: {name}")
    pixels = _resized(images.reshape(count, height, width, channels), side)
    names = _numbered_classes(labels)
    identity = image_cache.fingerprint(hashlib.sha256(pixels), pixels.shape, labels, names)
    pixels.flags.writeable = False
    return Dataset(pixels, labels, names, name, identity)


def _resized(images: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 [N, H, W, C] -> a new uint8 [N, C, resolution, resolution], cropped and resized by the rule of image_decoding.py."""
    if images.shape[1:3] == (resolution, resolution):
        return np.array(images.transpose(0, 3, 1, 2), order="C")
    pictures = (Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image) for image in images)
    return np.stack([to_pixels(picture, resolution=resolution) for picture in pictures])


def _numbered_classes(labels: np.ndarray | None) -> tuple[str, ...] | None:
    return None if labels is None else tuple(str(label) for label in range(int(labels.max()) + 1))


def _with_classes(dataset: Dataset, classes: int | Sequence[str] | None) -> Dataset:
    """The data set as a model with `classes` sees it; see open_dataset. The fingerprint follows the labels."""
    if classes is None or (dataset.labels is None and not classes):
        return dataset
    names = tuple(str(index) for index in range(classes)) if isinstance(classes, int) else tuple(classes)
    if not names:
        labels, names = None, None
    elif dataset.labels is None:
        raise InputError(f"no labels in --data: {dataset.name} ({len(names)} classes expected). Use one sub-folder per class, or arr_1.")
    elif isinstance(classes, int):
        if dataset.labels.max() >= classes:
            row = int(np.argmax(dataset.labels >= classes))
            what = f"label out of range in --data: {dataset.name}: {dataset.labels[row]} in row {row}"
            raise InputError(f"{what}. {classes} classes are expected.")
        labels, names = dataset.labels, (*dataset.class_names[:classes], *names[len(dataset.class_names) :])
    else:
        unknown = [name for name in dataset.class_names if name not in names]
        if unknown:
            what = f"unknown class in --data: {dataset.name}: {unknown[0]}"
            raise InputError(f"{what}. Expected {', '.join(names)}.{nearest(unknown[0], names)}")
        labels = np.array([names.index(name) for name in dataset.class_names], dtype=np.int64)[dataset.labels]
    if names == dataset.class_names:
        return dataset
    identity = image_cache.fingerprint(hashlib.sha256(dataset.fingerprint.encode()), dataset.images.shape, labels, names)
    return Dataset(dataset.images, labels, names, dataset.name, identity, dataset.skipped)
