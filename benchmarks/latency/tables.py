"""The tables and the picture of measured latency, from a results file: README.md, docs/latency.md and docs/latency.png."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastcm.benchmarks.results_file import Row

# In the order of the tables; what a row of the results calls it, and how a page does.
NAMES = {
    "diffusers": "diffusers pipeline",
    "eager": "plain network",
    "compile": "plain, torch.compile",
    "compile_max": "plain, max-autotune",
    "onnxruntime_unfolded": "plain, ONNX Runtime",
    "fastcm": "fastcm",
    "fastcm_compile": "fastcm, compile on",
    "onnxruntime_cpu": "fastcm .onnx",
    "onnxruntime_seeded": "fastcm .onnx, seeds in",
    "onnxruntime_cuda": "fastcm .onnx on CUDA",
}
OURS = ("fastcm", "fastcm_compile", "onnxruntime_cpu", "onnxruntime_seeded", "onnxruntime_cuda")
WIDTH, BAR, GAP, LEFT, RIGHT, TITLE = 900, 18, 6, 210, 110, 34
INK, OTHER, OWN, FLOOR = "#222222", "#b8bcc2", "#2f6fb0", "#c0392b"


def machine_line(machine: Row) -> str:
    where = machine["gpu"] or f"{machine['threads']} threads of {machine['processor']}"
    runtime = machine.get("onnxruntime-gpu") or machine.get("onnxruntime")
    versions = f"torch {machine['torch']}" + (f", ONNX Runtime {runtime}" if runtime else "")
    diffusers = f", diffusers {machine['diffusers']}" if machine.get("diffusers") else ""
    return f"{where}, {versions}{diffusers}, {machine['date']}, commit {machine['commit']}."


def measured(content: dict) -> dict[tuple[str, int], dict[str, Row]]:
    """(model, batch) -> backend -> row, of the rows that have figures."""
    groups: dict[tuple[str, int], dict[str, Row]] = {}
    for row in content["rows"]:
        if row["bench"] == "latency" and ("p50_ms" in row or "floor_ms" in row):
            groups.setdefault((row["model"], row["batch"]), {})[row["backend"]] = row
    return groups


def best(rows: dict[str, Row]) -> Row | None:
    """The fastest of fastcm's own ways."""
    own = [rows[name] for name in OURS if name in rows]
    return min(own, key=lambda row: row["p50_ms"], default=None)


def short_table(content: dict) -> str:
    """One line per model and batch: diffusers, fastcm's ways, the best over diffusers, the floor."""
    lines = [
        "| network | batch | diffusers, ms | fastcm, ms | compile on, ms | .onnx with seeds, ms | best over diffusers | floor, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, batch), rows in measured(content).items():
        if batch in (1, 4) and best(rows):
            cells = [model, str(batch)] + [_ms(rows.get(name)) for name in ("diffusers", "fastcm", "fastcm_compile", "onnxruntime_seeded")]
            over = best(rows).get("speedup_over_diffusers")
            cells += [f"{over:.2f}x" if over else "-", _digits(rows["floor"]["floor_ms"]) if "floor" in rows else "-"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Seed to uint8, p50. {machine_line(content['machine'])}"])


def long_table(content: dict) -> str:
    """One line per model, batch and backend, with tails and ratios."""
    lines = [
        "| network | batch | | p50, ms | p95 | p99 | device, p50 | images/s | over diffusers | over the unfolded graph | levels apart |",
        "|" + "---|" * 11,
    ]
    for (model, batch), rows in measured(content).items():
        for name in (name for name in NAMES if name in rows):
            row = rows[name]
            cells = [model, str(batch), NAMES[name], *(_digits(row[f"p{percent}_ms"]) for percent in (50, 95, 99))]
            cells += [_digits(row["device_p50_ms"]) if "device_p50_ms" in row else "-", _digits(row["images_per_s"])]
            for other in ("diffusers", "onnxruntime_unfolded"):
                over = row.get(f"speedup_over_{other}")
                cells.append(f"{over:.2f}x" if over else "-")
            lines.append("| " + " | ".join([*cells, str(row["levels_apart"])]) + " |")
    return "\n".join([*lines, "", machine_line(content["machine"])])


def floor_table(content: dict) -> str:
    """One line per model at batch 1: its work, its weights, and what both take at the machine's measured rates."""
    lines = ["| network | GFLOP an image | weights, MB | product, GFLOP/s | copy, GB/s | floor, ms | best measured, ms |", "|" + "---|" * 7]
    for (model, batch), rows in measured(content).items():
        if batch == 1 and "floor" in rows:
            row, own = rows["floor"], best(rows)
            cells = [model, *(_digits(row[name]) for name in ("gflop", "weight_mb", "gemm_gflop_s", "copy_gb_s", "floor_ms"))]
            lines.append("| " + " | ".join([*cells, _ms(own)]) + " |")
    return "\n".join(lines)


def start_table(content: dict) -> str:
    """Seconds to the first image of compiled generators in fresh processes."""
    lines = ["| network | batch | nothing in the cache, s | restarted, s |", "|---|---|---|---|"]
    for (model, batch), rows in measured(content).items():
        row = rows.get("fastcm_compile", {})
        if "first_image_cold_s" in row:
            lines.append(f"| {model} | {batch} | {_digits(row['first_image_cold_s'])} | {_digits(row['first_image_warm_s'])} |")
    return "\n".join(lines)


def profile_table(content: dict, most: int = 12) -> str:
    """Where ONNX Runtime spends one image of each exported model: milliseconds and nodes by operator."""
    rows = [row for row in content["rows"] if row["bench"] == "latency_profile"]
    if not rows:
        return "Not measured yet."
    totals = {kind: sum(row["operators"].get(kind, (0, 0))[0] for row in rows) for row in rows for kind in row["operators"]}
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    head = ["operator", *(f"{row['model']}, ms" for row in rows)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in kinds[:most]:
        cells = [f"{_digits(ms)} ({count})" if count else "-" for ms, count in (row["operators"].get(kind, (0, 0)) for row in rows)]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    others = [[row["operators"].get(kind, (0, 0)) for kind in kinds[most:]] for row in rows]
    cells = [f"{_digits(sum(ms for ms, _ in each))} ({sum(count for _, count in each)})" for each in others]
    return "\n".join([*lines, "| others | " + " | ".join(cells) + " |"])


def plot(content: dict, path: Path, *, batch: int = 1) -> None:
    """A PNG of bars, p50 of one image by network and backend, each network on a scale of its own with its floor as a line."""
    groups = [(model, rows) for (model, size), rows in measured(content).items() if size == batch and best(rows)]
    heights = [TITLE + sum(name in rows for name in NAMES) * (BAR + GAP) + GAP for _, rows in groups]
    picture = Image.new("RGB", (WIDTH, sum(heights) + GAP), "white")
    draw, top = ImageDraw.Draw(picture), GAP
    for (model, rows), height in zip(groups, heights, strict=True):
        _bars(draw, model, {name: rows[name] for name in NAMES if name in rows}, rows.get("floor"), top)
        top += height
    picture.save(path, optimize=True)


def _bars(draw: ImageDraw.ImageDraw, model: str, rows: dict[str, Row], floor: Row | None, top: int) -> None:
    small, large = ImageFont.load_default(13), ImageFont.load_default(16)
    scale = (WIDTH - LEFT - RIGHT) / max(row["p50_ms"] for row in rows.values())
    draw.text((GAP, top + 6), f"{model}: one image, seed to bytes, p50", fill=INK, font=large)
    y = top + TITLE
    for name, row in rows.items():
        draw.text((LEFT - 8, y + BAR / 2), NAMES[name], fill=INK, font=small, anchor="rm")
        end = LEFT + scale * row["p50_ms"]
        draw.rectangle((LEFT, y, end, y + BAR), fill=OWN if name in OURS else OTHER)
        draw.text((end + 6, y + BAR / 2), f"{_digits(row['p50_ms'])} ms", fill=INK, font=small, anchor="lm")
        y += BAR + GAP
    if floor:
        x = LEFT + scale * floor["floor_ms"]
        draw.line((x, top + TITLE - 3, x, y - GAP + 3), fill=FLOOR, width=2)


def _ms(row: Row | None) -> str:
    return "-" if row is None else _digits(row["p50_ms"])


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def pages(content: dict | None) -> dict[str, str]:
    """Mark -> the table that stands there, of README.md (`latency`) and docs/latency.md."""
    missing = "Not measured yet."
    makers = {"latency": short_table, "floors": floor_table, "latencies": long_table, "starts": start_table, "profile": profile_table}
    return {name: make(content) if content else missing for name, make in makers.items()}
