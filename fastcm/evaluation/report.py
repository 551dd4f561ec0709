"""The text of an evaluation: a line per figure, a column per set of samples with the real images first, then the protocol."""

from collections.abc import Callable

LINES: tuple[tuple[str, Callable[[dict], str | None]], ...] = (
    ("images", lambda row: f"{row['count']:,}" if "count" in row else None),
    ("network calls per image", lambda row: f"{row['nfe']}" if row.get("nfe") else None),
    ("recognised as their label [judge]", lambda row: f"{row['accuracy']:.2%}" if "accuracy" in row else None),
    ("Frechet distance, random halves [judge]", lambda row: _spread(row.get("fd"))),
    ("  times real", lambda row: _ratio(row.get("fd"))),
    ("Frechet distance, balanced halves [judge]", lambda row: _spread(row.get("fd_balanced"))),
    ("  times real", lambda row: _ratio(row.get("fd_balanced"))),
    ("FID [{features}]", lambda row: _spread(row.get("fid"))),
    ("KID [{features}]", lambda row: _spread(row.get("kid"), digits=4 if _is_small(row.get("kid")) else 2)),
    ("Inception Score [{features}]", lambda row: _spread(row.get("is"))),
    ("precision [{features}]", lambda row: _spread(row.get("precision"), digits=3)),
    ("recall [{features}]", lambda row: _spread(row.get("recall"), digits=3)),
    ("diversity [LPIPS]", lambda row: _spread(row.get("lpips"), digits=4)),
    ("self-consistency [{path}]", lambda row: _spread(row.get("consistency"), digits=4)),
    ("nearest training image, median", lambda row: _neighbours(row, "median")),
    ("nearest training image, 1st percentile", lambda row: _neighbours(row, "p1")),
    ("  closer than the real 1st percentile", lambda row: f"{row['neighbours']['closer_share']:.2%}" if _is_compared(row) else None),
    ("  identical to a training image", lambda row: f"{row['neighbours']['identical']}" if _is_compared(row) else None),
)


def table(report: dict) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The names of the columns, the real images first, and (title, cells) of each line that has a figure; every title says its features."""
    columns = [{**report["real"], "name": "real"}, *report["sets"]]
    paths = {row["consistency"]["path"] for row in report["sets"] if "consistency" in row}
    names = {"features": report["protocol"].get("features_name", "judge"), "path": ", ".join(paths)}
    lines = []
    for title, cell in LINES:
        cells = [cell(column) for column in columns]
        if any(value is not None for value in cells):
            lines.append((title.format(**names), [value or "-" for value in cells]))
    return [column["name"] for column in columns], lines


def text(report: dict) -> str:
    """The table and the protocol of what `evaluate` returned, as lines of plain text."""
    names, lines = table(report)
    rows = [("", names), *lines]
    first = max(len(title) for title, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(names))]
    shown = [
        "  ".join([title.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]).rstrip()
        for title, cells in rows
    ]
    return "\n".join([*shown, "", *protocol_lines(report)])


def protocol_lines(report: dict) -> list[str]:
    """How the figures were made, a few words per subject."""
    p, first = report["protocol"], report["sets"][0]
    lines = []
    if "data_sha256" in p:
        held_out = f", {p['data_held_out']:,} of them held out from training" if "data_held_out" in p else ""
        lines.append(f"data       {p.get('data', 'given')}: {p['data_count']:,} images{held_out}, sha256 {p['data_sha256'][:16]}")
        lines += [f"           {note}" for note in p.get("data_notes", ())]
    if "samples" in p:
        lines.append(f"samples    {p['samples']}")
    lines.append(f"pixels     {p['rounding']}")
    if "data_resize" in p:
        lines.append(f"           data pictures of another size: {p['data_resize']}")
    if "features" in p:
        lines += [
            f"features   {p['features']}; sha256 {p['features_sha256'][:16]}",
            f"           size: {p['resize']}",
            f"reference  {p['reference']}: {p['reference_count'] or 0:,}, sha256 {p['reference_sha256'][:16]}",
        ]
    if "judge_seed" in p:
        held_out = f"held-out accuracy {p['judge_held_out_accuracy']:.2%}"
        lines.append(f"judge      seed {p['judge_seed']}, {held_out}, sha256 {p['judge_sha256'][:16]}")
    halved = [first[name] for name in ("fd", "kid", "precision", "recall") if "real" in first.get(name, {})]
    if halved:
        lines += [
            f"halves     {p['halvings']} fixed halvings of the reference, mean ± standard deviation; one half is compared with the other,",
            f"           samples with that other half in equal counts ({halved[0]['n']}), per class where they have labels;",
            "           balanced halves hold equal shares of each class, random ones do not",
        ]
    lines += [line for name, line in NOTES.items() if name in first and not (name in ("kid", "precision", "recall") and halved)]
    if "neighbours_real" in p:
        lines += [
            "nearest    root-mean-square difference per pixel, in 8-bit levels, to the nearest training image;",
            f"           real: {p['neighbours_real']}; without copying about 1 % are closer than the real 1st percentile",
        ]
    return lines


NOTES = {
    "fid": "FID        all samples to all of the reference, float64; ± bootstrap over groups of samples",
    "is": "score      exp of the mean KL divergence, mean ± standard deviation of 10 random splits",
    "kid": "KID        cubic kernel, unbiased, mean ± standard deviation of 100 subsets of at most 1,000",
    "precision": "precision  k = 3, at most 10,000 rows a side; ± bootstrap of the share",
    "lpips": "diversity  mean LPIPS of random pairs of one class, 64 pixels a side at least; ± bootstrap of the mean",
    "consistency": "self-cons. RMS change of f between 8 neighbouring levels of a path, images in [-1, 1]; ± bootstrap of the mean",
}


def _spread(value: dict | None, *, digits: int = 2) -> str | None:
    return None if value is None else f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"


def _is_small(value: dict | None) -> bool:
    """Inception's KID is a few thousandths, the judge's, whose features are larger, a few units."""
    return value is not None and max(abs(value["mean"]), value["std"]) < 1


def _ratio(value: dict | None) -> str | None:
    # The real figure stands beside every other as their unit.
    return None if value is None else f"{value.get('ratio', 1):.2f}"


def _is_compared(row: dict) -> bool:
    return "closer_share" in row.get("neighbours", {})


def _neighbours(row: dict, name: str) -> str | None:
    values = row.get("neighbours", {})
    value = values.get(f"generated_{name}", values.get(name))
    return None if value is None else f"{value:.1f}"
