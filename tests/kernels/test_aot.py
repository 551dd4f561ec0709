"""The machine code of every kernel, compiled without a GPU, against its budget."""

import json
import re

import pytest
import torch
from kernel_checks import ROOT

from fastcm.benchmarks.kernels.cases import Budget, aot_cases, kernel_module
from fastcm.benchmarks.pages import tables
from fastcm.kernels import launch

aot = pytest.importorskip("fastcm.benchmarks.kernels.aot")
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing")

CASES = aot_cases()
LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   FFMA R4, R4, R5, R6 ;
        /*0030*/                   STL.64 [R1], R4 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
"""


def name_of(case):
    return f"{case.op}-{case.variant}-{'x'.join(str(n) for n in case.shape)}"


def test_the_listing_is_read_right():
    opcodes, looped = aot._parse(LISTING)
    assert opcodes == ["LDC", "LDG.E.128.CONSTANT", "FFMA", "STL.64", "BRA", "STG.E.U8", "EXIT"]
    assert looped == 3
    assert [aot._width(opcode) for opcode in ("LDG.E.128.CONSTANT", "STL.64", "LDG.E", "STG.E.U8", "LDG.E.U16")] == [128, 64, 32, 8, 16]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack_bytes": 8}, "stack_bytes is 8"),
        ({"spill_bytes": 16}, "spill_bytes is 16"),
        ({"registers": 65}, "registers is 65, the budget is 64"),
        ({"instructions_per_element": 30.1}, "instructions_per_element is 30.1"),
        ({"bytes_per_element": 4.2}, "bytes_per_element is 4.2"),
        ({"global_stores": {"32": 16}}, "global_stores has 0 accesses of at least 128 bits"),
        ({"global_stores": {"128": 4, "32": 1}}, "narrower than 128 bits"),
        ({"global_loads": {"64": 2, "8": 4}}, "global_loads has 2 accesses of at least 64 bits, the floor assumes 3"),
    ],
)
def test_each_kind_of_fault_is_found(change, fault):
    budget = Budget(instructions=30, bytes_per_element=4, load_bits={64: 3}, store_bits={128: 4})
    row = {"stack_bytes": 0, "spill_bytes": 0, "registers": 64, "instructions_per_element": 30.0, "bytes_per_element": 4.01}
    row |= {"global_loads": {"64": 3}, "global_stores": {"128": 4}}
    assert aot.faults(row, budget) == []
    assert any(fault in found for found in aot.faults(row | change, budget))


def each_case():
    """The first case of each set of kernels for every run, the others where minutes do not count."""
    met = set()
    for case in CASES:
        kernels = frozenset(case.budgets)
        yield pytest.param(case, id=name_of(case), marks=pytest.mark.long if kernels in met else pytest.mark.slow)
        met.add(kernels)


@pytest.mark.parametrize("case", each_case())
def test_machine_code_is_within_budget(case):
    for architecture in aot.ARCHITECTURES:
        rows = aot.rows_of(case, architecture)
        assert {row["kernel"] for row in rows} == set(case.budgets)
        for row in rows:
            found = aot.faults(row, case.budgets[row["kernel"]])
            assert not found, f"{name_of(case)} sm_{architecture} {row['kernel']}: {'; '.join(found)}"


@pytest.mark.slow
@pytest.mark.parametrize("op", ["optimizer_step", "ema_update", "group_norm"])
def test_offsets_into_batches_and_flat_buffers_are_64_bit(op):
    """In the IR: an image or a buffer is reached by 64-bit offsets, or by 32-bit ones within a sample from a 64-bit one to it."""
    cases = {tuple(case.budgets): case for case in CASES if case.op == op}  # one case for each set of kernels
    for case in cases.values():
        for launched in aot.record_launches(case.launch):
            ttir = aot.compile_launch(launched, 90)["ttir"]
            dims = 2 if op == "group_norm" else 1  # vectors of group_norm are weights, which a sample's offset does not reach
            offsets = set(re.findall(rf"tt\.addptr .* : tensor<(?:\d+x){{{dims}}}!tt\.ptr<\w+>>, tensor<(?:\d+x){{{dims}}}(i\d+)>", ttir))
            from_sample = launched.name == "group_statistics_partial" and re.search(r"tt\.addptr .* : !tt\.ptr<\w+>, i64", ttir)
            assert offsets == {"i64"} or from_sample, launched.name


def test_noise_keeps_its_promised_limits():
    """No variant gets a budget of its own: 36 instructions per element for perturb in every layout, dtype and flip, 30 for a normal."""
    limits = {"perturb": 36, "philox": 30}
    budgets = {(case.op, case.variant): case.budgets[case.op].instructions for case in CASES if case.op in limits}
    assert all(instructions <= limits[op] for (op, _), instructions in budgets.items())
    of_perturb = {variant for op, variant in budgets if op == "perturb"}
    for image in ("uint8", "float32", "uint8 channels-last", "float32 channels-last"):
        assert {f"{image}, pair, bf16 copies", f"{image}, pair, bf16 copies, flip"} <= of_perturb


@pytest.mark.slow
def test_a_spill_and_lost_width_would_be_seen():
    """The same kernel with few registers for much work spills; at an odd size it stores one element at a time."""
    philox = kernel_module("philox")
    seed, position = torch.zeros(1, dtype=torch.int64), torch.arange(2)
    (wide,) = aot.record_launches(lambda: philox._launch_normal(seed, position, (3, 32, 32), 0))
    (odd,) = aot.record_launches(lambda: philox._launch_normal(seed, position, (3, 31, 33), 0))
    crowded = aot.Launch(wide.kernel, wide.grid, wide.args, wide.options | {"num_warps": 1, "BLOCK": 512, "maxnreg": 24})
    assert aot.machine_code(aot.compile_launch(wide, 90)["cubin"])["global_stores"] == {"128": 4}
    assert set(aot.machine_code(aot.compile_launch(odd, 90)["cubin"])["global_stores"]) == {"32"}
    spilled = aot.machine_code(aot.compile_launch(crowded, 90)["cubin"])
    assert spilled["spill_bytes"] > 0 and spilled["stack_bytes"] > 0


@pytest.mark.slow
def test_sample_offsets_are_64_bit():
    """Batches pass 2^31 elements: in the IR, the sample's index is widened before it meets the sample's size."""
    seed, images = torch.zeros(1, dtype=torch.int64), torch.empty(2, 3, 32, 32)
    per_sample = torch.ones(2)
    side = (images, images, per_sample, per_sample)
    philox, perturb, renoise, precondition, distance = (
        kernel_module(stem) for stem in ("philox", "perturb", "renoise", "precondition", "distance")
    )
    calls = [
        lambda: philox._launch_normal(seed, seed.expand(2), (3, 32, 32), 0),
        lambda: perturb._launch_perturb(images, seed, seed, per_sample, None, None, None, None, torch.float32),
        lambda: renoise._launch_renoise(images, seed, seed, per_sample, 1, 0.002, None, None, True),
        lambda: renoise._launch_to_uint8(images, "NHWC"),
        lambda: precondition._launch_fwd(images, images, per_sample, per_sample),
        lambda: precondition._launch_bwd(images, per_sample, per_sample, torch.float32, torch.float32, False),
        lambda: distance._launch_fwd(*side, *side, per_sample, "l2", 0.0, True),
        lambda: distance._launch_bwd(images, per_sample),
    ]
    for launched in (aot.record_launches(call)[0] for call in calls):
        ttir = aot.compile_launch(launched, 90)["ttir"]
        assert "arith.constant 3072 : i64" in ttir and "arith.constant 3072 : i32" not in ttir, launched.name


@pytest.mark.parametrize("op", ["precondition", "distance"])
def test_one_coefficient_for_a_batch_is_not_copied(op):
    one, images = torch.rand(1), torch.rand(2, 3, 4, 4)
    given = one.expand(2)
    side = (images, images, given, given)
    module = kernel_module(op)
    arguments = side if op == "precondition" else (*side, *side, given, "l2", 0.0, True)
    (launched,) = aot.record_launches(lambda: module._launch_fwd(*arguments))
    flat = [part for value in launched.args for part in (value if isinstance(value, tuple) else (value,))]
    read = [value for value in flat if isinstance(value, torch.Tensor) and value.data_ptr() == one.data_ptr()]
    assert len(read) == {"precondition": 2, "distance": 5}[op]


@pytest.mark.parametrize("backward", [False, True])
def test_grids_hold_for_large_images(backward):
    """CUDA's second and third axes end at 65,535 programs, which tiles of pixels pass at 2048 x 2048."""
    norm, x = kernel_module("group_norm"), torch.empty(1, 64, 4096, 4096, device="meta").to(memory_format=torch.channels_last)
    statistics = torch.empty(1, 16, device="meta")
    forward, gradient = (x, 16, None, None, 1e-5, None, None, True), (x, x, 16, None, None, None, None, True, statistics, statistics)
    launches = aot.record_launches(lambda: norm._launch_bwd(*gradient) if backward else norm._launch_fwd(*forward))
    assert {launched.name for launched in launches} & {"split_output", "split_gradient"}
    assert all(launched.grid[0] < 2**31 and max(launched.grid[1:], default=0) < 65_536 for launched in launches)


def test_committed_report_covers_the_cases_within_budget():
    content = tables.latest("aot-*.json")
    rows = {(row["op"], row["variant"], tuple(row["shape"]), row["kernel"], row["sm"]): row for row in content["rows"]}
    budgets = {
        (case.op, case.variant, case.shape, kernel, sm): budget
        for case in CASES
        for kernel, budget in case.budgets.items()
        for sm in aot.ARCHITECTURES
    }
    assert set(rows) == set(budgets), "run: fastcm bench kernels --aot --json benchmarks/results/aot-DATE.json"
    assert [] == [fault for key, row in rows.items() for fault in aot.faults(row, budgets[key])]


def test_committed_tables_are_what_the_results_say():
    assert tables.DOCS.read_text(encoding="utf-8") == tables.documented(tables.DOCS.read_text(encoding="utf-8"))
    assert tables.LAUNCH.read_text(encoding="utf-8") == tables.with_auto_table(tables.LAUNCH.read_text(encoding="utf-8"))


def test_results_are_json_of_the_agreed_form():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert {"torch", "commit", "date"} <= set(content["machine"]) and all("bench" in row for row in content["rows"]), path.name
