"""The tables and the picture of training speed, from the rows of bench.py; what was not measured is said to be so."""

from collections.abc import Callable, Sequence

from fastcm.benchmarks.quality.generators import machine_line
from fastcm.benchmarks.results_file import Row
from fastcm.benchmarks.training.step_split import PHASES

NOT_ON_GPU = "GPU: not measured; `make gpu STAGE=train` does it in one command."
NOT_MEASURED = "Not measured yet."
NAMES = {
    "published_step": "published step",
    "compile": "published step, compiled",
    "fastcm": "fastcm",
    "fastcm_compile": "fastcm, compiled",
}
NETWORKS = {
    "digits": "digits, 8x8",
    "mnist": "mnist, 28x28 on patches",
    "colour32": "colour, 32x32",
    "cifar10": "CIFAR-10 DDPM++",
    "imagenet64": "ImageNet-64 ADM",
    "lsun256": "LSUN-256 ADM",
}
AXES = {"batch": "batch", "resolution": "pixels a side", "parameters": "channels", "processes": "processes"}


def sections(cpu: dict | None, gpu: dict | None) -> dict[str, str]:
    """Markdown by mark. cpu, gpu: results files of bench_train, None where there is none."""
    return {
        "train": _both(summary, cpu, gpu),
        "train-picture": NOT_MEASURED if cpu is None and gpu is None else "![the parts of a training step](training-speed.png)",
        "train-step": _both(step_table, cpu, gpu),
        "train-split": _both(split_table, cpu, gpu),
        "train-scaling": _both(scaling_table, cpu, gpu),
        "train-memory": _both(memory_table, cpu, gpu),
        "train-cost": cost_table(cpu, gpu),
    }


def _both(table: Callable[[dict], str], cpu: dict | None, gpu: dict | None) -> str:
    """The table of each machine over its description."""
    parts = [f"{table(content)}\n\n{_machine(content)}" for content in (gpu, cpu) if content is not None]
    return "\n\n".join(parts + ([NOT_ON_GPU] if gpu is None and parts else [] if parts else [NOT_MEASURED]))


def _machine(content: dict) -> str:
    machine = content["machine"]
    if machine["gpu"] is None:
        return machine_line(machine)
    return f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}."


def _rows(content: dict | None, op: str) -> list[Row]:
    """The rows of an op that have figures."""
    return [] if content is None else [row for row in content["rows"] if row.get("op") == op and "error" not in row]


def _grouped(rows: Sequence[Row], *fields: str) -> dict[tuple, dict[str, Row]]:
    """Rows by backend, under the fields' values."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), {})[row["backend"]] = row
    return groups


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def number(value: float | None, form: str = ".3g") -> str:
    """Three digits without an exponent; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{form}}"


def summary(content: dict) -> str:
    """README: images per second of the published step and of fastcm, plain and compiled, for each network and batch.

    A precision is named where fastcm's is another than the published step's.
    """
    lines = []
    for (model, batch), rows in _grouped(_rows(content, "step"), "model", "batch").items():
        own = rows.get("fastcm", {})
        shown = [number(rows.get(name, {}).get("images_per_s")) for name in ("published_step", "fastcm", "compile", "fastcm_compile")]
        times = [_times(rows.get(name, {}), "speedup_over_published_step") for name in ("fastcm", "fastcm_compile")]
        precisions = [rows[name]["precision"] for name in ("published_step", "fastcm") if name in rows]
        if len(set(precisions)) > 1:
            shown = [f"{shown[0]} ({precisions[0]})", f"{shown[1]} ({precisions[1]})", *shown[2:]]
        weights = f"{own.get('parameters', 0) / 1e6:.3g} M"
        lines.append([NETWORKS[model], weights, str(batch), *shown[:2], times[0], *shown[2:], times[1]])
    head = ["network", "weights", "batch", "published step, images/s", "fastcm, images/s", "times", "published, compiled"]
    return markdown([*head, "fastcm, compiled", "times the published step"], lines)


def _times(row: Row, field: str) -> str:
    return f"{row[field]:.2f}" if field in row else ""


def step_table(content: dict) -> str:
    """Every measured step."""
    lines = []
    for row in _rows(content, "step"):
        share = row.get("mfu_percent", row.get("percent_of_matmul"))
        lines.append(
            [
                NETWORKS[row["model"]],
                str(row["batch"]),
                NAMES[row["backend"]],
                row["precision"],
                number(row["p50_ms"]),
                number(row["p20_ms"]),
                number(row["p80_ms"]),
                number(row["images_per_s"]),
                _times(row, "speedup_over_published_step"),
                number(share),
                number(row.get("peak_memory_gb")),
                number(row["startup_s"]),
            ]
        )
    share = "% of a product" if content["machine"]["gpu"] is None else "MFU, %"
    head = ["network", "batch", "step", "precision", "p50, ms", "p20", "p80", "images/s", "times published", share]
    return markdown([*head, "peak, GB", "first step, s"], lines)


def split_table(content: dict) -> str:
    """Where each step's time goes, in milliseconds."""
    lines = [
        [NETWORKS[row["model"]], str(row["batch"]), NAMES[row["backend"]], *(number(row[f"{phase}_ms"]) for phase in PHASES)]
        for row in _rows(content, "step")
    ]
    return markdown(["network", "batch", "step", *PHASES], lines)


def scaling_table(content: dict) -> str:
    """Images per second of fastcm's step along each axis."""
    lines = [
        [
            NETWORKS[row["model"]].split(",")[0],
            f"{row['value']} {AXES[row['axis']]}",
            str(row["batch"]),
            f"{row['parameters'] / 1e6:.3g} M",
            number(row["images_per_s"]),
            number(row["p50_ms"]),
        ]
        for row in _rows(content, "scaling")
    ]
    return markdown(["network", "varied", "batch", "weights", "images/s", "p50, ms"], lines)


def memory_table(content: dict) -> str:
    """Peak memory of a step; on a GPU at the largest batch that fits."""
    lines = []
    for row in _rows(content, "memory"):
        name = NAMES[row["backend"]] + (", recomputed" if row["recomputed"] else "")
        per_image = 1000 * row["peak_memory_gb"] / max(row["batch"], 1)
        lines.append([NETWORKS[row["model"]], name, str(row["batch"]), number(row["peak_memory_gb"]), number(per_image)])
    batch = "batch" if content["machine"]["gpu"] is None else "largest batch that fits"
    return markdown(["network", "step", batch, "peak, GB", "MB per image"], lines)


def cost_table(cpu: dict | None, gpu: dict | None) -> str:
    """docs/long-runs.md: the time of a million images of consistency training, by network."""
    if cpu is None and gpu is None:
        return NOT_MEASURED
    found = {where: _grouped(_rows(content, "step"), "model") for where, content in (("cpu", cpu), ("gpu", gpu))}
    lines = []
    for model in [name for name in NETWORKS if any((name,) in rows for rows in found.values())]:
        best = {where: _fastest(rows.get((model,), {})) for where, rows in found.items()}
        weights = next(row["parameters"] for row in best.values() if row is not None)
        cells = [_duration(best["cpu"]), _duration(best["gpu"])]
        lines.append([NETWORKS[model], f"{weights / 1e6:.3g} M", *cells])
    where = [_machine(content) for content in (cpu, gpu) if content is not None]
    table = markdown(["network", "weights", "a million images on a CPU", "a million images on a GPU"], lines)
    return "\n\n".join([table, *where])


def _fastest(rows: dict[str, Row]) -> Row | None:
    own = [row for name, row in rows.items() if name.startswith("fastcm")]
    return max(own, key=lambda row: row["images_per_s"], default=None)


def _duration(row: Row | None) -> str:
    if row is None:
        return "not measured"
    seconds = 1e6 / row["images_per_s"]
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s"


def with_sections(text: str, made: dict[str, str]) -> str:
    """The page with what stands between each pair of marks `<!-- NAME -->` replaced, where it has the marks."""
    for name, body in made.items():
        mark = f"<!-- {name} -->"
        before, first, rest = text.partition(mark)
        _, second, after = rest.partition(mark)
        if first and second:
            text = f"{before}{mark}\n{body}\n{mark}{after}"
    return text
