"""Tar shards in the WebDataset layout: `key.jpg` and `key.cls`, read where they lie. Nothing is unpickled or extracted.

A shard is an uncompressed tar of regular files (POSIX, pax or GNU names); a link, device, sparse file or oversized header is refused.
"""

import glob
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from fastcm.data.decoding import ending, is_hidden, is_picture
from fastcm.data.labels import MAX_CLASSES, Classes, unique_folded
from fastcm.data.spans import Span
from fastcm.errors import InputError

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # of a pax header or a long name
MAX_SHARDS = 100_000
KINDS = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a named pipe", "S": "a sparse file"}


class Member(NamedTuple):
    """A regular file inside a shard: `size` bytes at `offset`."""

    name: str
    offset: int
    size: int


def expand(pattern: str) -> list[Path]:
    """The shards that a pattern names, in order: braces (`train-{000..146}.tar`, `{a,b}`) first, then `*`, `?` and `[...]`.

    Raises InputError where one of them does not exist.
    """
    shards = []
    for path in _braces(pattern):
        found = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
        missing = next((shard for shard in found if not os.path.isfile(shard)), None if found else path)
        if missing is not None:
            raise InputError(f"no such shard in --data: {missing} (from {pattern}). Correct the pattern, or copy the file.")
        shards += [Path(shard) for shard in found]
    return shards


def _braces(pattern: str) -> Iterator[str]:
    """The pattern with every brace expanded, in order."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    count = int(np.prod([len(choice) for choice in choices], dtype=float))
    if count > MAX_SHARDS:
        raise InputError(f"too many shards in --data: {pattern} ({count:,}, {MAX_SHARDS:,} at most). Narrow the braces.")
    return ("".join(words) for words in itertools.product(*choices))


def _choices(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        return inside.split(",")
    first, last = numbers.groups()
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    if abs(int(last) - int(first)) >= MAX_SHARDS:
        raise InputError(f"too many shards in --data: {{{inside}}} ({MAX_SHARDS:,} at most). Narrow the braces.")
    step = 1 if int(last) >= int(first) else -1
    return [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]


def list_shards(shards: list[Path], others: Counter, *, limit: int = MAX_CLASSES) -> tuple[list[str], list[Span], Classes]:
    """(names `shard.tar:key.jpg`, spans, classes) of the pictures in the order in which they lie. others: counts what is neither.

    Raises InputError.
    """
    names, spans, labels = [], [], []
    for shard in shards:
        mtime_ns = shard.stat().st_mtime_ns
        for image, label in _samples(shard, limit, others):
            names.append(f"{shard.name}:{image.name}")
            spans.append(Span(str(shard), image.offset, image.size, mtime_ns))
            labels.append(label)
            if (label is None) != (labels[0] is None):
                missing = names[-1] if label is None else names[0]
                raise InputError(f"no .cls beside a picture in --data: {missing} (others have one). Give every picture one, or none.")
    if not labels or labels[0] is None:
        folders = {name.rpartition("/")[0] for name in names}
        return names, spans, Classes(None, None, "folders inside tar shards are none, .cls files are" if len(folders) > 1 else "")
    return names, spans, Classes(np.array(labels, dtype=np.int64), None, ".cls")


def _samples(shard: Path, limit: int, others: Counter) -> Iterator[tuple[Member, int | None]]:
    """(picture, label or None) of each picture of a shard. The members of one sample need not be neighbours."""
    with open(shard, "rb", buffering=0) as file:
        pictures, classes = [], []
        for member in members(file.fileno(), shard):
            member = member._replace(name=str(PurePosixPath(member.name)))
            if is_hidden(member.name):
                others["hidden"] += 1
            elif is_picture(member.name):
                pictures.append(member)
            elif ending(member.name) == ".cls":
                classes.append(member)
            else:
                others[ending(member.name)] += 1
        labels = _paired([member.name for member in pictures], [member.name for member in classes], shard)
        if len(classes) > len(labels):
            others[".cls of other fields"] += len(classes) - len(labels)
        for picture in pictures:
            place = labels.get(picture.name)
            yield picture, None if place is None else _label(file.fileno(), classes[place], shard, limit)


def _paired(pictures: Sequence[str], classes: Sequence[str], shard: Path) -> dict[str, int]:
    """The place of the label of each picture: `a.b.cls` belongs to `a.b.png`, else to A.B.PNG where that is one, else to what has this key.

    A key is WebDataset's, the name up to the first dot of its last part. Raises InputError for a label without a picture, and for two
    pictures or labels of one sample.
    """
    stems = {os.path.splitext(name)[0]: name for name in pictures}
    folded, keyed = unique_folded(stems), defaultdict(list)
    for stem, name in stems.items():
        keyed[_key(name)].append(name)
        dots = [place for place, letter in enumerate(stem) if letter == "." and place > stem.rfind("/")]
        shorter = next((stem[:dot] for dot in dots if stem[:dot] in stems), None)
        if shorter is not None:
            raise _twice(shard, shorter)
    if len(stems) < len(pictures):
        raise _twice(shard, next(stem for stem, count in Counter(os.path.splitext(name)[0] for name in pictures).items() if count > 1))
    found: dict[str, int] = {}
    for place, name in enumerate(classes):
        stem = os.path.splitext(name)[0]
        owners = [stems[stem]] if stem in stems else [stems[folded[stem.casefold()]]] if stem.casefold() in folded else keyed.get(stem, [])
        if not owners and _key(name) not in stems:
            raise InputError(f"a label without a picture in --data: {shard}: {name}. Add its picture, or remove it.")
        if len(owners) > 1 or (owners and owners[0] in found):
            raise _twice(shard, stem)
        found.update(dict.fromkeys(owners, place))
    return found


def _twice(shard: Path, key: str) -> InputError:
    return InputError(f"two pictures or labels of one key in --data: {shard}: {key}. Give each picture a key of its own.")


def _key(name: str) -> str:
    """A member's name without the extensions: up to the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _label(descriptor: int, member: Member, shard: Path, limit: int) -> int:
    text = os.pread(descriptor, min(member.size, 32), member.offset).decode("ascii", "replace").strip()
    if not re.fullmatch(r"\d{1,18}", text) or int(text) >= limit:
        raise InputError(f"label out of range in --data: {shard}:{member.name}: {text!r}. Expected a whole number from 0 to {limit - 1}.")
    return int(text)


def members(descriptor: int, shard: Path) -> Iterator[Member]:
    """The regular files of a tar, by its headers alone. Raises InputError for what is none or holds more than files and folders."""
    end = os.fstat(descriptor).st_size
    offset, long_name, pax = 0, None, {}
    while offset + BLOCK <= end:
        header = os.pread(descriptor, BLOCK, offset)
        if header == bytes(BLOCK):
            return
        size, kind = _number(header[124:136]), chr(header[156])
        if size is None or _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise InputError(f"not an uncompressed tar in --data: {shard} (damaged header at byte {offset:,}). Unpack or copy it again.")
        name = _text(header[:100])
        if header[257:262] == b"ustar" and header[257:265] != b"ustar  \0" and header[345]:
            name = f"{_text(header[345:500])}/{name}"
        offset += BLOCK
        if kind in "LxKg":
            if size > MAX_HEADER_BYTES:
                raise InputError(f"an oversized header in --data: {shard}: {size:,} bytes ({MAX_HEADER_BYTES:,} at most). Write it again.")
            body = os.pread(descriptor, size, offset)
            if kind == "L":
                long_name = _text(body)
            elif kind == "x":
                pax = _pax(body, shard)
        else:
            name, long_name = pax.get("path", long_name or name), None
            size, pax = int(pax.get("size", size)), {}
            if kind in "0\0007" and not name.endswith("/"):
                if offset + size > end:
                    raise InputError(f"truncated file in --data: {shard} (it ends inside {name}). Copy it again.")
                yield Member(name, offset, size)
            elif kind not in "5\0000":
                what = KINDS.get(kind, f"a member of type {kind!r}")
                raise InputError(f"{what} in --data: {shard}: {name}. Shards hold regular files only; write it again without.")
        offset += -(-size // BLOCK) * BLOCK
    if offset != end or end == 0:
        raise InputError(f"truncated file in --data: {shard} ({end:,} bytes). Copy it again.")


def _text(field: bytes) -> str:
    return os.fsdecode(field.partition(b"\0")[0])


def _number(field: bytes) -> int | None:
    """An octal number, or GNU's base-256; None for neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else None


def _pax(body: bytes, shard: Path) -> dict[str, str]:
    """The records `length name=value\\n` of a pax header; sparse files and other forms of size are refused."""
    records, rest = {}, body
    while rest and rest[0]:
        length = rest.partition(b" ")[0]
        if not re.fullmatch(rb"\d{1,7}", length) or not 0 < int(length) <= len(rest):
            raise InputError(f"damaged pax header in --data: {shard}. Copy it again.")
        name, _, value = rest[len(length) + 1 : int(length) - 1].partition(b"=")
        records[name.decode("utf-8", "replace")] = os.fsdecode(value)
        rest = rest[int(length) :]
    if any(name.startswith("GNU.sparse") for name in records) or not re.fullmatch(r"\d{1,18}", records.get("size", "0")):
        raise InputError(f"a sparse file in --data: {shard}. Shards hold regular files only; write it again without.")
    return records
