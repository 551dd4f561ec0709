"""Tables of pictures, by `datasets`: `.parquet` files, folders of its `save_to_disk`, data sets on the hub.

The pictures' files, as the column holds them, are copied one after the other into a file of the cache (a pack), from which they are decoded
by the rules for any other picture; the pack goes when that is done.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastcm.data import image_cache
from fastcm.data.labels import LABEL_COLUMNS, Classes, by_name, check_labels
from fastcm.data.spans import MAX_BYTES, Span
from fastcm.errors import InputError, RunError, nearest
from fastcm.weights import hub
from fastcm.weights.class_names import check_names

ROWS = 256  # read at a time
SHARD = re.compile(r"(.+?)[-_.]\d+(-of-\d+)?\.parquet", re.IGNORECASE)


class Columns(NamedTuple):
    """The names given by --image-column and --label-column; None where the column is found by its type."""

    image: str | None = None
    label: str | None = None


FOUND = Columns()


class Table(NamedTuple):
    """An opened table. features: `datasets.Features`; batches(column) yields its values as arrow arrays, in order."""

    shown: str
    features: Any
    batches: Callable[[str], Iterator[Any]]


def no_columns(columns: Columns, source: object) -> InputError:
    option = "--label-column" if columns.image is None else "--image-column"
    return InputError(f"a column of a source without columns in {option}: {source}. Tables have them; leave it out.")


def parquet_files(folder: Path, names: list[str]) -> tuple[Path, ...]:
    """The parquet files of a folder with these names: all, or by splits (`train-00000-of-00002.parquet`) those of train.

    Raises InputError for several splits without train.
    """
    files = sorted(name for name in names if name.lower().endswith(".parquet"))
    splits: dict[str, list[str]] = {}
    for name in files:
        shard = SHARD.fullmatch(name)
        splits.setdefault(shard[1] if shard else name[: -len(".parquet")], []).append(name)
    if len(splits) > 1:
        if "train" not in splits:
            raise InputError(f"several tables in --data: {folder} ({', '.join(sorted(splits))[:200]}). Name the files, as {files[0]}.")
        files = splits["train"]
    return tuple(folder / name for name in files)


def arrow_folder(folder: Path, names: list[str]) -> Path | None:
    """The folder that `save_to_disk` wrote, or its split train; None for another folder. Raises InputError for splits without train."""
    if "dataset_dict.json" in names:
        splits = [name for name in names if (folder / name / "state.json").is_file()]
        if "train" in splits or len(splits) == 1:
            return folder / ("train" if "train" in splits else splits[0])
        raise InputError(f"no split train in --data: {folder} (it has {', '.join(splits) or 'none'}). Name one, as {folder}/test.")
    return folder if {"state.json", "dataset_info.json"} <= set(names) else None


def open_table(files: tuple[Path, ...]) -> Table:
    """Opens parquet files, or a folder of `save_to_disk`. Raises InputError."""
    return _open_arrow(files[0].parent) if files[0].name == "state.json" else _open_parquet(files)


def _open_parquet(files: tuple[Path, ...]) -> Table:
    import pyarrow
    from datasets import Features
    from pyarrow import parquet

    def unreadable(path: Path, error: Exception) -> InputError:
        return InputError(f"unreadable parquet file in --data: {path} ({_line(error)}). Copy it again.")

    schemas = []
    for path in files:
        try:
            schemas.append(parquet.read_schema(path))
        except (pyarrow.ArrowException, OSError) as error:
            raise unreadable(path, error) from error
        if schemas[-1].names != schemas[0].names or schemas[-1].types != schemas[0].types:
            listed = ", ".join(schemas[-1].names)[:200]
            raise InputError(f"another table in --data: {path} than in {files[0].name}: {listed}. Name one file.")

    def batches(column: str) -> Iterator[Any]:
        for path in files:
            try:
                with parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(ROWS, columns=[column]):
                        yield batch.column(0)
            except (pyarrow.ArrowException, OSError) as error:
                raise unreadable(path, error) from error

    return Table(str(files[0]) if len(files) == 1 else str(files[0].parent), Features.from_arrow_schema(schemas[0]), batches)


def _open_arrow(folder: Path) -> Table:
    import datasets
    import pyarrow

    try:
        return of_dataset(datasets.load_from_disk(str(folder)), str(folder))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"unreadable data set in --data: {folder} ({_line(error)}). Write it again by save_to_disk.") from error


def open_hub(source: str) -> tuple[Table, tuple[Path, ...]]:
    """Opens `hf:owner/name[@revision][:config][:split]`, fetched and kept by `datasets` as arrow files; returns the table and these.

    One part after the name is a configuration if there is one of that name, else a split; the split is train where there is one.
    Raises InputError, RunError.
    """
    import datasets

    name, *parts = re.split(r":(?![^\[]*\])", source.removeprefix(hub.PREFIX))  # a split may be a slice, as train[:1000]
    found = hub.hub_id(hub.PREFIX + name)
    if len(parts) > 2 or "" in parts:
        raise InputError(f"not a data set on the hub in --data: {source}. Write it as hf:owner/name:config:split.")
    where = {"path": found.repository, "revision": found.revision}
    try:
        configs = datasets.get_dataset_config_names(**where)
        config = parts.pop(0) if parts and (len(parts) == 2 or parts[0] in configs) else datasets.get_dataset_default_config_name(**where)
        if config is None and not parts:
            named = f"hf:{name}:{configs[0]}"
            raise InputError(f"several configurations in --data: {source} ({_listed(configs)}). Name one, as {named}.")
        if config not in configs:
            shown = config or parts[0]
            raise InputError(f"no such configuration in --data: {source}: {shown}. There are {_listed(configs)}.{nearest(shown, configs)}")
        builder = datasets.load_dataset_builder(name=config, **where)
        splits = list(map(str, builder.config.data_files or builder.info.splits or ()))
        split = parts[0] if parts else "train" if "train" in splits or not splits else splits[0] if len(splits) == 1 else None
        if split is None or (splits and re.split(r"[\[+]", split)[0] not in splits):
            what = "no split train" if split is None else f"no such split {split}"
            raise InputError(f"{what} in --data: {source} (it has {_listed(splits)}). Name one, as hf:{name}:{splits[0]}.")
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=split)
    except Exception as error:
        raise _hub_refusal(error, source) from error
    return of_dataset(dataset, source), tuple(Path(file["filename"]) for file in dataset.cache_files)


def _hub_refusal(error: Exception, source: str) -> Exception:
    """One line for what `datasets` raises at a repository; the hub's own error is looked for behind it."""
    import datasets
    from huggingface_hub import errors

    if isinstance(error, InputError):
        return error
    behind, seen = error, []
    while behind is not None and behind not in seen:
        if isinstance(behind, errors.HfHubHTTPError | errors.OfflineModeIsEnabled):
            return hub.refusal(behind, source, option="--data")
        seen.append(behind)
        behind = behind.__cause__ or behind.__context__
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        if "gated" in str(error):
            return InputError(
                f"a gated data set in --data: {source}. Accept its terms on the hub, then log in: hf auth login, or HF_TOKEN."
            )
        return InputError(f"no such data set in --data: {source}. Correct the name; a private one needs hf auth login, or HF_TOKEN.")
    if "OfflineModeIsEnabled" in str(error):
        return hub.refusal(errors.OfflineModeIsEnabled(), source, option="--data")
    if isinstance(error, ConnectionError | TimeoutError):
        return RunError(f"the hub cannot be reached for --data: {source} ({_line(error)}). Run again: what was fetched is kept.")
    reason = _line(error.__cause__ or error)  # what lies behind "An error occurred while generating the dataset"
    return InputError(f"not a data set that can be read in --data: {source} ({reason}). Give one of parquet files or pictures.")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"


def of_dataset(dataset: Any, shown: str) -> Table:
    """The table of a `datasets.Dataset`."""

    def batches(column: str) -> Iterator[Any]:
        for table in dataset.select_columns([column]).with_format("arrow").iter(ROWS):
            yield from table.column(0).chunks

    return Table(shown, dataset.features, batches)


def chosen_columns(table: Table, columns: Columns) -> tuple[str, str | None]:
    """The columns of pictures and of classes: as named, else by their types. Raises InputError with what the table has."""
    kinds = {name: _kind(feature) for name, feature in table.features.items()}
    listed = ", ".join(f"{name} ({_shown(feature)})" for name, feature in table.features.items())[:300]
    image, label = columns
    for option, name in (("--image-column", image), ("--label-column", None if label == "none" else label)):
        if name is not None and name not in kinds:
            raise InputError(f"no such column in {option}: {name}. {table.shown} has {listed}.")
    if image is None:
        found = next(filter(None, ([name for name in kinds if kinds[name] == kind] for kind in ("image", "file", "bytes"))), [])
        if len(found) != 1:
            what = "several columns of pictures" if found else "no column of pictures"
            raise InputError(f"{what} in --data: {table.shown}: {listed}. Name one by --image-column.")
        image = found[0]
    elif kinds[image] not in ("image", "file", "bytes"):
        raise InputError(f"not pictures in --image-column: {image} is {_shown(table.features[image])}. {table.shown} has {listed}.")
    if label == "none":
        return image, None
    if label is None:
        found = [name for name in kinds if kinds[name] == "classes"]
        if len(found) > 1:
            raise InputError(f"several columns of classes in --data: {table.shown}: {', '.join(found)}. Name one by --label-column.")
        likely = [name for name in kinds if name.lower() in (*LABEL_COLUMNS, "labels") and name != image]
        if not found and likely:
            kind = _shown(table.features[likely[0]])
            remedy = f"Pass --label-column {likely[0]} to take its values as classes, or --label-column none"
            raise InputError(f"labels without names in --data: {table.shown}: column {likely[0]} is {kind}, no ClassLabel. {remedy}.")
        label = found[0] if found else None
    elif kinds[label] not in ("classes", "whole", "text"):
        raise InputError(f"not classes in --label-column: {label} is {_shown(table.features[label])}. Name a column of numbers or names.")
    return image, label


def _kind(feature: Any) -> str:
    import datasets

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "classes"
    if isinstance(feature, dict) and "bytes" in feature:
        return "file"
    dtype = str(getattr(feature, "dtype", ""))
    return {"binary": "bytes", "large_binary": "bytes", "string": "text", "large_string": "text"}.get(
        dtype, "whole" if re.fullmatch(r"u?int\d+", dtype) else "other"
    )


def _shown(feature: Any) -> str:
    dtype = getattr(feature, "dtype", None)
    return str(dtype) if type(feature).__name__ == "Value" else type(feature).__name__


def read_classes(table: Table, column: str) -> Classes:
    """The classes of a column: a ClassLabel's names, whole numbers as they are, or names in sorted order. Raises InputError."""
    feature, how = table.features[column], f"column {column}"
    where = f"{how} of --data: {table.shown}"
    values = [value for array in table.batches(column) for value in array.to_pylist()]
    if None in values:
        raise InputError(f"no label in {where}: row {values.index(None)}. Give each picture a class, or pass --label-column none.")
    if _kind(feature) == "text":
        return by_name(values, where, how)
    labels = check_labels(np.array(values, dtype=np.int64), len(values), where)
    names = check_names(feature.names, where) if _kind(feature) == "classes" and feature.names else None
    if names and len(labels) and labels.max() >= len(names):
        row = int(np.argmax(labels >= len(names)))
        raise InputError(f"label out of range in {where}: {labels[row]} in row {row}. The column names {len(names)} classes.")
    return Classes(labels, names, how)


class Pack(NamedTuple):
    """The copied pictures: one file in `folder`, a span each, and the sha256 of all bytes."""

    folder: Path
    spans: list[Span]
    identity: str


def pack(table: Table, column: str, cache: Path, key: str) -> Pack:
    """Copies a column's pictures into `cache`/pack-`key`, or takes what an earlier call left there. Raises InputError, RunError."""
    folder = cache / f"pack-{key}"
    if not (folder / "ends.npy").is_file():
        image_cache.make_folder(cache)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=cache))
        try:
            _write_pack(table, column, temporary)
            os.replace(temporary, folder)
        except OSError as error:
            if not (folder / "ends.npy").is_file():  # else another process was faster: both made the same pack
                raise image_cache.cannot_write(folder, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    ends, path = np.load(folder / "ends.npy", allow_pickle=False).tolist(), str(folder / "pictures.bin")
    spans = [Span(path, start, end - start, 0) for start, end in zip([0, *ends], ends, strict=False)]
    return Pack(folder, spans, json.loads((folder / "identity.json").read_text(encoding="ascii")))


def _write_pack(table: Table, column: str, folder: Path) -> None:
    ends, end, digest = [], 0, hashlib.sha256()
    with open(folder / "pictures.bin", "wb") as file:
        for array in table.batches(column):
            for content in _contents(array):
                file.write(content)
                digest.update(content)
                end += len(content)
                ends.append(end)
    os.utime(folder / "pictures.bin", ns=(0, 0))  # the spans' time: what the pictures are is said by their hash
    (folder / "identity.json").write_text(json.dumps(digest.hexdigest()), encoding="ascii")
    np.save(folder / "ends.npy", np.array(ends, dtype=np.int64))


def _contents(array: Any) -> Iterator[bytes]:
    """The files of pictures in an arrow array of bytes or of {bytes, path}; nothing for a row without one."""
    for value in array.to_pylist():
        if isinstance(value, dict):
            path = value.get("path")
            value = value["bytes"] if value["bytes"] is not None else _file(path) if path else None
        yield value or b""


def _file(path: str) -> bytes | None:
    try:
        if Path(path).is_file() and Path(path).stat().st_size <= MAX_BYTES:
            return Path(path).read_bytes()
    except (OSError, ValueError):
        pass
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
