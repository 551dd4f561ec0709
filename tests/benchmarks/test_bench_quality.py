"""The quality tables of README and docs are what the committed results say, and they meet what the pages promise."""

import json
from pathlib import Path

from fastcm.benchmarks.quality.generators import TRAININGS, search_table, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("quality-*.json"))
SEARCHES = sorted((ROOT / "benchmarks" / "results").glob("search-*.json"))


def test_readme_shows_the_newest_results():
    results = json.loads(RESULTS[-1].read_text(encoding="utf-8"))
    assert table(results) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {row["training"] for row in results["rows"]} == {*TRAININGS, "real images"}


def test_the_default_model_is_good_in_one_step():
    rows = json.loads(RESULTS[-1].read_text(encoding="utf-8"))["rows"]
    one = next(row for row in rows if row["training"] == "ict" and row["nfe"] == 1)
    assert one["accuracy"] >= 0.98 and one["fd_ratio"] <= 1.3 and one["copies"] == 0 and one["count"] == 1797


def test_docs_show_the_newest_search():
    results = json.loads(SEARCHES[-1].read_text(encoding="utf-8"))
    assert search_table(results) in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_two_searched_steps_beat_one():
    rows = {row["nfe"]: row for row in json.loads(SEARCHES[-1].read_text(encoding="utf-8"))["rows"] if row["bench"] == "quality_search"}
    assert len(rows[2]["sigmas"]) == 2 and rows[2]["fid_mean"] + rows[2]["fid_std"] < rows[1]["fid_mean"] - rows[1]["fid_std"]
