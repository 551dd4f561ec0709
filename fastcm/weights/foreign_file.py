"""What a file of weights really is, from its first bytes, and how a wrong one is refused."""

from pathlib import Path
from typing import NoReturn

from fastcm.errors import InputError
from fastcm.networks import patches

HEAD_BYTES = 512


def check_file(path: Path, *, expected: str) -> None:
    """Raises InputError where `path` is missing, empty, a web page or a Git LFS pointer. expected: e.g. "an OpenAI checkpoint (.pt)"."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"not {expected} in {path}: {kind}. Give the path of the file.")
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    start = head.lstrip().lower()
    if not head:
        raise InputError(f"not {expected} in {path}: the file is empty. Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"not {expected} in {path}: a Git LFS pointer. Run `git lfs pull` in its repository.")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"not {expected} in {path}: a web page. The download failed; fetch the file itself.")


def refuse(
    path: Path, *, expected: str, reason: object, remedy: str = "Download the file again, or check where it comes from."
) -> NoReturn:
    """Raises InputError with the first line of `reason`: the file begins well but cannot be read."""
    line = str(reason).strip().splitlines()[0][:160] if str(reason).strip() else type(reason).__name__
    raise InputError(f"not {expected} in {path}: {line.rstrip('.')}. {remedy}") from None


def require_plain(config, form: str) -> None:
    """Raises InputError for a network of patches, with padded images or with a second time, which no other format has.

    form: the format's name.
    """
    if getattr(config, "second_time", None) is not None:
        raise InputError(f"no {form} form in network.second_time: {config.second_time}. Its networks know one time; use fastcm's own.")
    require_untold(config, form)
    if not patches.is_plain(config):
        name = "patch" if config.patch > 1 else "resolution"
        value = getattr(config, name)
        raise InputError(f"no {form} form in network.{name}: {value}. Its layers see images whole and halve them evenly; use fastcm's own.")


def require_untold(config, form: str) -> None:
    """Raises InputError for a network that is told a guidance weight, which no other format has. form: the format's name."""
    if getattr(config, "default_guidance", None) is not None:
        remedy = "Export it at one weight with --onnx --guidance W, or use fastcm's own."
        raise InputError(f"no {form} form in network.default_guidance: {config.default_guidance}. {remedy}")


def refuse_keys(path: Path, *, expected: str, keys: list[str], remedy: str) -> NoReturn:
    """Raises InputError naming the first three keys that do not fit."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    raise InputError(f"not {expected} in {path}: unexpected keys {', '.join(keys[:3])}{more}. {remedy}")
