"""The small tables of the pages are what the newest results say."""

import pytest

from fastcm.benchmarks.pages import between_marks as page_tables
from fastcm.benchmarks.pages.between_marks import ROOT, TABLES, PageTable, field, mark, markdown


@pytest.mark.parametrize("name", TABLES)
def test_the_page_shows_the_newest_results(name):
    text = (ROOT / TABLES[name].page).read_text(encoding="utf-8")
    assert text.split(mark(name))[1].strip() == markdown(TABLES[name])


def test_rows_and_machine(monkeypatch):
    machine = {"cores": 2, "processor": "P", "torch": "T", "date": "2026-01-01", "commit": "c"}
    rows = [{"op": "a", "x": 1234.5}, {"op": "b", "x": 1.0}, {"op": "a"}]
    monkeypatch.setattr(page_tables, "latest", lambda pattern: {"machine": machine, "rows": rows} if pattern == "x-*.json" else None)
    table = PageTable("p", "x-*.json", lambda row: row["op"] == "a", {"op": field("op"), "x": field("x", "{:,.1f}")})
    assert markdown(table) == "| op | x |\n|---|---|\n| a | 1,234.5 |\n| a | - |\n\n2 cores of P, torch T, 2026-01-01, commit c."
    assert markdown(table._replace(results="y-*.json")) == "Not measured yet."
