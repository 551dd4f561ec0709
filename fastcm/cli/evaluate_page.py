"""`fastcm evaluate --report DIR`: the page, with the curves of the run where the model is one."""

import argparse
import json
from pathlib import Path

from fastcm.cli.evaluate_sets import Measured


def write_page(args: argparse.Namespace, measured: Measured, result: dict, world, galleries: dict) -> Path:
    """Writes DIR/index.html, complete or absent, and returns its path."""
    from fastcm.evaluation.page import Facts, page
    from fastcm.weights.model_folder import write_text
    from fastcm.weights.outputs import complete_folder

    classes = measured.generator.classes if measured.generator is not None else getattr(measured.dataset, "class_names", None)
    facts = Facts(f"{Path(args.model).name}, evaluated by fastcm", galleries, world.training, classes, run_log(Path(args.model)))
    content, path = page(result, facts), args.report / "index.html"
    with complete_folder(args.report) as folder:
        write_text(folder / path.name, content)
    return path


def run_log(model: Path) -> list[dict]:
    """The rows of a run folder's log.jsonl; none for other models. A half-written last line is left out."""
    path, rows = model / "log.jsonl", []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows
