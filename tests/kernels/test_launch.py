"""launch: which implementation runs, and what is refused."""

import subprocess
import sys

import pytest
import torch
from kernel_checks import using

from fastcm import kernels
from fastcm.kernels import launch


class OnCuda:
    """What `chosen` reads of a CUDA tensor."""

    is_cuda = True

    def __init__(self, elements=64):
        self.elements = elements

    def numel(self):
        return self.elements


def test_use_refuses_an_unknown_implementation():
    with pytest.raises(ValueError, match=r"kernels\.use: 'cuda'\. Use \"auto\""):
        kernels.use("cuda")


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter runs kernels on the CPU")
def test_a_cpu_tensor_takes_the_reference():
    for implementation in ("auto", "triton", "reference"):
        with using(implementation):
            assert launch.chosen("philox", torch.zeros(4)) == "reference"


@pytest.mark.parametrize("op", launch.OPS)
def test_unmeasured_ops_on_cuda(op, monkeypatch):
    monkeypatch.setattr(launch, "MEASURED", {})
    with using("auto"):
        assert launch.chosen(op, OnCuda()) == ("triton" if op in ("philox", "perturb", "optimizer_step") else "reference")
    with using("triton"):
        assert launch.chosen(op, OnCuda()) == "triton"
    with using("reference"):
        assert launch.chosen(op, OnCuda()) == "reference"


def test_auto_reads_the_nearest_measurement(monkeypatch):
    monkeypatch.setattr(launch, "MEASURED", {"renoise": ((1000, True), (100_000, False)), "philox": ((1000, False),)})
    with using("auto"):
        taken = {n: launch.chosen("renoise", OnCuda(n)) for n in (100, 300, 1000, 3999, 50_000, 399_999, 500_000)}
        assert taken == {
            100: "reference",
            300: "triton",
            1000: "triton",
            3999: "triton",
            50_000: "reference",
            399_999: "reference",
            500_000: "reference",
        }
        assert launch.chosen("philox", OnCuda(1000)) == "reference" and launch.chosen("philox", OnCuda(9000)) == "triton"
        assert launch.chosen("philox", OnCuda(1), elements=1000) == "reference"


def test_forward_mode_takes_the_reference():
    with using("triton"):
        seen = []
        torch.func.jvp(lambda x: seen.append(launch.chosen("perturb", OnCuda())) or x, (torch.ones(1),), (torch.ones(1),))
        assert seen == ["reference"] and launch.chosen("perturb", OnCuda()) == "triton"


def test_export_takes_the_reference(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with using("triton"):
        assert launch.chosen("perturb", OnCuda()) == "reference"


def test_an_input_that_needs_a_gradient_takes_the_reference():
    weight = torch.ones(1, requires_grad=True)
    with using("triton"):
        assert launch.chosen("perturb", OnCuda(), differentiated=(None, weight)) == "reference"
        with torch.no_grad():
            assert launch.chosen("perturb", OnCuda(), differentiated=(None, weight)) == "triton"


def test_report_names_every_op_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "MEASURED", {"renoise": ((1000, True), (100_000, False))})
    with using("auto"):
        report = {op: (choice, why) for op, choice, why in kernels.report()}
    assert tuple(report) == launch.OPS
    assert report["philox"] == ("triton", "not measured") and report["distance"] == ("reference", "not measured")
    assert report["renoise"] == ("triton", "not slower at 1 of 2 measured sizes")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert {(choice, why) for _, choice, why in kernels.report()} == {("reference", "no CUDA device")}
    with using("reference"):
        assert {why for _, _, why in kernels.report()} == {'kernels.use("reference")'}


def test_quarter_grid_covers_every_counter():
    for elements in (1, 2, 63, 64, 105, 784, 1023, 3072, 12288, 3 * 63 * 63, 2**31 - 1):
        grid = launch.quarter_grid("philox", elements)
        quarter = (elements + 3) // 4
        assert grid.block * (grid.blocks - 1) < quarter <= grid.block * grid.blocks
        assert grid.block & (grid.block - 1) == 0 and grid.block >= 16 and grid.num_warps in (1, 2, 4)
    for elements in (3072, 12288):
        assert (elements // 4) % launch.quarter_grid("philox", elements).block == 0
    with pytest.raises(ValueError, match="2147483648. Use fewer than 2"):
        launch.quarter_grid("philox", 2**31)


def test_strided_broadcasts_by_a_stride_of_zero():
    one, many = torch.ones(1), torch.ones(3)
    assert launch.strided(None, 3) == (None, 0) and launch.strided(one, 3) == (one, 0)
    assert launch.strided(many, 3)[1] == 1 and launch.strided(torch.ones(3, 4), 3)[1] == 4
    # A constant of the kernel: other strides would be compiled one by one.
    spread, stride = launch.strided(torch.arange(6)[::2], 3)
    assert stride == 1 and spread.tolist() == [0, 2, 4]
    assert launch.strided(one.expand(3), 3)[1] == 0


@pytest.mark.slow
def test_kernels_import_and_run_without_triton():
    script = """
        import sys
        sys.modules["triton"] = None
        import torch
        from fastcm import kernels
        from fastcm.kernels import launch
        assert not launch.HAS_TRITON
        kernels.use("triton")
        seed = torch.zeros(2, dtype=torch.int64)
        x = kernels.perturb(torch.zeros(2, 1, 4, 4), seed, seed, torch.ones(2)).x_hi
        assert torch.equal(x, kernels.normal(seed, seed, (1, 4, 4), stream=0)) and x.std() > 0.5
        print({why for _, _, why in kernels.report()})
    """
    lines = "\n".join(line.strip() for line in script.strip().splitlines())
    result = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "{'triton is not installed'}"
