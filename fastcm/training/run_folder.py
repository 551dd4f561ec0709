"""One training run on disk: its settings, its log, its lock. One trainer per folder."""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path

from fastcm.errors import InputError, RunError
from fastcm.training.resumed_settings import check_resumed
from fastcm.weights.model_folder import read_json, write_json

FORMAT, VERSION = "fastcm-run", 1
CONFIG_NAME, LOG_NAME, LOCK_NAME = "config.json", "log.jsonl", ".lock"


def is_run_folder(path: Path) -> bool:
    config = path / CONFIG_NAME
    return config.is_file() and read_json(config).get("format") == FORMAT


def settings_in(path: Path) -> dict | None:
    """The settings of the run that stands there, None where nothing does. InputError for what is no run."""
    if not path.exists():
        return None
    if not path.is_dir():
        raise InputError(f"not a folder in --out: {path}. Choose another --out.")
    if not (path / CONFIG_NAME).exists():
        foreign = [p.name for p in path.iterdir() if p.name != LOCK_NAME]
        if foreign:
            raise InputError(f"folder of something else in --out: {path} (holds {foreign[0]}). Choose an empty or new folder.")
        return None
    old = read_json(path / CONFIG_NAME)
    if old.pop("format", None) != FORMAT or old.pop("version", None) != VERSION:
        raise InputError(f"not a run of this fastcm in --out: {path}. Choose another --out.")
    return old


class RunFolder:
    """`config.json`, `log.jsonl`, `samples/`, `checkpoints/`, `snapshots/`, `model/`.

    Opening it takes the folder's lock, and writes the settings or checks that they are the run's.
    """

    def __init__(self, path: Path, settings: dict):
        """settings: the run's config and facts of its data. InputError where another run, other settings or other files stand there."""
        self.path = path
        self.notes: list[str] = []
        existing = self._check_existing(settings)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115 - held until the run ends
        except OSError as error:
            raise InputError(f"cannot write in --out: {path} ({error.strerror}). Choose a folder you may write to.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise InputError(f"another trainer is at work in --out: {path} ({holder}). Wait for it, or choose another --out.") from None
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        if existing != settings:
            write_json(path / CONFIG_NAME, {"format": FORMAT, "version": VERSION, **settings})

    def _check_existing(self, settings: dict) -> dict | None:
        old = settings_in(self.path)
        if old is None:
            return None
        try:
            self.notes += check_resumed(old, settings, self.path)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"broken settings in {self.path / CONFIG_NAME}: {error}. Restore the file from a copy.") from None
        return old

    def check_present(self) -> None:
        """RunError where the folder was taken away under the run: what is written later would not be a run."""
        if not (self.path / CONFIG_NAME).is_file():
            raise RunError(f"run folder gone while training in --out: {self.path}. Put it back, and run the same command again.")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def append_log(self, row: dict) -> None:
        try:
            with open(self.path / LOG_NAME, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"log not written in {self.path}: {error.strerror}. Give the run its folder back, with room in it.") from error

    def read_log(self) -> list[dict]:
        """The rows of log.jsonl; a half-written last line is left out."""
        rows = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / LOG_NAME).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
        return rows

    def cut_log(self, nimg: int) -> None:
        """Drops the rows after `nimg`: they belong to steps that a resumed run takes again."""
        rows = [row for row in self.read_log() if row.get("nimg", 0) <= nimg]
        temporary = self.path / f".tmp-{LOG_NAME}"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, self.path / LOG_NAME)

    def close(self) -> None:
        self._lock.close()
