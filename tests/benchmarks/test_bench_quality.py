"""The quality tables of README and docs are what the committed results say, and they meet what the pages promise."""

import json
from pathlib import Path

import pytest

from fastcm.benchmarks.quality.generators import PAGES, TRAININGS, search_table, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks" / "results").glob("quality-*.json"))]
SEARCHES = sorted((ROOT / "benchmarks" / "results").glob("search-*.json"))


def newest(data):
    """The newest results that hold rows of a data set, and these rows."""
    found = [(results, [row for row in results["rows"] if row["model"] == data]) for results in RESULTS]
    return next((results, rows) for results, rows in reversed(found) if rows)


@pytest.mark.parametrize("data", PAGES)
def test_pages_show_the_newest_results(data):
    results, rows = newest(data)
    assert table(results, data) in PAGES[data].read_text(encoding="utf-8")
    assert {row["training"] for row in rows} == {*(name for each, name in TRAININGS if each == data), "real images"}


def test_the_models_are_as_good_as_the_pages_promise():
    def one_and_two(data, training):
        return [next(row for row in newest(data)[1] if row["training"] == training and row["nfe"] == nfe) for nfe in (1, 2)]

    one, _ = one_and_two("digits", "ict")
    assert one["accuracy"] >= 0.98 and one["fd_ratio"] <= 1.3 and one["copies"] == 0 and one["count"] == 1797
    one, two = one_and_two("mnist", "`make demo`")
    assert one["accuracy"] >= 0.96 and one["fd_ratio"] <= 8 and two["fd_ratio"] < one["fd_ratio"] and one["copies"] == 0


def test_docs_show_the_newest_search():
    results = json.loads(SEARCHES[-1].read_text(encoding="utf-8"))
    assert search_table(results) in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_two_searched_steps_beat_one():
    rows = {row["nfe"]: row for row in json.loads(SEARCHES[-1].read_text(encoding="utf-8"))["rows"] if row["bench"] == "quality_search"}
    assert len(rows[2]["sigmas"]) == 2 and rows[2]["fid_mean"] + rows[2]["fid_std"] < rows[1]["fid_mean"] - rows[1]["fid_std"]
