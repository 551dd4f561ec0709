"""The JSON file of a benchmark: a description of the machine and rows, complete after every row that was measured."""

import json
import os
import platform
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastcm
from fastcm.errors import InputError

Row = dict[str, Any]
PACKAGES = ("torch", "triton", "numpy", "diffusers", "onnxruntime", "onnxruntime-gpu")
# What may differ between two calls that fill one file.
MOMENT = ("commit", "date", "fastcm")


def machine() -> Row:
    """Versions, processor, driver, commit and date; None for what this machine does not have or does not tell."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "fastcm": fastcm.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


class ResultsFile:
    """Rows in measuring order. identity: the fields that make two rows the same one, of which the later replaces the earlier.

    path: read where it exists, so that a benchmark goes on where it stopped; None keeps the rows in memory. Raises InputError for a
    file of another form, or of another machine: figures of two machines do not belong in one table.
    """

    def __init__(self, path: Path | None, *, identity: tuple[str, ...]):
        self.path, self.identity = path, identity
        self.machine, self.rows = machine(), []
        if path is not None and path.exists():
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            stored, self.rows = content["machine"], list(content["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a results file in --json: {self.path} ({error}). Give another name.") from None
        for field, value in self.machine.items():
            if field not in MOMENT and stored.get(field) != value:
                change = f"{field} {stored.get(field)} -> {value}"
                raise InputError(f"results of another machine in --json: {self.path} ({change}). Give another name.")
        self.commit, self.machine = self.machine["commit"], stored

    def find(self, row: Row) -> Row | None:
        """The stored row of the same identity that has figures; one that failed is measured again."""
        return next((known for known in self.rows if self._same(known, row) and "error" not in known), None)

    def add(self, *rows: Row) -> None:
        """Takes the rows in and writes the file. Rows measured at another commit than the file's first carry theirs."""
        commit = getattr(self, "commit", self.machine["commit"])
        for row in rows:
            if commit != self.machine["commit"]:
                row = {**row, "commit": commit}
            self.rows = [known for known in self.rows if not self._same(known, row)] + [row]
        if self.path is not None:
            self._write()

    def _same(self, a: Row, b: Row) -> bool:
        return all(a.get(field) == b.get(field) for field in self.identity)

    def _write(self) -> None:
        """One line per row, so that a difference between two files names the row; through a temporary name, so never half a file."""
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows)
        text = f'{{"machine": {json.dumps(self.machine, indent=1, ensure_ascii=False)},\n"rows": [\n{lines}\n]}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path)


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+changes" where tracked files differ from it; None for an installed package."""
    here = str(Path(__file__).resolve().parent)
    commit = _answer("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    if commit is None or _answer("git", "-C", here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    changes = _answer("git", "-C", here, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)*.json")
    return f"{commit}+changes" if changes else commit


def _answer(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else ""
