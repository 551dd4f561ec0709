"""A line chart as inline SVG: error bars, a level to compare with, linear or logarithmic axes; colours come from the page's style."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 42


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels from `start` to `stop`; ticks are values."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def line_chart(
    points: Sequence[tuple[float, ...]], *, x_label: str, y_label: str, level: tuple[float, str] | None = None, whole_x: bool = False
) -> str:
    """An <svg> element of points (x, y) or (x, y, error) in the order of x; no points, no element.

    level: (y, name) of a dashed horizontal line. whole_x: one tick at each x that occurs, as for numbers of steps.
    """
    if not points:
        return ""
    xs = sorted({point[0] for point in points})
    ys = [value for point in points for value in (point[1] - _error(point), point[1] + _error(point))] + ([level[0]] if level else [])
    x_axis = axis(xs, LEFT, WIDTH - RIGHT, ticks=xs if whole_x else None)
    y_axis = axis(ys, HEIGHT - BOTTOM, TOP, log=min(ys) > 0 and max(ys) > 30 * min(ys))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)} by {html.escape(x_label)}">']
    parts += _frame(x_axis, y_axis, x_label, y_label)
    if level is not None:
        y = y_axis(level[0])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="note" x="{WIDTH - RIGHT - 4}" y="{y - 5:.1f}" text-anchor="end">{html.escape(level[1])}</text>')
    return "".join([*parts, *_line(points, x_axis, y_axis), "</svg>"])


def axis(values: Sequence[float], start: float, stop: float, *, log: bool = False, ticks: Sequence[float] | None = None) -> Axis:
    """An axis that holds all values with a little room; ticks at 1, 2 or 5 times a power of ten, unless given."""
    low, high = min(values), max(values)
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [10.0**d for d in decades]
        return Axis(low / 1.15, high * 1.15, start, stop, True, tuple(tick for tick in found if low / 1.15 <= tick <= high * 1.15))
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    if ticks is None:
        raw = (high - low) / 5
        unit = 10 ** math.floor(math.log10(raw))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
        ticks = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(low, high, start, stop, False, tuple(ticks))


def _error(point: tuple[float, ...]) -> float:
    return point[2] if len(point) > 2 else 0.0


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in x_axis.ticks:
        parts.append(f'<text class="tick" x="{x_axis(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:.6g}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="label" x="{middle_x}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    turned = f'transform="rotate(-90 13 {middle_y})" text-anchor="middle"'
    parts.append(f'<text class="label" x="13" y="{middle_y}" {turned}>{html.escape(y_label)}</text>')
    return parts


def _line(points: Sequence[tuple[float, ...]], x_axis: Axis, y_axis: Axis) -> list[str]:
    path = " ".join(f"{x_axis(point[0]):.1f},{y_axis(point[1]):.1f}" for point in points)
    parts = [f'<polyline class="line" points="{path}"/>']
    for point in points if len(points) <= 30 else ():
        x, y = x_axis(point[0]), y_axis(point[1])
        if _error(point):
            high, low = y_axis(point[1] + point[2]), y_axis(point[1] - point[2])
            parts.append(f'<path class="bar" d="M{x:.1f} {high:.1f}V{low:.1f}M{x - 5:.1f} {high:.1f}h10M{x - 5:.1f} {low:.1f}h10"/>')
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    return parts
