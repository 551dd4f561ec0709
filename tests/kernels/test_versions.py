"""The older version that constraints.txt names beside the pinned one: every kernel compiles with triton 3.6, within its budget."""

import json
import os
import re
import subprocess
import sys

import pytest
from kernel_checks import KERNEL_TESTS, ROOT, run_interpreted

from fastcm.kernels import launch

pytest.importorskip("triton")
pytestmark = [pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing"), pytest.mark.timeout(1800)]

OLDER = "3.6.0"
LONGEST = 1700  # seconds; some hundred compilations take two minutes of one core
WITHIN_BUDGET = """
from fastcm.benchmarks.kernels import aot
from fastcm.benchmarks.kernels.cases import aot_cases
import triton
cases = aot_cases()
for case in cases:
    for row in aot.rows_of(case, 90):
        for fault in aot.faults(row, case.budgets[row["kernel"]]):
            print(case.op, case.variant, row["kernel"], fault)
print(triton.__version__, len(cases))
"""


@pytest.fixture(scope="module", name="older")
def older_triton(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that imports the older Triton, which pip puts into a folder of its own."""
    folder = tmp_path_factory.mktemp("triton")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), f"triton=={OLDER}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    if result.returncode:
        pytest.skip(f"triton {OLDER} cannot be had: {result.stderr.strip().splitlines()[-1][:200]}")
    path = os.pathsep.join((str(folder), str(ROOT / "tests" / "kernels")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.long
def test_every_specialisation_of_the_tests_compiles_with_the_older_triton(older, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "specialisations", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    command += ["-m", "not gpu and not slow", *KERNEL_TESTS]
    environment = older | {"TRITON_CACHE_DIR": str(tmp_path)}  # what it holds is not assembled: nobody else may find it
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=LONGEST, check=False)
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["triton"] == OLDER and found["failed"] == {} and found["compiled"] > 400, found


@pytest.mark.long
def test_machine_code_of_the_older_triton_is_within_budget(older):
    command = [sys.executable, "-c", WITHIN_BUDGET]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=older, timeout=LONGEST, check=False)
    *faults, closing = result.stdout.strip().splitlines() or [result.stderr[-2000:]]
    version, cases = closing.split()
    assert version == OLDER and int(cases) > 60 and faults == []


@pytest.mark.long
@pytest.mark.parametrize("stem", ["group_statistics", "optimizer_step"])  # those with loops, which 3.6 counts by array indices
def test_kernels_pass_their_tests_in_the_older_interpreter(older, stem):
    closing = run_interpreted([f"tests/kernels/test_{stem}.py"], environment=older)
    assert int(re.search(r"(\d+) passed", closing)[1]) > 3, closing
