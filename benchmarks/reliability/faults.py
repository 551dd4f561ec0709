"""The 25 faults of docs/reliability.md: injected by tests, as often as the page states; `make faults` runs them and writes the table.

    python -m fastcm.benchmarks.reliability.faults --out docs/reliability.md [--quick] [--only 8,13]

Needs the checkout. Goes on where it stopped: a fault that passed at this commit is not injected again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from fastcm.benchmarks.reliability.fault_list import FAULTS, Fault
from fastcm.benchmarks.results_file import machine
from fastcm.errors import InputError, RunError

ROOT = Path(__file__).resolve().parents[2]
PAGE = """# Reliability

What goes wrong in long runs and with files from elsewhere, injected on purpose, and what fastcm did. Each row is a set of tests in
`tests/`, run by `make faults`; a thin slice of the same tests ({quick}) runs in `make test` and
`make test-all`. A try is one injection: a kill, a mutant, a bad file.

{count} of 25 faults pass. {counts}, {date}, commit {commit}, Python {python}, torch {torch}, {processor}.

| number | fault | tries | expected | seen | verdict |
|---|---|---|---|---|---|
{rows}

"As expected" means that every assertion of those tests held: exit code, the one line on stderr, what is on disk afterwards, and bits where
bits are promised. The checkpoint design behind rows 8 to 18, and what is trusted in rows 19 and 23: [SECURITY.md](../SECURITY.md).
There is no option that resumes at a chosen step: a run goes on from its newest good checkpoint. A checkpoint that is read by its own path
(`fastcm.training.checkpoint.read_checkpoint`) and is damaged is an error; to go back, delete the newer folders.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.reliability.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md", help="the page to write")
    parser.add_argument("--quick", action="store_true", help="the counts of make test: minutes, not an hour")
    parser.add_argument("--only", help="numbers of faults, as 8,13")
    parser.add_argument("--state", type=Path, help="what passed so far (default: runs/faults.json, with --quick runs/faults-quick.json)")
    args = parser.parse_args(argv)
    if not (ROOT / "tests").is_dir():
        raise InputError(f"no tests in {ROOT}: faults are injected by them. Run it in a checkout.")
    state = args.state or ROOT / "runs" / ("faults-quick.json" if args.quick else "faults.json")
    facts = machine()
    results = read_state(state, facts["commit"])
    wanted = None if args.only is None else {int(number) for number in args.only.split(",")}
    for fault in FAULTS:
        if (wanted is None or fault.number in wanted) and results.get(str(fault.number), {}).get("verdict") != "pass":
            results[str(fault.number)] = inject(fault, quick=args.quick)
            write(state, json.dumps({"commit": facts["commit"], "results": results}, indent=1) + "\n")
            print(row(fault, results[str(fault.number)]), flush=True)
    write(args.out, page(results, facts, quick=args.quick))
    failed = [number for number, result in results.items() if result["verdict"] != "pass"]
    if failed:
        raise RunError(f"faults that do not pass in {args.out}: {', '.join(failed)}. See the rows.")
    return 0


def read_state(path: Path, commit: str | None) -> dict[str, dict]:
    """Results by number, of this commit alone."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["results"] if content["commit"] == commit else {}


def inject(fault: Fault, *, quick: bool) -> dict:
    """Runs the fault's tests: {"tries", "seen", "verdict", "seconds"}."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {**os.environ, "FASTCM_FAULTS": "quick" if quick else "full"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "10000", f"--junitxml={report}"]
        command += [f"tests/{test}" for test in fault.tests]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not report.exists():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
            return {"tries": 0, "seen": f"the tests did not run: {last[0]}", "verdict": "FAIL", "seconds": 0.0}
        return read_report(report)


def read_report(path: Path) -> dict:
    """The result that a JUnit report of the fault's tests amounts to. A test counts as one try unless it says how many it made."""
    suite = ElementTree.parse(path).getroot().find("testsuite")
    tries, said, failed, skipped = 0, [], [], []
    for case in suite.iter("testcase"):
        properties = {item.get("name"): item.get("value") for item in case.iter("property")}
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.get("name"))
        elif case.find("skipped") is not None:
            skipped.append(case.find("skipped").get("message", ""))
            continue
        tries += int(properties.get("tries", 1))
        if "seen" in properties:
            said.append(properties["seen"])
    if failed:
        seen = f"{len(failed)} tests failed: {', '.join(failed[:3])}"
    else:
        seen = "; ".join(said) or "as expected"
    if skipped:
        seen += f"; {len(skipped)} skipped ({skipped[0]})"
    return {"tries": tries, "seen": seen, "verdict": "FAIL" if failed or not tries else "pass", "seconds": float(suite.get("time"))}


def row(fault: Fault, result: dict) -> str:
    cells = (fault.number, fault.what, f"{result['tries']:,}", fault.expected, result["seen"], result["verdict"])
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def page(results: dict[str, dict], facts: dict, *, quick: bool) -> str:
    missing = {"tries": 0, "seen": "not injected yet", "verdict": "not run"}
    rows = [row(fault, results.get(str(fault.number), missing)) for fault in FAULTS]
    passed = sum(result["verdict"] == "pass" for result in results.values())
    return PAGE.format(
        quick="3 kills, 60 mutants of each kind of file",
        count=passed,
        rows="\n".join(rows),
        counts="Counts of the thin slice (--quick)" if quick else "Full counts",
        **facts,
    )


def write(path: Path, text: str) -> None:
    """Complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, RunError) as error:
        sys.exit(f"faults: {error}")
