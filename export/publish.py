"""Files that get their names together, after every check, or not at all; and the manifest that says what was checked."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import fastcm
from fastcm.errors import InputError

FORMAT, VERSION = "fastcm-onnx", 1
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx-cu12-libs", "tensorrt-rtx-cu13-libs")


@contextlib.contextmanager
def staging(out: Path, *, option: str) -> Iterator[Path]:
    """A folder on the file system of `out` that is gone afterwards, whatever happens."""
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    try:
        folder = Path(tempfile.mkdtemp(prefix=".tmp-export-", dir=place))
    except OSError as error:
        raise InputError(f"cannot write in {place}: {error.strerror}. Choose another place for {option}.") from None
    try:
        yield folder
    except OSError as error:
        if not str(error.filename or folder).startswith(str(folder)):
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(out)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, out: Path) -> None:
    """Renames the checked files into place, the one that names the others last."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.iterdir(), key=lambda file: (file.name == out.name, file.name))
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(file, out.with_name(file.name))
    data = beside(out, ".data")
    if data.name not in [file.name for file in files]:
        data.unlink(missing_ok=True)  # of a larger model that stood here before


def beside(out: Path, ending: str) -> Path:
    """The name of what belongs to `out`: its whole name and the ending, so that m.onnx and m.pt2 have one each."""
    return out.with_name(f"{out.name}{ending}")


def manifest_path(out: Path) -> Path:
    return beside(out, ".manifest.json")


def write_manifest(folder: Path, out: Path, content: dict[str, Any], *, form: tuple[str, int] = (FORMAT, VERSION)) -> None:
    """`content` after `form`, the versions of what wrote it, and size and sha256 of every file in the folder. No dates: equal exports
    give equal manifests. form: the manifest's format and its version."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
    versions = {"fastcm": fastcm.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    whole = {"format": form[0], "version": form[1], "files": files, "versions": versions, **content}
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / manifest_path(out).name).write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
