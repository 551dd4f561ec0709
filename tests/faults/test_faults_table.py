"""The table of faults: it has all 25, names tests that exist, counts what they report, and goes on where it stopped."""

import json
import re
from pathlib import Path

import pytest

from fastcm.benchmarks.reliability import faults
from fastcm.benchmarks.reliability.fault_list import FAULTS
from fastcm.errors import RunError

TESTS = Path(__file__).parents[1]


def test_every_fault_has_tests_that_exist():
    assert [fault.number for fault in FAULTS] == list(range(1, 26))
    for fault in FAULTS:
        for test in fault.tests:
            file, _, name = test.partition("::")
            text = (TESTS / file).read_text(encoding="utf-8")
            function, _, case = name.partition("[")
            assert not name or re.search(rf"^def {function}\(", text, re.MULTILINE), test
            assert not case or f'"{case.rstrip("]")}"' in text, test


REPORT = """<testsuites><testsuite time="3.5">
<testcase name="a"><properties><property name="tries" value="40"/><property name="seen" value="forty kills"/></properties></testcase>
<testcase name="b"/>
<testcase name="c">{inside}</testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("inside", "result"),
    [
        ("", {"tries": 42, "seen": "forty kills", "verdict": "pass"}),
        ('<skipped message="no root"/>', {"tries": 41, "seen": "forty kills; 1 skipped (no root)", "verdict": "pass"}),
        ("<failure/>", {"tries": 42, "seen": "1 tests failed: c", "verdict": "FAIL"}),
        ("<error/>", {"tries": 42, "seen": "1 tests failed: c", "verdict": "FAIL"}),
    ],
)
def test_a_report_becomes_a_row(tmp_path, inside, result):
    (tmp_path / "report.xml").write_text(REPORT.format(inside=inside))
    assert faults.read_report(tmp_path / "report.xml") == {**result, "seconds": 3.5}


def test_what_passed_is_not_injected_again_and_what_failed_ends_in_an_error(tmp_path, monkeypatch):
    def inject(fault, *, quick):
        injected.append(fault.number)
        return {"tries": 1, "seen": "x | y", "verdict": "FAIL" if fault.number == 7 and broken else "pass", "seconds": 0.0}

    injected, broken = [], True
    monkeypatch.setattr(faults, "inject", inject)
    options = ["--out", str(tmp_path / "page.md"), "--state", str(tmp_path / "state.json")]
    with pytest.raises(RunError, match=r"do not pass in .*page.md: 7\."):
        faults.main(options)
    assert injected == list(range(1, 26))
    broken = False
    assert faults.main(options) == 0
    assert injected[25:] == [7]
    text = (tmp_path / "page.md").read_text()
    assert "25 of 25 faults pass" in text and text.count("| pass |") == 25 and r"x \| y" in text
    content = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**content, "commit": "another"}))
    faults.main([*options, "--only", "3,4"])
    assert injected[26:] == [3, 4]
    assert "2 of 25 faults pass" in (tmp_path / "page.md").read_text()
