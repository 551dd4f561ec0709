"""Where a run's figures go beside its folder: TensorBoard, Weights & Biases, Trackio, or an object of the user's own."""

import importlib
import json
import os
import secrets
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fastcm.errors import InputError, nearest


class RunLog(Protocol):
    """What receives a run's figures, in the writer's process. A method that it lacks is passed over.

    begin: once, before the first step; config is the run's config.json, nimg the images seen where it is resumed. scalars: at each log line
    and after each measurement, figures by name. picture: a new grid of samples, a PNG. end: however the run ends.
    """

    def begin(self, *, folder: Path, config: dict[str, Any], nimg: int) -> None: ...
    def scalars(self, values: dict[str, float], nimg: int) -> None: ...
    def picture(self, path: Path, nimg: int) -> None: ...
    def end(self) -> None: ...


class TensorBoard:
    """Event files in the run's tensorboard/; what a resumed run takes again is purged."""

    def begin(self, *, folder: Path, config: dict[str, Any], nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=nimg)
        if nimg == 0:
            self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, nimg)

    def picture(self, path: Path, nimg: int) -> None:
        pixels = np.asarray(Image.open(path))
        self.writer.add_image("samples", pixels, nimg, dataformats="HWC" if pixels.ndim == 3 else "HW")

    def end(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases, by its own settings (WANDB_MODE, WANDB_PROJECT, ...), in the run's wandb/; a resumed run is the same one there."""

    def begin(self, *, folder: Path, config: dict[str, Any], nimg: int) -> None:
        import wandb

        place = folder / "wandb"
        place.mkdir(exist_ok=True)
        known = place / "run-id.txt"
        if not known.is_file():
            known.write_text(secrets.token_hex(4), encoding="ascii")
        project = os.environ.get("WANDB_PROJECT", "fastcm")
        identity = {"id": known.read_text(encoding="ascii").strip(), "resume": "allow"}
        self.module, self.run = wandb, wandb.init(project=project, name=folder.name, dir=str(folder), config=config, **identity)
        self.run.define_metric("*", step_metric="nimg")

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        self.run.log({**values, "nimg": nimg})

    def picture(self, path: Path, nimg: int) -> None:
        self.run.log({"samples": self.module.Image(str(path)), "nimg": nimg})

    def end(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio's local dashboard, by its own settings (TRACKIO_DIR, ...); a resumed run is the same one there."""

    def begin(self, *, folder: Path, config: dict[str, Any], nimg: int) -> None:
        self.module = importlib.import_module("trackio")
        self.module.init(project=os.environ.get("TRACKIO_PROJECT", "fastcm"), name=folder.name, config=config, resume="allow")

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        self.module.log({**values, "nimg": nimg})

    def picture(self, path: Path, nimg: int) -> None:
        self.module.log({"samples": self.module.Image(str(path)), "nimg": nimg})

    def end(self) -> None:
        self.module.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def chosen_logs(chosen: str | RunLog | Iterable[str | RunLog] | None) -> list[RunLog]:
    """The logs of `--log`: names with commas between, or a list of names and objects; None is TensorBoard where it is installed.

    Raises InputError for another name, and for a package that is missing.
    """
    if chosen is None:
        return [TensorBoard()] if find_spec("tensorboard") is not None else []
    if isinstance(chosen, str):
        chosen = [] if chosen == "none" else [name.strip() for name in chosen.split(",")]
    elif not isinstance(chosen, Sequence):
        chosen = [chosen]
    logs = []
    for log in chosen:
        if isinstance(log, str):
            if log not in KINDS:
                raise InputError(f"unknown value in --log: {log}. Use some of {', '.join(KINDS)}, or none.{nearest(log, KINDS)}")
            if find_spec(log) is None:
                raise InputError(f"missing package for --log: {log}. pip install {log}.")
            log = KINDS[log]()
        logs.append(log)
    return logs


class RunLogs:
    """Several logs as one. One that fails is named on stderr and left out: a run does not end because a dashboard did."""

    def __init__(self, logs: Sequence[RunLog]):
        self.logs = list(logs)

    def begin(self, *, folder: Path, config: dict[str, Any], nimg: int) -> None:
        self._each("begin", folder=folder, config=config, nimg=nimg)

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        self._each("scalars", values, nimg)

    def picture(self, path: Path, nimg: int) -> None:
        self._each("picture", path, nimg)

    def end(self) -> None:
        self._each("end")

    def _each(self, method: str, *values: Any, **named: Any) -> None:
        for log in list(self.logs):
            try:
                receive = getattr(log, method, None)
                if receive is not None:
                    receive(*values, **named)
            except Exception as error:
                self.logs.remove(log)
                if method == "end" and isinstance(error, OSError):  # a folder that is gone has had its error
                    continue
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                print(f"fastcm: {type(log).__name__} failed at {method} ({reason}); the run goes on without it", file=sys.stderr)
