"""Every kernel under Triton's interpreter: the kernels' own tests again, in processes that run kernels on CPU tensors."""

import re

import pytest
from kernel_checks import KERNEL_TESTS, run_interpreted

PARTS = 3  # a process for each file would spend a third of its time on imports


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_pass_their_tests_interpreted(part):
    files = KERNEL_TESTS[part::PARTS]
    closing = run_interpreted(files)
    assert int(re.search(r"(\d+) passed", closing)[1]) > 10 * len(files), closing
    assert "skipped" not in closing, closing
