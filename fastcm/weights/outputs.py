"""Outputs that are complete or absent: written under a temporary name, renamed at the end, removed after an error, which names them."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete_or_absent(path: Path, *, parents: bool = True) -> Iterator[Path]:
    """A temporary path to write to, flushed to disk and renamed to `path` at the end. parents: folders above it are made.

    An OSError of the file names `path`; after any error neither the temporary file nor a folder that was made for it is left.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with _made_parents(path, parents), _named(path, temporary):
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, whose files get their places in `path` once all are written. Other files there stay as they are."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with _made_parents(path, True), _named(path, temporary):
        try:
            temporary.mkdir()
            yield temporary
            if not path.exists():
                os.replace(temporary, path)
                return
            for file in sorted(file for file in temporary.rglob("*") if file.is_file()):
                place = path / file.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _made_parents(path: Path, wanted: bool) -> Iterator[None]:
    """Makes the folders above `path`; those that it made are gone again after an error."""
    made = [folder for folder in path.parents if wanted and not folder.exists()]
    try:
        if made:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """An OSError without a file, or of a temporary one, becomes the output's."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or temporary)
        if not where.startswith(str(temporary)):
            raise
        reason = error.strerror or str(error) or "failed"
        raise OSError(error.errno or errno.EIO, reason, str(path) + where.removeprefix(str(temporary))) from error


def _flush(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
