"""The text of an evaluation: a line per figure, a column per set of samples with the real images first, then the protocol."""

from collections.abc import Callable

LINES: tuple[tuple[str, Callable[[dict], str | None]], ...] = (
    ("images", lambda row: f"{row['count']:,}" if "count" in row else None),
    ("network calls per image", lambda row: f"{row['nfe']}" if row.get("nfe") else None),
    ("recognised as their label", lambda row: f"{row['accuracy']:.2%}" if "accuracy" in row else None),
    ("Frechet distance, random halves", lambda row: _spread(row.get("fd"))),
    ("  times real", lambda row: _ratio(row.get("fd"))),
    ("Frechet distance, balanced halves", lambda row: _spread(row.get("fd_balanced"))),
    ("  times real", lambda row: _ratio(row.get("fd_balanced"))),
    ("Frechet distance, all to all", lambda row: f"{row['fd_all']:.2f}" if "fd_all" in row else None),
    ("kernel distance (KID)", lambda row: _spread(row.get("kid"))),
    ("precision", lambda row: _spread(row.get("precision"), digits=3)),
    ("recall", lambda row: _spread(row.get("recall"), digits=3)),
    ("nearest training image, median", lambda row: _neighbours(row, "median")),
    ("nearest training image, 1st percentile", lambda row: _neighbours(row, "p1")),
    ("  closer than the real 1st percentile", lambda row: f"{row['neighbours']['closer_share']:.2%}" if _is_compared(row) else None),
    ("  identical to a training image", lambda row: f"{row['neighbours']['identical']}" if _is_compared(row) else None),
)


def text(report: dict) -> str:
    """The table and the protocol of what `evaluate` returned, as lines of plain text."""
    columns = [{**report["real"], "name": "real"}, *report["sets"]]
    table = [("", [column["name"] for column in columns])]
    for title, cell in LINES:
        cells = [cell(column) for column in columns]
        if any(value is not None for value in cells):
            table.append((title, [value or "-" for value in cells]))
    first = max(len(title) for title, _ in table)
    widths = [max(len(cells[i]) for _, cells in table) for i in range(len(columns))]
    lines = [
        "  ".join([title.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]).rstrip()
        for title, cells in table
    ]
    return "\n".join([*lines, "", *protocol_lines(report)])


def protocol_lines(report: dict) -> list[str]:
    """How the figures were made, a few words per subject."""
    p, first = report["protocol"], report["sets"][0]
    lines = [f"data       {p.get('data', 'given')}: {p['data_count']:,} images, sha256 {p['data_sha256'][:16]}"]
    if "samples" in p:
        lines.append(f"samples    {p['samples']}")
    if "features" in p:
        lines += [
            f"judge      {p['features']}; seed {p['judge_seed']}, held-out accuracy {p['judge_held_out_accuracy']:.2%}",
            f"reference  {p['reference']}: {p['reference_count']:,}, sha256 {p['reference_sha256'][:16]}",
        ]
    compared = [first[name] for name in ("fd", "kid", "precision", "recall") if name in first]
    if compared:
        lines += [
            f"halves     {p['halvings']} fixed halvings of the reference, mean ± standard deviation; one half is compared with the other,",
            f"           samples with that other half in equal counts ({compared[0]['n']}), per class where they have labels;",
            "           balanced halves hold equal shares of each class, random ones do not",
        ]
    if "neighbours_real" in p:
        lines += [
            "nearest    root-mean-square difference per pixel, in 8-bit levels, to the nearest training image;",
            f"           real: {p['neighbours_real']}; without copying about 1 % are closer than the real 1st percentile",
        ]
    return lines


def _spread(value: dict | None, *, digits: int = 2) -> str | None:
    return None if value is None else f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"


def _ratio(value: dict | None) -> str | None:
    # The real figure stands beside every other as their unit.
    return None if value is None else f"{value.get('ratio', 1):.2f}"


def _is_compared(row: dict) -> bool:
    return "closer_share" in row.get("neighbours", {})


def _neighbours(row: dict, name: str) -> str | None:
    values = row.get("neighbours", {})
    value = values.get(f"generated_{name}", values.get(name))
    return None if value is None else f"{value:.1f}"
