"""The two kinds of error that users see, each one line that names the option or file, its value and the remedy."""

import difflib
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterable

# What numpy and zipfile raise at damaged, encrypted or absurd .npy and .npz files.
ARRAY_FILE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)


class InputError(ValueError):
    """What the user gave cannot be used: `<what> in <file or option>: <value>. <remedy>`. The command line exits with 2."""


class RunError(RuntimeError):
    """The work failed while running (out of memory, disk full, non-finite loss). The command line exits with 1."""


class PeerError(RunError):
    """Another process of the run failed first and has said why; this one ends with the same exit code and says nothing."""

    def __init__(self, rank: int, code: int):
        super().__init__(f"process {rank} of the run failed. Its own line says why.")
        self.code = code


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the choice closest to `word`, or the empty string where none is close."""
    matches = difflib.get_close_matches(str(word), list(choices), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def check_given(name: str, value: object) -> None:
    """InputError where an option's value is empty text or an empty path, which would silently mean the current folder."""
    if isinstance(value, str) and not value.strip():
        raise InputError(f"empty value in {name}: {value!r}. Give one, or leave it out.")


def reason_of(error: BaseException | str, *, limit: int = 300) -> str:
    """What a library's error says, in one line of `limit` characters at most; of a failed C++ compiler, that line of its output."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    line = lines[0]
    if re.search(r"CppCompileError|InvalidCxxCompiler|C\+\+ compile error", f"{type(error).__name__} {text[:2000]}"):
        found = (line for line in lines[1:] if re.search(r"\berror:|not found|No such file|[Nn]o working", line))
        line = f"no working C++ compiler: {next(found, lines[0])}"
    return line[:limit].rstrip(". ")


def shown(value: object) -> str:
    """A value for a message, 80 characters at most; None is null, as configuration files write it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
