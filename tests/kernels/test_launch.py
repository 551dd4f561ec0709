"""launch: which implementation runs, and what is refused."""

import subprocess
import sys

import pytest
import torch
from kernel_checks import using
from torch.utils._python_dispatch import TorchDispatchMode

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
@pytest.mark.parametrize("compiling", [False, True])
def test_unmeasured_ops_on_cuda(op, compiling, monkeypatch):
    """A reference is written to be fused: without a compiler that does it, the kernel is the better in any case."""
    monkeypatch.setattr(launch, "MEASURED", {})
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    fused = compiling and op not in ("philox", "perturb", "renoise", "optimizer_step")
    with using("auto"):
        assert launch.chosen(op, OnCuda()) == ("reference" if fused else "triton")
    with using("triton"):
        assert launch.chosen(op, OnCuda()) == "triton"
    with using("reference"):
        assert launch.chosen(op, OnCuda()) == "reference"


def test_auto_reads_the_nearest_measurement_in_compiled_graphs(monkeypatch):
    monkeypatch.setattr(launch, "MEASURED", {"renoise": ((1000, True), (100_000, False)), "philox": ((1000, False),)})
    with using("auto"):
        assert launch.chosen("renoise", OnCuda(100_000)) == "triton"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with using("auto"):
        taken = {n: launch.chosen("renoise", OnCuda(n)) for n in (100, 300, 1000, 3999, 50_000, 399_999, 500_000)}
        assert taken == {n: "triton" if n in (100, 300, 1000, 3999, 500_000) else "reference" for n in taken}
        assert launch.chosen("philox", OnCuda(1000)) == "reference" and launch.chosen("philox", OnCuda(9000)) == "triton"
        assert launch.chosen("philox", OnCuda(1), elements=1000) == "reference"


def test_forward_mode_takes_the_reference():
    with using("triton"):
        seen = []
        torch.func.jvp(lambda x: seen.append(launch.chosen("perturb", OnCuda())) or x, (torch.ones(1),), (torch.ones(1),))
        assert seen == ["reference"] and launch.chosen("perturb", OnCuda()) == "triton"


def test_export_takes_the_reference(monkeypatch):
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    with using("triton"):
        assert launch.chosen("perturb", OnCuda()) == "reference"


def test_a_compiled_graph_is_no_export_where_torch_says_it_is(monkeypatch):
    """torch 2.11 makes `torch.compiler.is_exporting()` the constant True in every function that it compiles."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with using("triton"):
        assert launch.chosen("group_norm", OnCuda()) == "triton"


@pytest.mark.slow
def test_export_is_told_from_compilation():
    class Told(torch.nn.Module):
        def forward(self, x):
            return x + (10 if launch.is_exporting() else 1)

    x = torch.zeros(2)
    assert torch.compile(Told(), backend="eager", fullgraph=True)(x).tolist() == [1, 1]
    for strict in (False, True):
        assert torch.export.export(Told(), (x,), strict=strict).module()(x).tolist() == [10, 10]
    assert Told()(x).tolist() == [1, 1]


def test_a_launcher_is_called_directly_where_only_its_result_counts(monkeypatch):
    class Own(torch.Tensor):
        pass

    def op(x, n):
        return "op"

    monkeypatch.setitem(launch._launchers, op, lambda x, n: "launcher")
    if not launch.INTERPRETED:
        assert launch.call(op, torch.zeros(2), 3) == "op"  # a CPU's kernel is the interpreted one
    monkeypatch.setattr(launch, "INTERPRETED", True)
    plain, leaf, seen = torch.zeros(2), torch.zeros(2, requires_grad=True), []
    assert (
        launch.call(op, plain, 3) == "launcher" and launch.call(op, leaf, 3) == "op" and launch.call(op, plain.as_subclass(Own), 3) == "op"
    )
    with torch.no_grad():
        assert launch.call(op, leaf, 3) == "launcher" and launch.call(op, torch.nn.Parameter(plain), 3) == "launcher"
    with TorchDispatchMode():
        assert launch.call(op, plain, 3) == "op"
    torch.func.vmap(lambda x: seen.append(launch.call(op, x, 3)) or x)(plain)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert seen == ["op"] and launch.call(op, plain, 3) == "op"


def test_every_registered_op_has_its_launcher():
    ops = {op._qualname: launcher for op, launcher in launch._launchers.items()}
    assert {f"fastcm::{name}" for name in (*launch.OPS, "normal", "uniform_field", "group_norm_backward")} - {"fastcm::philox"} <= set(ops)
    assert all(launcher.__name__.startswith("_launch") for launcher in ops.values())


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
    assert report["philox"] == ("triton", "in compiled graphs as well")
    assert report["distance"] == ("triton", "in compiled graphs the reference: not measured")
    assert report["renoise"] == ("triton", "in compiled graphs at 1 of 2 measured sizes, where it is not slower")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert {(choice, why) for _, choice, why in kernels.report()} == {("reference", "no CUDA device")}
    with using("reference"):
        assert {why for _, _, why in kernels.report()} == {'kernels.use("reference")'}


def test_quarter_grid_covers_every_counter():
    for elements in (1, 2, 63, 64, 105, 784, 1023, 3072, 12288, 3 * 63 * 63, 2**31 - 1):
        quarter = (elements + 3) // 4
        for batch in (1, 7, 128):
            grid = launch.quarter_grid("philox", batch, elements)
            blocks = -(-quarter // grid.block)
            assert grid.samples == 1 or blocks == 1
            assert grid.samples * (grid.programs - 1) < batch * blocks <= grid.samples * grid.programs
            # Four counters to each of 32 threads, whatever the samples.
            assert grid.block & (grid.block - 1) == 0 and grid.block * grid.samples == 128 * grid.num_warps <= 512
    for elements in (3072, 12288):
        assert (elements // 4) % launch.quarter_grid("philox", 1, elements).block == 0
    assert launch.quarter_grid("philox", 128, 64) == (16, 16, 8, 1)
    with pytest.raises(ValueError, match="2147483648. Use fewer than 2"):
        launch.quarter_grid("philox", 1, 2**31)


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
