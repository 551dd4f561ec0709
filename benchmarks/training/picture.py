"""docs/training-speed.png: the parts of each step as stacked bars, fastcm beside the published step, from the rows of bench.py."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastcm.benchmarks.results_file import Row
from fastcm.benchmarks.training.step_split import PHASES
from fastcm.benchmarks.training.tables import NAMES, NETWORKS
from fastcm.generation.pictures import save_png

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "training-speed.png"
# Colours that stay apart in grey and for most colour-blind readers (Okabe and Ito).
COLOURS = dict(zip(PHASES, ("#999999", "#56B4E9", "#0072B2", "#009E73", "#F0E442", "#D55E00", "#CC79A7"), strict=True))
SCALE, LEFT, WIDTH, BAR, GAP, TOP = 2, 250, 980, 18, 6, 66


def shown_rows(content: dict) -> list[Row]:
    return [row for row in content["rows"] if row.get("op") == "step" and "error" not in row]


def digest(content: dict) -> str:
    """Names what the picture was drawn from: stored in the file, compared by a test."""
    fields = ("model", "batch", "backend", "p50_ms", *(f"{phase}_ms" for phase in PHASES))
    return hashlib.sha256(json.dumps([[row.get(field) for field in fields] for row in shown_rows(content)]).encode()).hexdigest()


def draw(content: dict) -> Image.Image:
    """One group of bars per network and batch; a bar's length is time per image as a share of the published step's."""
    groups: dict[tuple, list[Row]] = {}
    for row in shown_rows(content):
        groups.setdefault((row["model"], row["batch"]), []).append(row)
    height = TOP + sum(2 * (BAR + GAP) + len(rows) * (BAR + GAP) for rows in groups.values()) + 40
    image = Image.new("RGB", (SCALE * WIDTH, SCALE * height), "white")
    canvas = ImageDraw.Draw(image)
    _legend(canvas)
    longest = max((_bar(row, rows) for rows in groups.values() for row in rows), default=1.0)
    unit = (WIDTH - LEFT - 110) / longest
    y = TOP
    for (model, batch), rows in groups.items():
        _text(canvas, 10, y, f"{NETWORKS[model]}, batch {batch}", size=15)
        y += BAR + GAP + 2
        for row in sorted(rows, key=lambda row: list(NAMES).index(row["backend"])):
            _text(canvas, 24, y, NAMES[row["backend"]], size=13)
            x = float(LEFT)
            whole = sum(row[f"{phase}_ms"] for phase in PHASES)
            for phase in PHASES:
                length = unit * _bar(row, rows) * row[f"{phase}_ms"] / whole
                canvas.rectangle([SCALE * x, SCALE * y, SCALE * (x + length), SCALE * (y + BAR)], fill=COLOURS[phase])
                x += length
            _text(canvas, x + 8, y, f"{row['p50_ms']:.4g} ms", size=13)
            y += BAR + GAP
        y += BAR + GAP
    return image


def _bar(row: Row, rows: Sequence[Row]) -> float:
    """The step's time over the slowest of its group."""
    return row["p50_ms"] / max(other["p50_ms"] for other in rows)


def _legend(canvas: ImageDraw.ImageDraw) -> None:
    _text(canvas, 10, 8, "Where a training step's time goes; each group is scaled to its slowest step", size=16)
    x = 10.0
    for phase, colour in COLOURS.items():
        canvas.rectangle([SCALE * x, SCALE * 38, SCALE * (x + 14), SCALE * 52], fill=colour)
        _text(canvas, x + 20, 36, phase, size=13)
        x += 34 + 8 * len(phase) + 16


def _text(canvas: ImageDraw.ImageDraw, x: float, y: float, text: str, *, size: int) -> None:
    canvas.text((SCALE * x, SCALE * y), text, fill="black", font=ImageFont.load_default(SCALE * size))


def write(content: dict, path: Path = PICTURE) -> None:
    save_png(path, draw(content), text={"rows": digest(content)})


def is_current(content: dict, path: Path = PICTURE) -> bool:
    return path.is_file() and Image.open(path).text.get("rows") == digest(content)
