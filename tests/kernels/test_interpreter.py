"""Every kernel under Triton's interpreter: the kernels' own tests again, in a process that runs kernels on CPU tensors."""

import re

import pytest
from kernel_checks import KERNEL_TESTS, run_interpreted


@pytest.mark.slow
@pytest.mark.parametrize("test_file", KERNEL_TESTS)
def test_kernels_pass_their_tests_interpreted(test_file):
    closing = run_interpreted([test_file])
    assert int(re.search(r"(\d+) passed", closing)[1]) > 3, closing
    assert "skipped" not in closing, closing
