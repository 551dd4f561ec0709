"""`python -m fastcm.benchmarks.pages.between_marks`: writes the small tables of the pages from the newest results of each kind."""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastcm.benchmarks.latency import faster_runtimes
from fastcm.benchmarks.pages.tables import latest
from fastcm.benchmarks.quality.generators import machine_line, put_table
from fastcm.benchmarks.results_file import Row

ROOT = Path(__file__).resolve().parents[2]
Cell = Callable[[Row], str]


class PageTable(NamedTuple):
    """page: under the root. results: the pattern of its files. keep: which rows are shown. columns: headings and what is below."""

    page: str
    results: str
    keep: Callable[[Row], bool]
    columns: dict[str, Cell]


def field(name: str, form: str = "{}") -> Cell:
    """A row's field, "-" where it has none."""
    return lambda row: form.format(row[name]) if row.get(name) is not None else "-"


def spread_of(name: str, form: str) -> Cell:
    """Mean and standard deviation of a row's list of figures, one for each seed."""
    return lambda row: f"{statistics.mean(row[name]):{form}} ± {statistics.stdev(row[name]):{form}}"


TABLES = {
    "decoding": PageTable(
        "docs/data.md",
        "data-*.json",
        lambda row: row["op"] == "decode" and row["backend"] == "fastcm",
        {
            "pictures": field("pictures"),
            "count": field("count", "{:,}"),
            "images/s": field("images_per_s", "{:,.0f}"),
            "of Pillow alone": field("percent_of_pillow", "{:.0f} %"),
        },
    ),
    "waiting": PageTable(
        "docs/data.md",
        "data-*.json",
        lambda row: row["op"] == "wait",
        {
            "network": field("model"),
            "batch": field("batch"),
            "step, ms": field("step_ms", "{:,.0f}"),
            "waiting": field("percent_of_step", "{:.2g} %"),
        },
    ),
    "opening": PageTable(
        "docs/data.md",
        "data-*.json",
        lambda row: row["op"] == "open",
        {"pictures in the cache": field("pictures", "{:,}"), "to the first batch, ms": field("p50_ms", "{:.0f}")},
    ),
    "sizes": PageTable(
        "docs/training.md",
        "sizes-*.json",
        lambda row: True,
        {
            "pixels": field("resolution"),
            "patch": field("patch"),
            "places a side, by level": lambda row: ", ".join(map(str, row["levels"])),
            "channels": field("channels"),
            "weights": lambda row: f"{row['parameters'] / 1e6:.2g} M",
            "memory of a step": field("memory_gb", "{:.2g} GB"),
            "images/s, threads": lambda row: f"{row['images_per_s']:.3g}, {row['threads']}",
            "the default run": lambda row: f"{row['kimg']:g} kimg, {row['hours']:.2g} h",
        },
    ),
    "long jobs": PageTable(
        "docs/generation.md",
        "generation-*.json",
        lambda row: True,
        {
            "model": field("model"),
            "images": field("images", "{:,}"),
            "to": field("output"),
            "images/s": field("images_per_s", "{:,.0f}"),
            "network": field("network_percent", "{:.1f} %"),
            "noise": field("noise_percent", "{:.1f} %"),
            "to uint8": field("uint8_percent", "{:.1f} %"),
        },
    ),
    "patches": PageTable(
        "docs/training.md",
        "patches-*.json",
        lambda row: "seeds" in row,
        {
            "patch": field("patch"),
            "images seen": field("kimg", "{:.3g} kimg"),
            "images/s, training": field("images_per_s", "{:.3g}"),
            "recognised, 1 step": spread_of("accuracy_1", ".1%"),
            "Fréchet, times real, 1 step": spread_of("fd_ratio_1", ".1f"),
            "recognised, 2 steps": spread_of("accuracy_2", ".1%"),
            "Fréchet, times real, 2 steps": spread_of("fd_ratio_2", ".1f"),
            "one image, torch, ms": field("torch_p50_ms", "{:.3g}"),
            "one image, seeded ONNX, ms": field("onnx_p50_ms", "{:.3g}"),
        },
    ),
    "teachers": PageTable(
        "docs/training.md",
        "teachers-*.json",
        lambda row: True,
        {
            "model": field("model"),
            "sampled by": field("sampling"),
            "calls per image": field("nfe"),
            "Fréchet distance": lambda row: f"{row['fd_mean']:.2f} ± {row['fd_std']:.2f}",
            "times real": field("fd_ratio", "{:.2f}"),
            "precision": field("precision", "{:.2f}"),
            "recall": field("recall", "{:.2f}"),
        },
    ),
    "exports": PageTable(
        "docs/deploy.md",
        "export-*.json",
        lambda row: True,
        {
            "network": field("model"),
            "weights": field("parameters", "{:,}"),
            "seconds": field("seconds", "{:.0f}"),
            "peak memory, GB": field("peak_gb", "{:.2g}"),
            "file, GB": field("file_gb", "{:.2g}"),
            "largest error": field("max_error", "{:.1e}"),
        },
    ),
    "runtimes": PageTable(
        "docs/deploy.md",
        "runtimes-*.json",
        lambda row: True,
        {
            "network": field("model"),
            "target": field("target"),
            "runtime": field("backend"),
            "version": field("version"),
            "what happens": field("outcome"),
            "largest difference": field("max_error", "{:.1e}"),
            "one thread, ms": field("threads1_p50_ms", "{:.3g}"),
            "times ONNX Runtime": field("threads1_over_onnxruntime", "{:.2f}"),
            "two threads, ms": field("threads2_p50_ms", "{:.3g}"),
            "times ONNX Runtime ": field("threads2_over_onnxruntime", "{:.2f}"),
        },
    ),
    "serving": PageTable(
        "docs/deploy.md",
        "serve-*.json",
        lambda row: True,
        {
            "network": field("model"),
            "clients": field("concurrency"),
            "requests": field("requests", "{:,}"),
            "failed": field("failed"),
            "images/s": field("images_per_s", "{:,.3g}"),
            "of the generator alone": field("percent_of_generator", "{:.0f} %"),
            "p50, ms": field("p50_ms", "{:,.0f}"),
            "p99, ms": field("p99_ms", "{:,.0f}"),
        },
    ),
}


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m fastcm.benchmarks.pages.between_marks", description=__doc__).parse_args(argv)
    for name, table in TABLES.items():
        put_table(ROOT / table.page, markdown(table), mark=mark(name))
    put_table(ROOT / "docs" / "latency.md", faster_runtimes.text(latest("runtimes-*.json")), mark=mark("other runtimes"))
    return 0


def mark(name: str) -> str:
    return f"<!-- {name} -->"


def markdown(table: PageTable) -> str:
    """The table of the newest results, and what measured them."""
    content = latest(table.results)
    rows = [row for row in content["rows"] if table.keep(row)] if content else []
    if not rows:
        return "Not measured yet."
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(cell(row) for cell in table.columns.values()) + " |" for row in rows]
    return "\n".join([*lines, "", machine_line(content["machine"])])


if __name__ == "__main__":
    sys.exit(main())
