"""Which class each picture has: by sub-folder, by the picture's name, or by a file of labels; and what a label may be."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fastcm.errors import InputError
from fastcm.networks.checks import MAX_CLASSES
from fastcm.weights.class_names import check_names, in_order

LABEL_FILES = ("labels.csv", "labels.json", "dataset.json")
FILE_COLUMNS = ("file", "file_name", "filename", "image", "name", "path")
LABEL_COLUMNS = ("label", "class", "class_name")
# Folders that hold parts of a set, and what cameras begin the names of their pictures with: neither are classes.
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "holdout"}
CAMERA = re.compile(r"img|image|photo|dsc|dscn|dscf|dcim|pxl|mvimg|gopr|(19|20)\d{6}", re.IGNORECASE)  # the last is a date
SAMPLED = re.compile(r"seed--?\d+-class-(\d{1,6})\.png")  # as `fastcm sample --out DIR/` names its files


class Classes(NamedTuple):
    """labels: int64 [N], None without classes; names: one per class, None where they have numbers alone; how: what the labels are from."""

    labels: np.ndarray | None
    names: tuple[str, ...] | None
    how: str = ""


def numbered(labels: np.ndarray | None) -> tuple[str, ...] | None:
    """The names of classes that have none: their numbers."""
    return None if labels is None else tuple(str(label) for label in range(int(labels.max()) + 1))


def check_labels(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Returns labels as int64 [count]; raises InputError naming the first row that is no class index."""
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise InputError(f"not one class index per picture in {where}: {labels.dtype} {list(labels.shape)}. Expected int64 [{count}].")
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        row = int(np.argmax(labels < 0))
        raise InputError(f"negative label in {where}: {labels[row]} in row {row}. Classes count from 0.")
    if labels.max() >= MAX_CLASSES:
        row = int(np.argmax(labels >= MAX_CLASSES))
        raise InputError(f"label out of range in {where}: {labels[row]} in row {row}. At most {MAX_CLASSES:,} classes are supported.")
    return labels


def from_names(names: Sequence[str], root: object) -> Classes:
    """The classes that paths of pictures (relative, with "/") show by themselves.

    Pictures in several sub-folders: the first sub-folder is the class. Pictures all in one folder: the number that `fastcm sample` wrote,
    or the file name up to its first "_" (OpenAI's rule), where every name has such a beginning, there are two or more of them, none stands
    alone and none is a camera's; else no classes. Raises InputError for pictures both beside and inside sub-folders, and for sub-folders
    that are parts of a set.
    """
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    loose = folders.count("")
    if 0 < loose < len(names):
        raise InputError(
            f"pictures both beside and inside sub-folders in --data: {root} ({loose} beside). "
            "Sub-folders are classes: move the loose pictures into one, or give a flat folder, or a labels.csv."
        )
    if not loose:
        distinct = sorted(set(folders))
        if all(folder.lower() in PARTS for folder in distinct):
            remedy = f"Give one of them, as {root}/{distinct[0]}, or a labels.csv."
            raise InputError(f"parts of a set, not classes, in --data: {root} ({', '.join(distinct)}). {remedy}")
        return by_name(folders, f"--data: {root}", "sub-folder")
    sampled = [SAMPLED.fullmatch(name) for name in names]
    if all(sampled):
        return Classes(np.array([int(match[1]) for match in sampled], dtype=np.int64), None, "the names of fastcm sample")
    return _by_beginning(names, root)


def _by_beginning(names: Sequence[str], root: object) -> Classes:
    counts = Counter(name.partition("_")[0] if "_" in name else "" for name in names)
    if "" in counts or len(counts) < 2:
        return Classes(None, None)
    camera = next((beginning for beginning in counts if CAMERA.fullmatch(beginning)), None)
    if camera is not None:
        return Classes(None, None, f"{camera}_ is a camera's name")
    rarest = min(counts, key=counts.get)
    if counts[rarest] < 2:
        return Classes(None, None, f"one picture alone begins with {rarest}_")
    return by_name([name.partition("_")[0] for name in names], f"--data: {root}", "the name before _")


def by_name(classes: Sequence[str], where: str, how: str) -> Classes:
    """Class indices in the order of the sorted names. Raises InputError for a name that is none, and for more than MAX_CLASSES."""
    names = check_names(in_order(set(classes)), where)
    if len(names) > MAX_CLASSES:
        raise InputError(f"too many classes in {where}: {len(names):,}, by {how}. At most {MAX_CLASSES:,} are supported.")
    index = {name: i for i, name in enumerate(names)}
    return Classes(np.array([index[name] for name in classes], dtype=np.int64), names, how)


def from_file(content: bytes, where: str, names: Sequence[str], *, limit: int = MAX_CLASSES) -> Classes:
    """The classes of the pictures `names` by a file of labels: CSV where `where` ends in .csv, else JSON.

    CSV: two columns, file and label, or any columns under a heading that names them. JSON: EDM's {"labels": [[file, label], ...]}, or null
    for none; a list of such pairs or of {"file": ..., "label": ...}; or {file: label}. Files are relative to the file of labels. Labels are
    class indices below `limit`, or names, which are numbered in sorted order. Raises InputError naming file and row.
    """
    rows = _csv_rows(content, where) if where.lower().endswith(".csv") else _json_rows(content, where)
    if rows is None:
        return Classes(None, None, f"{PurePosixPath(where).name} says so")
    found: dict[str, tuple[str, Any]] = {}  # (row, label) by file
    known = set(names)
    other_case = unique_folded(names)
    for row, file, label in rows:
        file = str(PurePosixPath(str(file).replace("\\", "/")))
        file = file if file in known else other_case.get(file.casefold(), file)
        if file in found:
            raise InputError(f"duplicate row in {where}: {file} in {row}, first in {found[file][0]}. Keep one of them.")
        if file not in known:
            raise InputError(f"no such picture in {where}: {file} in {row}. Name files by their path from the folder of {where}.")
        found[file] = row, label
    missing = [name for name in names if name not in found]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise InputError(f"no row for a picture in {where}: {missing[0]}{more}. Add a row for each picture, or remove the picture.")
    return _classes([found[name] for name in names], where, limit)


def _classes(labels: list[tuple[str, Any]], where: str, limit: int) -> Classes:
    """Indices where all labels are whole numbers, names where all are text."""
    named = isinstance(labels[0][1], str)
    for row, label in labels:
        if isinstance(label, bool) or not isinstance(label, str if named else int):
            wanted = "a class name" if named else "a class index"
            raise InputError(f"not {wanted} in {where}: {json.dumps(label)} in {row}. Write all labels as whole numbers, or all as names.")
        if not named and not 0 <= label < limit:
            raise InputError(f"label out of range in {where}: {label} in {row}. Expected 0 to {limit - 1}.")
    how = PurePosixPath(where).name.rpartition(":")[2]
    if named:
        return by_name([label for _, label in labels], where, how)
    return Classes(np.array([label for _, label in labels], dtype=np.int64), None, how)


def unique_folded(names: Iterable[str]) -> dict[str, str]:
    """The names by themselves in small letters, without those that then are no longer one."""
    found: dict[str, str | None] = {}
    for name in names:
        found[name.casefold()] = None if name.casefold() in found else name
    return {folded: name for folded, name in found.items() if name is not None}


def _csv_rows(content: bytes, where: str) -> Iterator[tuple[str, str, Any]]:
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not readable as CSV: {where} ({error}). Save it as UTF-8 with commas.") from None
    heading = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    file = next((i for i, cell in enumerate(heading) if cell in FILE_COLUMNS), None)
    label = next((i for i, cell in enumerate(heading) if cell in LABEL_COLUMNS), None)
    if file is not None and label is not None:
        rows = rows[1:]
    elif heading and len(heading) != 2:
        raise InputError(f"no columns file and label in {where}: {','.join(heading)}. Begin it with a line such as file,label.")
    else:
        file, label = 0, 1
    for line, row in rows:
        if len(row) != len(heading):
            raise InputError(f"another number of columns in {where}: {len(row)} in row {line}, not {len(heading)}. Repair the row.")
        if not row[label].strip():
            raise InputError(f"no label in {where}: row {line} ({row[file]}). Give each picture a class.")
    cells = [row[label].strip() for _, row in rows]
    numbers = all(re.fullmatch(r"-?\d{1,18}", cell) for cell in cells)
    for (line, row), cell in zip(rows, cells, strict=True):
        yield f"row {line}", row[file].strip(), int(cell) if numbers else cell


def _json_rows(content: bytes, where: str) -> list[tuple[str, str, Any]] | None:
    """The rows (place, file, label) of a JSON file; None where it says that there are no labels."""
    try:
        tree = json.loads(content, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not readable as JSON: {where} ({error}). Write {{file: label}} or [[file, label], ...].") from None
    if isinstance(tree, _Pairs) and (inside := [value for name, value in tree if name == "labels" and not isinstance(value, int | str)]):
        tree = inside[0]
    if tree is None:
        return None
    if not isinstance(tree, list):
        raise InputError(f"no labels in {where}: {type(tree).__name__}. Write {{file: label}} or [[file, label], ...].")
    rows = []
    for number, item in enumerate(tree, 1):
        if isinstance(item, _Pairs):
            item = [next((value for name, value in item if name in columns), None) for columns in (FILE_COLUMNS, LABEL_COLUMNS)]
        if not isinstance(item, list | tuple) or len(item) != 2 or not isinstance(item[0], str):
            raise InputError(f"not a file and its label in {where}: row {number}. Write {{file: label}} or [[file, label], ...].")
        rows.append((f"row {number}", item[0], item[1]))
    return rows


class _Pairs(list):
    """The (name, value) pairs of a JSON object in order, so that a name that stands twice is seen."""
