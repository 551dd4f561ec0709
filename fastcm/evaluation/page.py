"""The evaluation as one static HTML page that opens from disk: pictures and charts are inside it, and nothing is fetched."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastcm.evaluation.charts import line_chart
from fastcm.evaluation.collectors import Gallery, Neighbours
from fastcm.evaluation.report import protocol_lines, table
from fastcm.generation.pictures import to_pil

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --dim: #5f6b76; --rule: #dfe4e8; --back: #fff; --box: #f6f8f9; --a: #0f6cbd }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaed; --dim: #9aa6b2; --rule: #343b42; --back: #15181b; --box: #1d2125;
 --a: #6cb6ff } }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 17px; margin: 36px 0 8px } h3 { font-size: 14px; margin: 16px 0 4px; color: var(--dim) }
p { color: var(--dim); margin: 4px 0 10px }
.charts, .sets { display: flex; flex-wrap: wrap; gap: 8px 24px } .sets > div { min-width: 0 }
figure { margin: 0; flex: 1 1 420px; max-width: 480px; background: var(--box); border-radius: 8px; padding: 10px }
svg { width: 100%; display: block } text { fill: var(--ink); font-size: 12px } .tick, .note { fill: var(--dim); font-size: 11px }
.grid { stroke: var(--rule) } .axis { stroke: var(--dim) } .level { stroke: var(--dim); stroke-dasharray: 5 4 }
.line { fill: none; stroke: var(--a); stroke-width: 2 } .bar { fill: none; stroke: var(--a); stroke-width: 1.5 } .dot { fill: var(--a) }
.scroll { overflow-x: auto } table { border-collapse: collapse } img { display: block; image-rendering: pixelated; border-radius: 3px }
.tiles td, .tiles th { padding: 2px 3px; text-align: center; font-weight: 400; font-size: 12px; color: var(--dim) }
.figures { width: 100%; font-variant-numeric: tabular-nums }
.figures th, .figures td { padding: 5px 10px; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap }
.figures th:first-child { text-align: left; font-weight: 400; white-space: normal }
pre { background: var(--box); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 12.5px; line-height: 1.45 }
"""


@dataclass(frozen=True, eq=False)
class Facts:
    """What a page shows beside the report. galleries: by the set's name; training: uint8 [N, C, H, W] that neighbours point into."""

    title: str
    galleries: dict[str, tuple[Gallery, Neighbours | None]]
    training: np.ndarray | None
    class_names: Sequence[str] | None
    log: Sequence[dict]


def page(report: dict, facts: Facts) -> str:
    """The page as text. report: what `evaluate` returned; facts.log: rows of a run's log.jsonl, or none."""
    count = report["protocol"].get("data_count")
    lead = f"Measured against {html.escape(str(report['protocol'].get('data', 'given data')))}" + (f", {count:,} images" if count else "")
    body = [
        f"<h1>{html.escape(facts.title)}</h1><p class='lead'>{lead}. Every figure names its features; the protocol is at the end.</p>",
        _curves(report),
        _samples(facts),
        _neighbours(facts),
        _figures(report),
        _training(facts.log),
        "<h2>Protocol</h2><pre>" + html.escape("\n".join(protocol_lines(report))) + "</pre>",
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(facts.title)}</title>"
    return f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>" if svg else ""


def _curves(report: dict) -> str:
    """Steps against quality, from the sets whose network calls are known."""
    rows = sorted((row for row in report["sets"] if row.get("nfe")), key=lambda row: row["nfe"])
    features = report["protocol"].get("features_name", "")
    charts = []
    for name, title in (("fid", f"FID [{features}]"), ("fd_balanced", "Frechet distance, halves [judge]")):
        points = [(row["nfe"], row[name]["mean"], row[name]["std"]) for row in rows if name in row]
        real = next((row[name]["real"]["mean"] for row in rows if "real" in row.get(name, {})), None)
        level = None if real is None else (real, "real images")
        charts.append(_figure(line_chart(points, x_label="network calls", y_label=title, level=level, whole_x=True)))
    note = "<p>Lower is better; bars are one standard deviation.</p>"
    return f"<h2>Steps and quality</h2>{note}<div class='charts'>{''.join(charts)}</div>" if any(charts) else ""


def _samples(facts: Facts) -> str:
    labelled = any(gallery.labelled for gallery, _ in facts.galleries.values())
    grids = "".join(f"<div><h3>{html.escape(name)}</h3>{_grid(gallery, facts)}</div>" for name, (gallery, _) in facts.galleries.items())
    return f"<h2>Samples{' by class' if labelled else ''}</h2><div class='sets'>{grids}</div>" if grids else ""


def _grid(gallery: Gallery, facts: Facts) -> str:
    """A table with a column per class, its name above."""
    names = facts.class_names
    heads = [names[label] if gallery.labelled and names else (str(label) if gallery.labelled else "") for label in gallery.columns]
    deepest = max((len(rows) for rows in gallery.columns.values()), default=0)
    lines = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    for depth in range(deepest):
        cells = [_tile(gallery.images[rows[depth]]) if depth < len(rows) else "" for rows in gallery.columns.values()]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<div class='scroll'><table class='tiles'>{''.join(lines)}</table></div>"


def _neighbours(facts: Facts) -> str:
    note = "Below each sample the training picture nearest to it, and the root-mean-square difference per pixel in 8-bit levels."
    shown = "".join(_pairs(name, gallery, near, facts) for name, (gallery, near) in facts.galleries.items() if near is not None)
    return f"<h2>Nearest training images</h2><p>{note}</p><div class='sets'>{shown}</div>" if shown else ""


def _pairs(name: str, gallery: Gallery, near: Neighbours, facts: Facts) -> str:
    """Samples above their nearest training images: the closest of all, then the first of each column."""
    first = [int(rows[0]) for rows in gallery.columns.values()]
    strips = (
        ("the closest", [(image, row) for _, row, image in near.closest]),
        ("the first of each column", [(gallery.images[row], row) for row in first]),
    )
    parts = []
    for title, items in strips:
        made = "".join(f"<td>{_tile(image)}</td>" for image, _ in items)
        real = "".join(f"<td>{_tile(facts.training[near.index[row]])}</td>" for _, row in items)
        distance = "".join(f"<td>{near.distance[row]:.1f}</td>" for _, row in items)
        rows = f"<tr><th>sample</th>{made}</tr><tr><th>training</th>{real}</tr><tr><th></th>{distance}</tr>"
        parts.append(f"<div><h3>{html.escape(name)}, {title}</h3><div class='scroll'><table class='tiles'>{rows}</table></div></div>")
    return "".join(parts)


def _figures(report: dict) -> str:
    names, lines = table(report)
    head = "<tr><th></th>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"
    rows = [
        f"<tr><th>{html.escape(title.strip())}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for title, cells in lines
    ]
    return f"<h2>Figures</h2><div class='scroll'><table class='figures'>{head}{''.join(rows)}</table></div>"


def _training(log: Sequence[dict]) -> str:
    """The loss, and what was measured during training, against the images seen."""
    charts = []
    for key, title in (("loss", "training loss"), ("fd", "Frechet distance [judge]"), ("accuracy", "recognised [judge]")):
        rows = [row for row in log if isinstance(row.get(key), int | float) and np.isfinite(row[key]) and "nimg" in row]
        points = [(row["nimg"] / 1000, row[key]) for row in _thinned(rows)]
        if len(points) > 1:
            charts.append(_figure(line_chart(points, x_label="images seen, thousands", y_label=title)))
    return f"<h2>Training</h2><div class='charts'>{''.join(charts)}</div>" if charts else ""


def _thinned(rows: Sequence[dict], most: int = 400) -> Sequence[dict]:
    step = -(-len(rows) // most) or 1
    return [*rows[::step], *(rows[-1:] if rows and (len(rows) - 1) % step else [])]


def _tile(image: np.ndarray) -> str:
    """An <img> of uint8 [C, H, W], about 40 pixels wide or its own size, its bytes inside."""
    stream = io.BytesIO()
    to_pil(np.ascontiguousarray(image.transpose(1, 2, 0))).save(stream, format="PNG", optimize=True)
    width = image.shape[2] * max(1, round(40 / image.shape[2]))
    data = base64.b64encode(stream.getvalue()).decode()
    return f"<img width='{width}' height='{width * image.shape[1] // image.shape[2]}' alt='' src='data:image/png;base64,{data}'>"
