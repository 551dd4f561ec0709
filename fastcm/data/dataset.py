"""Data sets: uint8 pictures in a fixed order, and batches that are a pure function of (seed, nimg)."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastcm import kernels
from fastcm.data import array_files, cache_building, cifar, image_cache, npz, streaming, svhn
from fastcm.data.cache_building import other_sizes
from fastcm.data.decoding import eight_bits, to_pixels
from fastcm.data.labels import MAX_CLASSES, check_labels, numbered
from fastcm.data.sources import BUILT_IN, Listing, Source, find
from fastcm.data.tables import Columns, no_columns
from fastcm.errors import InputError, check_given, nearest
from fastcm.generation.pictures import MODES, to_pil
from fastcm.weights.class_names import by_name, listed

BLOCK, BLOCK_BYTES = 256, 64 << 20  # pictures of an array file read between two writes, and the most that they may take
IN_MEMORY_BYTES = 64 << 20  # arrays below this are read at once; above, they go through the memory-mapped cache
ARRAY_FILES = {
    "npz": npz.open_npz,
    "npy": array_files.open_npy,
    "idx": array_files.open_idx,
    "mat": svhn.open_mat,
    "cifar": cifar.open_cifar,
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures with an order.

    images: uint8 [N, C, H, W], a read-only memory-map when it comes from a cache, a StreamedImages where none fits on the disk; labels:
    int64 [N] or None; class_names: one per class or None; fingerprint: sha256 over pixels, labels and class names, the same wherever
    the data lies (streamed: over names, times and sizes instead of pixels); skipped: unreadable files; held_out: how many pictures at
    the end are kept from training, to measure against; has_numbers: the classes came as numbers, which are their names; notes: lines to
    show before training.
    """

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    name: str
    fingerprint: str
    skipped: int = 0
    held_out: int = 0
    has_numbers: bool = False
    notes: tuple[str, ...] = ()

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

    def batch(
        self, nimg: int, batch_size: int, *, seed: int, part: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Returns (images uint8 [B, C, H, W], labels int64 [B] or None, positions int64 [B] = nimg + arange(B)), on the CPU.

        Image i of the run is row permute(i mod N) of epoch i div N: every picture once per epoch, in an order that depends on
        (seed, epoch) alone, so that neither resuming nor the batch size nor the number of processes changes it. part: the places of the
        global batch that one process or microbatch takes, e.g. slice(rank * 32, rank * 32 + 32); only they are read.
        """
        positions = nimg + np.arange(batch_size, dtype=np.int64)[part]
        rows = self.rows(positions, seed=seed)
        labels = None if self.labels is None else torch.from_numpy(np.array(self.labels[rows]))
        return torch.from_numpy(image_cache.gather(self.images, rows)), labels, torch.from_numpy(positions)

    def rows(self, positions: np.ndarray, *, seed: int) -> np.ndarray:
        """The rows int64 [B] of the images at these places of the run, int64 [B]."""
        epochs, places = np.divmod(positions, len(self))
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = kernels.permute(places[here], len(self), seed=seed, epoch=int(epoch))
        return rows

    def for_training(self) -> "Dataset":
        """Without the pictures that are held out. Raises InputError where all are."""
        if self.held_out == len(self):
            raise InputError(f"held-out pictures in --data: {self.name}. They are kept to measure against: train on the rest of the set.")
        if not self.held_out:
            return self
        kept = f"{self.held_out:,} more are held out, to measure against"
        return replace(self.subset(slice(len(self) - self.held_out)), notes=(*self.notes, kept))

    def subset(self, index: slice | Sequence[int] | np.ndarray) -> "Dataset":
        """The rows that `index` names, in its order: a view for a slice or a streamed set, a copy in memory for a list of rows."""
        rows = np.arange(len(self))[index]
        if len(rows) == 0:
            raise InputError(f"an empty subset of {self.name}: {index}. Name at least one row.")
        digest = hashlib.sha256(self.fingerprint.encode() + rows.astype("<i8").tobytes()).hexdigest()
        labels = None if self.labels is None else self.labels[rows]
        if isinstance(self.images, streaming.StreamedImages):
            images = self.images.view(rows)
        else:
            images = self.images[index if isinstance(index, slice) else rows]
        return replace(self, images=images, labels=labels, fingerprint=digest, held_out=0)

    def class_counts(self) -> np.ndarray:
        """How many pictures each class has, int64 [classes]."""
        return np.bincount(self.labels, minlength=len(self.class_names))


def open_dataset(
    source: str | os.PathLike | np.ndarray | tuple[np.ndarray, np.ndarray],
    *,
    resolution: int | None = None,
    channels: int | None = None,
    classes: int | Sequence[str] | None = None,
    bad_images: str = "fail",
    labels_file: str | os.PathLike | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Dataset:
    """Opens any source of pictures (docs/data.md has the rules), an array uint8 [N, H, W, C], or a tuple (array, labels int [N]).

    source: a built-in set (digits, emoji32, mnist, or mnist:held-out, its part that is never trained on), a folder or zip of pictures, an
    `.npz` or `.npy`, IDX files or their folder, CIFAR-10's python batches as folder or tar.gz, SVHN's `.mat`, tar shards as a file, a
    folder or a pattern such as `train-{000..146}.tar`, a `.parquet` or a folder of them, or what `datasets.save_to_disk` wrote, or
    `hf:owner/name[@revision][:config][:split]`.
    resolution: side of the square pictures; None takes theirs, if they are all of one square size.
    channels: 1 (grey), 3 (RGB) or 4 (RGBA); None takes 1 where all pictures are grey, else 3, and an array as it is.
    classes: what a model expects: names, by which labels are renumbered, or a number that labels must stay below; 0 drops the labels.
    bad_images: "fail" stops at an unreadable file; "skip" leaves it out, lists it in bad_images.txt and stops above 1 %.
    labels_file: a CSV or JSON with the label of each picture of a folder or zip; None takes labels.csv, labels.json or dataset.json there.
      For `.npy`, `.npz` and IDX pictures a file of the same kinds with their labels; None takes the one named alike.
    image_column, label_column: the columns of a table; None finds them by their types, a label_column "none" drops the classes.
    cache_dir: where decoded pictures and large arrays are kept; None is $FASTCM_CACHE, else ~/.cache/fastcm.
    progress: shows what is done and left while decoding.
    Raises InputError naming the file or the option.
    """
    for name, given in (("--data", source), ("--labels-file", labels_file)):
        check_given(name, given)
    if bad_images not in ("fail", "skip"):
        raise InputError(f"unknown value in --bad-images: {bad_images}. Choose fail or skip.{nearest(bad_images, ('fail', 'skip'))}")
    if resolution is not None and not 1 <= resolution <= 4096:
        raise InputError(f"impossible picture size in --resolution: {resolution}. Choose 1 to 4096.")
    if channels not in (None, *MODES):
        raise InputError(f"impossible number of channels in --channels: {channels}. Choose 1 (grey), 3 (RGB) or 4 (RGBA).")
    columns = Columns(image_column, label_column)
    if any(columns) and (isinstance(source, tuple | np.ndarray) or str(source).partition(":")[0] in BUILT_IN):
        raise no_columns(columns, "an array" if isinstance(source, tuple | np.ndarray) else source)
    if isinstance(source, tuple | np.ndarray):
        images, labels = source if isinstance(source, tuple) else (source, None)
        return _with_classes(_from_arrays(np.asarray(images), labels, None, (resolution, channels), "array"), classes)
    built_in, _, part = str(source).partition(":")
    if built_in in BUILT_IN:
        return _with_classes(_built_in(built_in, part, resolution, channels), classes)
    limit = classes if isinstance(classes, int) and classes else MAX_CLASSES
    found = find(str(source), labels_file=None if labels_file is None else Path(labels_file), limit=limit, columns=columns)
    if not found.has_pictures:
        dataset = _from_file(found, resolution, channels, cache_dir, progress)
    else:
        dataset = _from_pictures(found, resolution, channels, bad_images, image_cache.cache_folder(cache_dir), progress)
    return _with_classes(dataset, classes)


def _built_in(name: str, part: str, resolution: int | None, channels: int | None) -> Dataset:
    """A set that is shipped: small, so read as a whole. part: "" or, where pictures are held out, "held-out", these alone."""
    held_out = BUILT_IN[name]
    if part not in ("", "held-out") or (part and not held_out):
        known = [*BUILT_IN, *(f"{each}:held-out" for each, count in BUILT_IN.items() if count)]
        whole = f"{name}:{part}"
        raise InputError(f"unknown part of a built-in set in --data: {whole}. Use one of {', '.join(known)}.{nearest(whole, known)}")
    with resources.as_file(resources.files("fastcm.data") / "builtin" / f"{name}.npz") as file:
        arrays = npz.open_npz(file)
        images = np.concatenate(list(arrays.blocks(arrays.images_shape[0])))
    dataset = replace(_from_arrays(images, arrays.labels, None, (resolution, channels), name), held_out=held_out)
    if part:
        return replace(dataset.subset(slice(-held_out, None)), name=f"{name}:{part}", held_out=held_out)
    return dataset


def _from_pictures(source: Source, resolution: int | None, channels: int | None, bad_images: str, cache: Path, progress: bool) -> Dataset:
    """A folder, zip or tar shards: the entry of the last time where nothing changed, else listed, and decoded or streamed once."""
    root, name = source.root, source.name
    key = source.key(resolution, channels)
    known, notes, changed = image_cache.recall(cache, key)
    opened = None if known is None else _open(cache / known, root, bad_images)
    if opened is None:
        if changed is not None:
            print(f"fastcm: {changed} changed since {root} was decoded; reading it again", file=sys.stderr)
        listing = source.listing(cache)
        watched = image_cache.stamps([*listing.watched, *listing.sample(image_cache.WATCHED_FILES)])
        entry = cache / f"{name}-{resolution or 'own'}-{image_cache.entry_key(listing.content(resolution, channels))}"
        opened = _open(entry, root, bad_images) or _decode(entry, listing, resolution, channels, bad_images, progress)
        notes = listing.notes
        image_cache.remember(cache, key, entry.name, watched, notes)
    if opened.bad and bad_images == "fail":
        picture, _, reason = opened.bad[0].partition(": ")
        raise cache_building.unreadable(str(root / picture), reason)
    return replace(_of_entry(opened, name), skipped=len(opened.bad), notes=tuple(notes))


def _of_entry(entry: image_cache.Entry, name: str) -> Dataset:
    names = entry.class_names or numbered(entry.labels)
    return Dataset(entry.images, entry.labels, names, name, entry.fingerprint, has_numbers=entry.class_names is None)


def _open(entry: Path, root: Path, bad_images: str) -> image_cache.Entry | None:
    return image_cache.open_entry(entry) or streaming.open_stream(entry, root, bad_images)


def _decode(
    entry: Path, listing: Listing, resolution: int | None, channels: int | None, bad_images: str, progress: bool
) -> image_cache.Entry:
    """Into the cache where it leaves a tenth of the free space; else an index is written, and pictures are decoded in each batch."""
    form = cache_building.resolve_form(listing, resolution, channels, bad_images)
    needed_bytes = len(listing.names) * form.channels * form.side**2
    partial = cache_building.partial_of(entry)
    if partial.exists() or image_cache.has_room(entry.parent, needed_bytes):
        opened = cache_building.build(entry, listing, form, bad_images=bad_images, progress=progress)
        if listing.scratch is not None:
            shutil.rmtree(listing.scratch, ignore_errors=True)
        return opened
    print(
        f"fastcm: {entry.parent} has no room for {needed_bytes / 1e9:.1f} GB: the pictures of {listing.root} are decoded for each batch. "
        "FASTCM_CACHE names another folder.",
        file=sys.stderr,
    )
    streaming.build_stream(entry, listing, form)
    return streaming.open_stream(entry, listing.root, bad_images)


def _from_file(
    source: Source, resolution: int | None, channels: int | None, cache_dir: str | os.PathLike | None, progress: bool
) -> Dataset:
    """A file of arrays: in memory if it is small, before and after it is resized, else through the cache."""
    kind, files = source.kind, source.files
    name = "cifar10" if kind == "cifar" else source.name
    form = resolution if channels is None else (resolution, channels)
    entry = f"{name}-{resolution or 'own'}-{image_cache.entry_key([kind, form, *image_cache.stamps(map(str, files))])}"
    cache = image_cache.folder_or_none(cache_dir)
    opened = None if cache is None else image_cache.open_entry(cache / entry)
    if opened is None:
        arrays = ARRAY_FILES[kind](source.root) if kind == "cifar" else ARRAY_FILES[kind](*files)
        count, height, width, given = arrays.images_shape
        side, channels = resolution or _own_side(height, width, source.root), channels or given
        row_bytes = max(height * width * given, side * side * channels)
        if count * row_bytes <= IN_MEMORY_BYTES:
            images = np.concatenate(list(arrays.blocks(count)))
            return _from_arrays(images, arrays.labels, arrays.class_names, (side, channels), name)
        blocks = _blocks(arrays.blocks, count, row_bytes, side, channels, progress)
        shape = (count, channels, side, side)
        entry = image_cache.cache_folder(cache_dir) / entry
        opened = image_cache.build_entry(entry, blocks, shape=shape, labels=arrays.labels, class_names=arrays.class_names)
    return _of_entry(opened, name)


def _blocks(
    read: Callable[[int], Iterator[np.ndarray]], count: int, row_bytes: int, side: int, channels: int, progress: bool
) -> Iterator[np.ndarray]:
    """The pictures in their form, a block at a time. row_bytes: of the larger form of a picture, before or after."""
    rows = max(1, min(BLOCK, BLOCK_BYTES // row_bytes))
    with tqdm(total=count, desc="reading", unit="img", disable=None if progress else True) as bar:
        for block in read(rows):
            yield _formed(block, side, channels)
            bar.update(len(block))


def _from_arrays(
    images: np.ndarray, labels: np.ndarray | None, class_names: tuple[str, ...] | None, form: tuple[int | None, int | None], name: str
) -> Dataset:
    """form: the resolution and number of channels asked for; None for the array's own."""
    count, height, width, given = npz.check_images(images.shape, images.dtype, f"--data: {name}")
    side, channels = form[0] or _own_side(height, width, Path(name)), form[1] or given
    labels = None if labels is None else check_labels(labels, count, f"the labels of --data: {name}")
    pixels = _formed(images.reshape(count, height, width, given), side, channels)
    identity = image_cache.fingerprint(hashlib.sha256(pixels), pixels.shape, labels, class_names)
    pixels.flags.writeable = False
    return Dataset(pixels, labels, class_names or numbered(labels), name, identity, has_numbers=class_names is None)


def _own_side(height: int, width: int, root: Path) -> int:
    if height != width:
        raise other_sizes(root, [(width, height)])
    return height


def _formed(images: np.ndarray, resolution: int, channels: int) -> np.ndarray:
    """uint8 [N, H, W, C] -> a new uint8 [N, channels, resolution, resolution], cropped and resized by the rule of decoding.py."""
    if images.shape[1:] == (resolution, resolution, channels):
        return np.array(images.transpose(0, 3, 1, 2), order="C")
    images = np.ascontiguousarray(images)
    return np.stack([to_pixels(eight_bits(to_pil(image), channels=channels), resolution=resolution) for image in images])


def _with_classes(dataset: Dataset, classes: int | Sequence[str] | None) -> Dataset:
    """The data set as a model with `classes` sees it; see open_dataset. The fingerprint follows the labels."""
    if classes is None or (dataset.labels is None and not classes):
        return dataset
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    notes = dataset.notes
    if not names:
        labels, names = None, None
        notes = (*notes, f"no classes are asked for: the {len(dataset.class_names):,} of the data are left out")
    elif dataset.labels is None:
        what = f"no labels in --data: {dataset.name} ({len(names)} classes expected)"
        raise InputError(f"{what}. Use one sub-folder per class, a labels.csv, or arr_1.")
    elif isinstance(classes, int) or dataset.has_numbers:
        labels = dataset.labels
        if labels.max() >= len(names):
            row = int(np.argmax(labels >= len(names)))
            what = f"label out of range in --data: {dataset.name}: {labels[row]} in row {row}"
            raise InputError(f"{what}. {len(names)} classes are expected.")
        if isinstance(classes, int):
            names = (*dataset.class_names[:classes], *names[len(dataset.class_names) :])
    else:
        labels = _renumbered(dataset, names)
    if names == dataset.class_names:
        return dataset
    identity = image_cache.fingerprint(hashlib.sha256(dataset.fingerprint.encode()), dataset.images.shape, labels, names)
    return replace(dataset, labels=labels, class_names=names, fingerprint=identity, notes=notes)


def _renumbered(dataset: Dataset, names: tuple[str, ...]) -> np.ndarray:
    """The labels int64 [N] by the places of their classes in `names`."""
    places = by_name(names)
    unknown = next((name for name in dataset.class_names if name not in places), None)
    if unknown is not None:
        what = f"unknown class in --data: {dataset.name}: {unknown}"
        raise InputError(f"{what}. Expected {listed(names)}.{nearest(unknown, names)}")
    return np.array([places[name] for name in dataset.class_names], dtype=np.int64)[dataset.labels]
