"""Checkpoints that are complete or absent: safetensors parts, `state.json`, then `manifest.json` with sizes and sha256, then a rename."""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

from torch import Tensor

from fastcm.errors import InputError, RunError
from fastcm.weights.model_folder import read_json, read_safetensors, write_json, write_safetensors

MANIFEST, STATE = "manifest.json", "state.json"
PREFIX, TEMPORARY = "step-", ".tmp-"


def save_checkpoint(folder: Path, *, step: int, parts: dict[str, dict[str, Tensor]], state: dict, keep: int = 3) -> Path:
    """Writes `folder/step-N` and deletes all but the newest `keep`. An error leaves the older checkpoints as they were.

    parts: named tensors by file stem. state: JSON-ready; its values and the files' bytes are functions of the run alone (no timestamps).
    """
    final = folder / f"{PREFIX}{step:09d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        _clear(temporary)
        folder.mkdir(exist_ok=True)  # in a run folder that is still there
        temporary.mkdir()
        for name, tensors in parts.items():
            write_safetensors(temporary / f"{name}.safetensors", tensors)
        write_json(temporary / STATE, state)
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"files": manifest})
        flush_folder(temporary)
        _clear(final)  # an incomplete or damaged folder of the same step
        os.replace(temporary, final)
        flush_folder(folder)
    except (OSError, RuntimeError) as error:
        needed, free = size_of(parts), shutil.disk_usage(_existing(folder)).free
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"checkpoint not written in {final}: {error} (needs {needed:,} bytes, {free:,} free). "
            "Older checkpoints are intact; free some space."
        ) from error
    for old in complete_steps(folder)[:-keep]:
        shutil.rmtree(folder / f"{PREFIX}{old:09d}")
    return final


def check_room(folder: Path, needed: int) -> None:
    """RunError where the file system of `folder` has no room for a checkpoint of `needed` bytes."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise RunError(f"no room for a checkpoint in {folder}: needs {needed:,} bytes, {free:,} free. Free some, or choose another --out.")


def size_of(parts: dict[str, dict[str, Tensor]]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensors in parts.values() for tensor in tensors.values())


def newest_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
    """Returns (parts, state) of the newest good checkpoint, or None where there has never been one.

    A damaged one is named in a warning and passed over; with none good left, RunError: a run never restarts silently.
    """
    for stale in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale, ignore_errors=True)
    steps = _all_steps(folder)
    for step in reversed(steps):
        path = folder / f"{PREFIX}{step:09d}"
        try:
            return read_checkpoint(path)
        except InputError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
    if steps:
        raise RunError(f"no good checkpoint left in {folder}: {len(steps)} damaged. Restore one, or start again in another --out.")
    return None


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Reads one checkpoint after checking every file's size and hash; InputError names the file at fault."""
    files = read_json(path / MANIFEST).get("files")
    if not isinstance(files, dict) or STATE not in files or not all(isinstance(facts, dict) for facts in files.values()):
        raise InputError(f"broken manifest in {path / MANIFEST}: no list of files. Delete the folder to resume from an older one.")
    for name, facts in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise InputError(f"missing file in {path}: {name}. Delete the folder to resume from an older one.")
        if file.stat().st_size != facts.get("bytes") or sha256(file) != facts.get("sha256"):
            raise InputError(f"damaged file in {path}: {name} (size or sha256 differs). Delete the folder to resume from an older one.")
    parts = {Path(name).stem: read_safetensors(path / name) for name in files if name.endswith(".safetensors")}
    return parts, read_json(path / STATE)


def complete_steps(folder: Path) -> list[int]:
    """The steps that have a manifest, ascending."""
    return [step for step in _all_steps(folder) if (folder / f"{PREFIX}{step:09d}" / MANIFEST).is_file()]


def _all_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix(PREFIX)) for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def read_state(path: Path) -> dict:
    """The state of one checkpoint folder, without its tensors."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))
