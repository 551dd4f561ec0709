"""What a source of pictures holds before any pixel is decoded: the files of a folder, the members of a zip, the samples of tar shards."""

import hashlib
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fastcm.data import array_files, cifar, labels, tables, tar_shards
from fastcm.data.decoding import EXTENSIONS, BadImageError, ending, is_hidden, is_picture
from fastcm.data.image_cache import entry_key, stamps
from fastcm.data.labels import LABEL_FILES, MAX_CLASSES, Classes
from fastcm.data.spans import ChangedError, Span, read_span
from fastcm.errors import InputError, nearest
from fastcm.weights import hub

BUILT_IN = {"digits": 0, "emoji32": 0, "mnist": 2000}  # name: pictures at its end that are kept from training
HASHED_PICTURES = 64
SHOWN_ENDINGS = 12


@dataclass(frozen=True)
class Listing:
    """Pictures in their fixed order: by path in a folder or zip, as they lie in tar shards.

    root: the source; names: relative to it, unique; classes: see labels.py; watched: files and folders, beside the spans' own, whose
    change would change the listing; passed_over: how many files of each ending are no pictures; scratch: a folder that the spans lie in and
    that is needed until they are decoded, with their hash as identity.
    """

    root: Path
    names: Sequence[str]
    spans: Sequence[Span]
    classes: Classes
    watched: Sequence[str] = field(repr=False)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    scratch: Path | None = None
    identity: str | None = None

    @property
    def notes(self) -> list[str]:
        """What a person should know before training: where the classes are from, and what was passed over."""
        labels, _, how = self.classes
        from_where = [] if not how else [f"no classes: {how}"] if labels is None else [f"classes by {how}"]
        return [*from_where, *passed_over(self.passed_over)]

    def content(self, resolution: int | None, channels: int | None) -> Iterator[object]:
        """What decides the pixels and labels: names, sizes, times (checksums in a zip), the bytes of some pictures. Not where they lie."""
        yield resolution if channels is None else (resolution, channels)
        if self.identity is not None:
            yield self.identity
        for name, span in zip(self.names, self.spans, strict=True):
            yield f"{name}\0{span.size}\0{span.mtime_ns if span.crc < 0 else span.crc}"
        if self.classes.labels is not None:
            yield self.classes.names
            yield hashlib.sha256(self.classes.labels.astype("<i8")).hexdigest()
        for span in self.spans[:: -(-len(self.spans) // HASHED_PICTURES)]:
            try:
                yield hashlib.sha256(read_span(span)).hexdigest()
            except (BadImageError, ChangedError) as error:
                yield error

    def sample(self, count: int) -> list[str]:
        """The paths of up to `count` pictures, evenly spaced, that are files of their own."""
        if self.scratch is not None or self.spans[0].path in self.watched:
            return []
        return [span.path for span in self.spans[:: -(-len(self.spans) // count)]]

    def shown(self, row: int) -> str:
        """The picture's name in a message."""
        return f"{self.root}:{self.names[row]}" if self.root.is_file() else str(self.root / self.names[row])


def list_folder(root: Path, *, labels_file: Path | None = None, limit: int = MAX_CLASSES) -> Listing:
    """Lists the pictures below `root`. Names beginning with "." are passed over; linked folders are followed, each once.

    labels_file: a CSV or JSON of labels; None takes labels.csv, labels.json or dataset.json at the top where there is one. limit: labels
    of such a file stay below it. Raises InputError for a folder without pictures.
    """
    found, folders, others = {}, [], Counter()
    for path, status in _walk(str(root), folders, others):
        name = os.path.relpath(path, root).replace(os.sep, "/")
        if _is_wanted(name):
            found[name] = Span(path, 0, status.st_size if status else 0, status.st_mtime_ns if status else 0)
        else:
            others[ending(name)] += 1
    return _listing(root, found, others, folders, labels_file, limit)


def list_zip(path: Path, *, labels_file: Path | None = None, limit: int = MAX_CLASSES) -> Listing:
    """Lists the pictures in a zip archive by the rules of list_folder; members stay where they are. Raises InputError."""
    mtime_ns = path.stat().st_mtime_ns
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"unreadable zip in --data: {path} ({error}). Copy it again.") from error
    found: dict[str, Span] = {}
    others = Counter()
    for member in members:
        name = _member_name(member)
        if not name or name.endswith("/"):
            continue
        name = str(PurePosixPath(name))
        if not _is_wanted(name) or is_hidden(name):
            others["hidden" if is_hidden(name) else ending(name)] += 1
            continue
        if name in found:
            raise InputError(f"two members of one name in --data: {path}: {name}. Rename one of them.")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "encrypted" if member.flag_bits & 1 else f"compressed by method {member.compress_type}"
            raise InputError(f"a member that is {kind} in --data: {path}: {name}. Write it stored or deflated.")
        full_size = member.file_size if member.compress_type == zipfile.ZIP_DEFLATED else -1
        found[name] = Span(str(path), member.header_offset, member.compress_size, mtime_ns, full_size, member.CRC)
    return _listing(path, found, others, [str(path)], labels_file, limit)


def _member_name(member: zipfile.ZipInfo) -> str:
    """With "/" between folders, as Windows' own tools do not write it, and as UTF-8 where its bytes are that, flagged or not."""
    name = member.filename.replace("\\", "/")
    if member.flag_bits & 0x800:
        return name
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def list_tar(root: Path, shards: Sequence[Path], *, limit: int = MAX_CLASSES) -> Listing:
    """Lists the pictures of tar shards; see tar_shards.py. Raises InputError."""
    others = Counter()
    names, spans, classes = tar_shards.list_shards(list(shards), others, limit=limit)
    if not names:
        raise InputError(f"no picture in --data: {root} ({len(shards)} shards). Accepted extensions: {' '.join(EXTENSIONS)}.")
    if root.is_dir():
        files = [entry.name for entry in _sorted_entries(str(root)) if root / entry.name not in shards]
        others.update(map(ending, files))
    return Listing(root, names, spans, classes, [str(shard) for shard in shards], others)


def list_table(root: Path, table: tables.Table, columns: tables.Columns, watched: Sequence[str], cache: Path) -> Listing:
    """Lists the pictures of a table, its rows, after copying them into the cache; see tables.py. Raises InputError."""
    image, label = tables.chosen_columns(table, columns)
    classes = Classes(None, None) if label is None else tables.read_classes(table, label)
    packed = tables.pack(table, image, cache, entry_key(["pack", root, image, *stamps(watched)]))
    if not packed.spans:
        raise InputError(f"no picture in --data: {root} (0 rows). Give a table with rows.")
    names = [f"row {row}" for row in range(len(packed.spans))]
    return Listing(root, names, packed.spans, classes, watched, scratch=packed.folder, identity=packed.identity)


def _listing(root: Path, found: dict[str, Span], others: Counter, watched: list[str], labels_file: Path | None, limit: int) -> Listing:
    """Orders the pictures and gives them their classes. Where all lie below one sub-folder, that one stands for the source."""
    names = sorted(filter(is_picture, found), key=lambda name: name.split("/"))
    if not names:
        seen = len(found) + others.total()
        raise InputError(f"no picture in --data: {root} ({seen} files seen). Accepted extensions: {' '.join(EXTENSIONS)}.")
    label_files = [name for name in found if not is_picture(name)]
    common = _common_folder(names)
    spans = [found[name] for name in names]
    beside = [] if labels_file is not None else [name for name in label_files if name[: name.rfind("/") + 1] in ("", common)]
    if len(beside) > 1:
        raise InputError(f"several files of labels in --data: {root}: {', '.join(beside)}. Keep one.")
    others.update(ending(name) for name in label_files if name not in beside)
    if labels_file is not None:
        span = Span(str(labels_file), 0, *_size_and_time(labels_file))
        classes = _from_file(span, str(labels_file), names, limit)
        watched = [*watched, span.path]
    elif beside:
        span = found[beside[0]]
        where = f"{root}{':' if span.crc >= 0 else '/'}{beside[0]}"
        inside = beside[0].rfind("/") + 1
        classes = _from_file(span, where, [name[inside:] for name in names], limit)
        watched = [*watched, span.path]
    elif others[".cls"]:
        remedy = "Pack it (tar -cf x.tar -C FOLDER .), since tar shards have them read, or write a labels.csv, or take them away."
        raise InputError(f"labels as .cls files in --data: {root} ({others['.cls']:,} of them). {remedy}")
    else:
        classes = labels.from_names([name[len(common) :] for name in names], root)
    return Listing(root, names, spans, classes, watched, others)


def _from_file(span: Span, where: str, names: Sequence[str], limit: int) -> Classes:
    try:
        content = read_span(span)
    except BadImageError as error:
        raise InputError(f"unreadable file of labels: {where} ({error}). Copy it again.") from None
    return labels.from_file(content, where, names, limit=limit)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"unreadable file of labels: {path} ({error.strerror}). Give a CSV or JSON.") from None
    return status.st_size, status.st_mtime_ns


def _common_folder(names: Sequence[str]) -> str:
    """The folders that all of the names share, with the last "/"."""
    common = os.path.commonprefix([min(names), max(names)])
    return common[: common.rfind("/") + 1]


def _is_wanted(name: str) -> bool:
    return is_picture(name) or name.rpartition("/")[2].lower() in LABEL_FILES


def passed_over(others: Mapping[str, int]) -> list[str]:
    """A line of what is no picture, by ending, the most frequent first; none where all are pictures."""
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count:,} {what}" for what, count in most[:SHOWN_ENDINGS])
    return [f"passed over: {shown}{', …' if len(most) > SHOWN_ENDINGS else ''}"] if most else []


def _walk(root: str, folders: list[str], others: Counter) -> Iterator[tuple[str, os.stat_result | None]]:
    """(path, status) of every visible file below root, None for a broken link.

    `folders` receives every folder that was read, `others` the number of hidden files and folders.
    """
    visited, waiting = set(), [root]
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.append(folder)
        for entry in _sorted_entries(folder, others):
            try:
                status = entry.stat()
            except OSError:
                status = None
            if status is not None and stat.S_ISDIR(status.st_mode):
                waiting.append(entry.path)
            else:
                yield entry.path, status


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in _sorted_entries(str(folder))] if folder.is_dir() else []


def _sorted_entries(folder: str, others: Counter | None = None) -> Iterable[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"unreadable folder in --data: {folder} ({error.strerror}). Correct its permissions.") from None
    visible = [entry for entry in found if not is_hidden(entry.name)]
    if others is not None and len(visible) < len(found):
        others["hidden"] += len(found) - len(visible)
    return visible


KINDS = (
    "Give a folder or zip of pictures, an .npz or .npy, IDX files, a .parquet, CIFAR-10's batches, SVHN's .mat, "
    "tar shards (train-{000..146}.tar), hf:owner/name, "
    f"or a built-in set: {', '.join(BUILT_IN)}."
)


@dataclass(frozen=True)
class Source:
    """What `--data` names, before it is read. files: what it was given as, for arrays the pictures and, where it lies apart, the file of
    labels; a kind other than folder, zip, tar and table holds arrays. columns: of a table; table: one that is open already."""

    kind: str
    root: Path
    files: tuple[Path, ...]
    labels_file: Path | None
    limit: int
    columns: tables.Columns = tables.FOUND
    table: tables.Table | None = None

    @property
    def name(self) -> str:
        name = self.root.resolve().name if self.kind == "folder" else self.root.name.partition(".")[0]
        return re.sub(r"[^\w .-]+", "-", name).strip("-. ") or "root"

    @property
    def has_pictures(self) -> bool:
        return self.kind in ("folder", "zip", "tar", "table")

    def key(self, resolution: int | None, channels: int | None) -> str:
        """The key by which the cache remembers what this source was at a resolution and number of channels."""
        form = resolution if channels is None else (resolution, channels)
        options = [self.labels_file and self.labels_file.resolve(), self.limit, form, *(self.columns if any(self.columns) else ())]
        return entry_key(["source", self.kind, *self.files, *options, *([self.root] if self.table else ())])

    def listing(self, cache: Path) -> Listing:
        """Lists the pictures; seconds for a million. cache: where those of a table are copied. Raises InputError."""
        if self.kind == "table":
            return list_table(self.root, self.table or tables.open_table(self.files), self.columns, list(map(str, self.files)), cache)
        if self.kind == "tar":
            return list_tar(self.root, self.files, limit=self.limit)
        return (list_zip if self.kind == "zip" else list_folder)(self.root, labels_file=self.labels_file, limit=self.limit)


def find(source: str, *, labels_file: Path | None = None, limit: int = MAX_CLASSES, columns: tables.Columns = tables.FOUND) -> Source:
    """Says what a path or pattern is, by its name and, for a folder, by what lies in it. Raises InputError for what is no data set."""
    path = Path(source)
    lower = path.name.lower()
    kind, files, table = None, (path,), None
    if source.startswith(hub.PREFIX):
        kind, (table, files) = "table", tables.open_hub(source)
    elif path.is_dir():
        kind, files = _kind_of_folder(path)
    elif path.is_file():
        kinds = {".npz": "npz", ".npy": "npy", ".mat": "mat", ".zip": "zip", ".tar": "tar", ".parquet": "table"}
        kind = "cifar" if lower.endswith((".tar.gz", ".tgz")) else "idx" if array_files.is_idx(lower) else kinds.get(path.suffix.lower())
    elif lower.endswith((".tar", ".parquet")) and any(c in source for c in "{*?["):
        kind, files = "tar" if lower.endswith(".tar") else "table", tuple(tar_shards.expand(source))
    if kind is None:
        what = "not a data set" if path.exists() else "no such file or folder"
        raise InputError(f"{what} in --data: {source}. {KINDS}{nearest(source, BUILT_IN)}")
    if kind in ("npy", "idx") and labels_file is None:
        labels_file = array_files.labels_beside(files[0])
    if kind in ("npy", "idx") and labels_file is not None:
        _size_and_time(labels_file)
        files, labels_file = (*files, labels_file), None
    if labels_file is not None and kind not in ("folder", "zip"):
        raise InputError(f"a file of labels for a source that carries its own: {labels_file} with --data {source}. Leave it out.")
    if any(columns) and kind != "table":
        raise tables.no_columns(columns, source)
    # A file of arrays is read by its name, which the target of a link may not have.
    files = tuple(file.resolve() if kind in ("folder", "zip", "tar", "table") else file.absolute() for file in files)
    return Source(kind, path, files, labels_file, limit, columns, table)


def _kind_of_folder(path: Path) -> tuple[str, tuple[Path, ...]]:
    """cifar, idx or table where it holds files of these kinds, tar where shards lie at its top and no pictures, else folder."""
    batches = cifar.files_of(path)
    if batches is not None:
        return "cifar", tuple(batches)
    names = [entry.name for entry in _sorted_entries(str(path))]
    for folder, inside in ((path, names), (path / "raw", _names_in(path / "raw") if "raw" in names else [])):  # raw: torchvision's layout
        images = array_files.idx_images(folder, inside)
        if images is not None:
            return "idx", (images,)
    arrow = tables.arrow_folder(path, names)
    if arrow is not None:
        return "table", (arrow / "state.json", *sorted(arrow.glob("*.arrow")))
    if any(map(is_picture, names)):
        return "folder", (path,)
    for folder, inside in ((path, names), (path / "data", _names_in(path / "data") if "data" in names else [])):  # data: as on the hub
        if any(name.lower().endswith(".parquet") for name in inside):
            return "table", tables.parquet_files(folder, inside)
    shards = [name for name in names if name.lower().endswith(".tar")]
    if shards:
        return "tar", tuple(path / name for name in shards)
    return "folder", (path,)
