"""Writes the tables of docs/kernels.md and those of training speed and of latency from results/.

`python -m fastcm.benchmarks.pages.tables`; with --auto also that of kernels/launch.py.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from fastcm.benchmarks.latency import tables as latency_tables
from fastcm.benchmarks.results_file import Row
from fastcm.benchmarks.training import picture as train_picture
from fastcm.benchmarks.training import tables as train_tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "kernels.md"
TRAINING_PAGES = (ROOT / "README.md", ROOT / "docs" / "training-speed.md", ROOT / "docs" / "long-runs.md")
LAUNCH = ROOT / "kernels" / "launch.py"
LATENCY, LATENCY_PICTURE = (ROOT / "README.md", ROOT / "docs" / "latency.md"), ROOT / "docs" / "latency.png"
# A kernel that is slower than its compiled reference by less than this is not slower: two runs of one kernel differ by as much.
NOISE = 1.02


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.pages.tables", description=__doc__)
    parser.add_argument("--auto", action="store_true", help="also rewrite the table that `auto` reads in kernels/launch.py")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table is not what the results say")
    args = parser.parse_args(argv)
    texts = {DOCS: documented(DOCS.read_text(encoding="utf-8"))}
    for pages, change in ((TRAINING_PAGES, with_training), (LATENCY, with_latency)):
        texts |= {page: change(texts.get(page) or page.read_text(encoding="utf-8")) for page in pages}
    if args.auto:
        texts[LAUNCH] = with_auto_table(LAUNCH.read_text(encoding="utf-8"))
    stale = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not args.check:
            path.write_text(texts[path], encoding="utf-8")
    content = drawn()
    if content is not None and not train_picture.is_current(content):
        stale.append(train_picture.PICTURE)
        if not args.check:
            train_picture.write(content)
    for path in stale:
        print(f"{path.name}: {'is not what the results say' if args.check else 'written'}")
    if (content := latest("latency*.json")) and not args.check:
        latency_tables.plot(content, LATENCY_PICTURE)
    return 1 if stale and args.check else 0


def latest(pattern: str, *, on_gpu: bool | None = None) -> dict | None:
    """Returns the content of the newest results file that the pattern names, by its own date, or None; on_gpu: with a GPU, without."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]
    contents = [content for content in contents if on_gpu is None or (content["machine"]["gpu"] is not None) == on_gpu]
    return max(contents, key=lambda content: content["machine"]["date"], default=None)


def with_training(text: str) -> str:
    """Returns the page with its tables of training speed replaced by what the latest results say."""
    return train_tables.with_sections(text, train_tables.sections(latest("train*.json", on_gpu=False), latest("train*.json", on_gpu=True)))


def drawn() -> dict | None:
    """The results that docs/training-speed.png shows: a GPU's where there are some."""
    return latest("train*.json", on_gpu=True) or latest("train*.json", on_gpu=False)


def documented(text: str) -> str:
    """Returns the page with its tables replaced by what the latest results say."""
    ahead, on_gpu, on_cpu = latest("aot-*.json"), latest("kernels*.json", on_gpu=True), latest("kernels*.json", on_gpu=False)
    text = _between(text, "aot", aot_table(ahead) if ahead else "Not compiled yet.")
    text = _between(
        text, "gpu", bench_table(on_gpu) if on_gpu else "Not measured on a GPU yet: `auto` takes the reference in compiled graphs."
    )
    return _between(text, "cpu", bench_table(on_cpu) if on_cpu else "Not measured on a CPU yet.")


def with_latency(text: str) -> str:
    """Returns a page with its tables of latency replaced by what the latest results say."""
    for name, table in latency_tables.pages(latest("latency*.json")).items():
        mark = f"<!-- {name} -->"
        text = re.sub(f"{mark}\n.*?{mark}", lambda _, new=f"{mark}\n{table}\n{mark}": new, text, flags=re.DOTALL)
    return text


def aot_table(content: dict) -> str:
    """Returns the Markdown table of an AOT report, one line per kernel and shape; a figure for each architecture where they differ."""
    machine, groups = content["machine"], {}
    for row in content["rows"]:
        groups.setdefault((row["op"], row["variant"], tuple(row["shape"]), row["kernel"]), []).append(row)
    architectures = ", ".join(f"sm_{sm}" for sm in sorted({row["sm"] for row in content["rows"]}))
    lines = [
        f"Compiled for {architectures} by triton {machine['triton']} ({machine['date']}); `a / b / c` are the three architectures.",
        "",
        "| op | variant | shape | kernel | registers | stack, spill | instructions/element | bytes/element (floor) | loads | stores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (op, variant, shape, kernel), rows in groups.items():
        cells = [op, variant, "x".join(str(n) for n in shape), kernel, _each(rows, "registers")]
        cells.append(f"{max(row['stack_bytes'] for row in rows)}, {max(row['spill_bytes'] for row in rows)}")
        cells += [_each(rows, "instructions_per_element"), f"{rows[0]['bytes_per_element']:g} ({rows[0]['floor_bytes_per_element']:g})"]
        cells += [
            _each([{k: _widths(row[k]) for k in ("global_loads", "global_stores")} for row in rows], k)
            for k in ("global_loads", "global_stores")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_table(content: dict) -> str:
    """Returns the Markdown table of measured rows, one line per op and shape, one column per backend; a GPU's says what `auto` takes."""
    machine = content["machine"]
    on_gpu = machine["gpu"] is not None
    where = f"{machine['gpu']}, driver {machine['driver']}" if on_gpu else f"{machine['threads']} threads of {machine['processor']}"
    triton = f", triton {machine['triton']}" if on_gpu else ""
    lines = [f"{where}, torch {machine['torch']}{triton} ({machine['date']}); p50 in milliseconds.", ""]
    groups: dict[tuple, dict[str, Row]] = {}
    for row in content["rows"]:
        groups.setdefault((row["op"], row["variant"], tuple(row["shape"]), row["regime"]), {})[row["backend"]] = row
    names = list(dict.fromkeys(backend for rows in groups.values() for backend in rows if backend != "fastcm"))
    before, after = (["cache"], ["auto takes"]) if on_gpu else ([], [])
    head = ["op", "variant", "shape", *before, *names, "fastcm", "GB/s", "% of copy", *after]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (op, variant, shape, regime), rows in groups.items():
        cells = [op, variant, "x".join(str(n) for n in shape), *([regime] if on_gpu else [])]
        cells += [_milliseconds(rows.get(name)) for name in (*names, "fastcm")]
        own = rows.get("fastcm", {})
        cells += [_figure(own[name]) if name in own else "-" for name in ("gb_s", "percent_of_copy")]
        if on_gpu:
            won = _wins(rows)
            cells.append("-" if won is None else "kernel" if won else "reference")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def auto_table(rows: list[Row]) -> dict[str, tuple[tuple[int, bool], ...]]:
    """Returns op -> ((elements, whether the kernel is taken), ...) from measured GPU rows: what `MEASURED` in kernels/launch.py holds.

    A kernel is taken at a size where no variant of it is slower than its compiled reference.
    """
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["bench"] == "kernels" and row["regime"] != "cpu":
            groups.setdefault((row["op"], row["variant"], tuple(row["shape"])), {})[row["backend"]] = row
    decided: dict[str, dict[int, bool]] = {}
    for (op, _, shape), backends in groups.items():
        if (won := _wins(backends)) is not None:
            elements = 1
            for n in shape:
                elements *= n
            sizes = decided.setdefault(op, {})
            sizes[elements] = sizes.get(elements, True) and won
    return {op: tuple(sorted(sizes.items())) for op, sizes in sorted(decided.items())}


def with_auto_table(text: str) -> str:
    """Returns the source of kernels/launch.py with the table that the latest GPU results make."""
    content = latest("kernels*.json", on_gpu=True)
    table = auto_table(content["rows"]) if content else {}
    body = "".join(f'    "{op}": ({" ".join(f"{size}," for size in sizes)}),\n' for op, sizes in table.items())
    body = f"{{\n{body}}}" if body else "{}"
    source = f"# auto table: begin\nMEASURED: dict[str, tuple[tuple[int, bool], ...]] = {body}\n# auto table: end"
    return re.sub(r"# auto table: begin\n.*?# auto table: end", lambda _: source, text, flags=re.DOTALL)


def aot_line(row: Row) -> str:
    """Returns one row of an AOT report for the terminal."""
    where = f"{row['op']} ({row['variant']}) {'x'.join(str(n) for n in row['shape'])} {row['kernel']} sm_{row['sm']}"
    memory = f"{row['bytes_per_element']:g} bytes/element of {row['floor_bytes_per_element']:g}"
    accesses = f"loads {_widths(row['global_loads'])}, stores {_widths(row['global_stores'])}"
    code = f"{row['registers']} registers, stack {row['stack_bytes']}, spill {row['spill_bytes']}"
    return f"{where}: {code}, {row['instructions_per_element']} instructions/element, {memory}, {accesses}"


def bench_line(row: Row) -> str:
    """Returns one measured row for the terminal."""
    where = f"{row['op']} ({row['variant']}) {'x'.join(str(n) for n in row['shape'])} {row['regime']} {row['backend']}"
    if "error" in row:
        return f"{where}: {row['error']}"
    return f"{where}: {row['p50_ms']:.4g} ms, {row['gb_s']:.4g} GB/s, {row['percent_of_copy']:.3g} % of copy"


def _wins(rows: dict[str, Row]) -> bool | None:
    """Whether the kernel is not slower than its compiled reference; None where one of them has no figure."""
    own, compiled = rows.get("fastcm", {}), rows.get("compile_reference") or rows.get("compile") or {}
    if "p50_ms" not in own or "p50_ms" not in compiled:
        return None
    return own["p50_ms"] <= NOISE * compiled["p50_ms"]


def _each(rows: list[Row], name: str) -> str:
    values = [str(row[name]) for row in rows]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _widths(accesses: dict[str, int]) -> str:
    return " + ".join(f"{count}x{bits}" for bits, count in sorted(accesses.items(), key=lambda item: -int(item[0]))) or "none"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['p50_ms']:.4g}" if "p50_ms" in row else "error"


def _between(text: str, name: str, body: str) -> str:
    begin, end = f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"no markers of the {name} table in the page: {begin} ... {end}. Add them where the table stands.")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
