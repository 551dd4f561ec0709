"""`fastcm info RUN --watch`: a run's loss, speed, time left and newest samples, drawn again while it trains."""

import json
import os
import re
import socket
import sys
import time
from pathlib import Path

from fastcm.errors import InputError

EVERY_S, FRESH_S = 2.0, 120.0
BAR = 40


def watch(folder: Path, *, every_s: float = EVERY_S) -> int:
    """Draws until the run is at its end, or nobody trains it. Raises InputError for a folder that is no run."""
    from fastcm.api import is_run_folder

    if not is_run_folder(folder):
        raise InputError(f"no run to watch in fastcm info --watch: {folder}. Give the run folder that fastcm train writes (--out).")
    drawn = 0
    while True:
        lines, is_over = describe(folder)
        if sys.stdout.isatty() and drawn:
            print(f"\x1b[{drawn}F\x1b[J", end="")  # over the lines before
        print("\n".join(lines), flush=True)
        drawn = len(lines)
        if is_over:
            return 0
        time.sleep(every_s)


def describe(folder: Path) -> tuple[list[str], bool]:
    """The lines of one drawing, and whether it is the last."""
    total = round(json.loads((folder / "config.json").read_text(encoding="utf-8"))["duration_kimg"] * 1000)
    rows = read_rows(folder / "log.jsonl")
    last = next((row for row in reversed(rows) if "loss" in row), None)
    measured = next((row for row in reversed(rows) if "score" in row), None)
    nimg = 0 if last is None else last["nimg"]
    trains = nimg < total and is_trained(folder)
    share = min(1.0, nimg / total)
    state = "trains" if trains else "finished" if nimg >= total else "stopped; the same train command resumes it"
    lines = [f"run      {folder} ({state})"]
    lines.append(f"images   {'#' * round(share * BAR):.<{BAR}} {nimg / 1000:g} of {total / 1000:g} kimg, {share:.1%}")
    if last is None:
        lines.append("loss     no line in log.jsonl yet")
    else:
        left = (total - nimg) / last["images_per_s"] if trains and last["images_per_s"] else 0
        lines.append(f"loss     {last['loss']:.4g}  gradient {last['grad_norm']:.3g}  skipped {last['skipped']}")
        lines.append(f"speed    {last['images_per_s']:,.0f} images/s, {duration(left)} left")
    if measured is not None:
        lines.append("measured " + "  ".join(f"{name} {value:.4g}" for name, value in measured.items() if name != "nimg"))
    grids = sorted((folder / "samples").glob("nimg-*.png"))
    lines.append(f"samples  {grids[-1] if grids else 'none yet'}")
    return lines, not trains


def read_rows(log: Path) -> list[dict]:
    """The rows of log.jsonl; a line that is being written is left out."""
    rows = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def is_trained(folder: Path) -> bool:
    """Whether the process that the run's lock names is there; of another machine's, whether the log was written of late.

    The lock itself is left alone: to try it would keep out a trainer that starts at that moment.
    """
    try:
        match = re.fullmatch(r"pid (\d+) on (\S+)", (folder / ".lock").read_text(encoding="utf-8").strip())
        if match is None:
            return False
        if match[2] != socket.gethostname():
            return time.time() - (folder / "log.jsonl").stat().st_mtime < FRESH_S
        os.kill(int(match[1]), 0)
    except PermissionError:  # another user's process
        return True
    except (OSError, ValueError):
        return False
    return True


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 2:03:04."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
