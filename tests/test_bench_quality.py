"""The README's quality table is what the committed results say, and they meet what the README promises."""

import json
from pathlib import Path

from fastcm.benchmarks.bench_quality import TRAININGS, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("quality-*.json"))


def test_readme_shows_the_newest_results():
    results = json.loads(RESULTS[-1].read_text(encoding="utf-8"))
    assert table(results) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {row["training"] for row in results["rows"]} == {*TRAININGS, "real images"}


def test_the_default_model_is_good_in_one_step():
    rows = json.loads(RESULTS[-1].read_text(encoding="utf-8"))["rows"]
    one = next(row for row in rows if row["training"] == "ict" and row["nfe"] == 1)
    assert one["accuracy"] >= 0.98 and one["fd_ratio"] <= 1.3 and one["copies"] == 0 and one["count"] == 1797
