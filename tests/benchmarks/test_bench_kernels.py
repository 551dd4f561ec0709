"""The kernel benchmark: what it writes, what it refuses, the tables that come of it; and the speed of the CPU paths."""

import contextlib
import json
import types

import pytest
import torch

from fastcm import networks
from fastcm.benchmarks.kernels import bench as bench_kernels
from fastcm.benchmarks.kernels import cases as kernel_cases
from fastcm.benchmarks.kernels.cases_optimizer import NETWORKS
from fastcm.benchmarks.kernels.timing import launches_of, measure
from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.pages import tables
from fastcm.errors import InputError
from fastcm.kernels import launch
from fastcm.training.flat_buffers import FlatLayout


def doubling(shape=(4, 8), *, fastcm=lambda x: 2 * x, in_place=False):
    """A tiny case of an op that doubles its input."""
    return kernel_cases.BenchCase(
        op="doubling",
        variant="plain",
        shape=shape,
        inputs=lambda device: (torch.rand(shape, device=device) + 1,),
        fastcm=fastcm,
        reference=lambda x: x.add_(x) if in_place else x + x,
        bytes=8 * 32,
        in_place=in_place,
        quick=True,
    )


def run(monkeypatch, path, case, *options):
    monkeypatch.setattr(bench_kernels, "bench_cases", lambda: [case])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # Inductor takes seconds for each
    code = bench_kernels.main(["--device", "cpu", "--quick", "--json", str(path), *options])
    return code, json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_rows_are_written_and_not_measured_again(monkeypatch, tmp_path, capsys):
    code, rows = run(monkeypatch, tmp_path / "k.json", doubling())
    assert code == 0 and [row["backend"] for row in rows] == ["eager", "compile", "fastcm"]
    for row in rows:
        assert row["bench"] == "kernels" and row["op"] == "doubling" and row["shape"] == [4, 8] and row["regime"] == "cpu"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["percent_of_copy"] > 0
        assert row["gb_s"] == pytest.approx(8 * 32 / row["p50_ms"] / 1e6, rel=1e-2)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert run(monkeypatch, tmp_path / "k.json", doubling()) == (0, rows)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "case",
    [
        doubling(fastcm=lambda x: 2.01 * x),
        doubling(fastcm=lambda x: x * torch.tensor(float("nan"))),
        doubling(fastcm=lambda x: x.mul_(3), in_place=True),
    ],
    ids=["off", "nan", "in place"],
)
@pytest.mark.slow
def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path, case):
    code, rows = run(monkeypatch, tmp_path / "k.json", case)
    assert code == 1 and "p50_ms" in rows[0]
    assert "differs from the reference" in rows[-1]["error"] and "p50_ms" not in rows[-1]


@pytest.mark.slow
def test_in_place_ops_are_compared_by_what_they_leave(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path / "k.json", doubling(fastcm=lambda x: x.mul_(2), in_place=True))[0] == 0


def test_filters_and_bad_options(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="unknown op in --op: renois. Use one of .*Did you mean 'renoise'"):
        bench_kernels.main(["--op", "renois"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device for --device: cuda"):
            bench_kernels.main(["--device", "cuda", "--op", "philox"])
    monkeypatch.setattr(bench_kernels, "bench_cases", lambda: [doubling()])
    assert bench_kernels.main(["--device", "cpu", "--batch", "5", "--json", str(tmp_path / "none.json")]) == 0
    assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
def test_every_bench_case_runs_on_a_small_scale():
    """Fast and reference paths of all registered cases agree in form; the largest are left to the GPU."""
    for case in kernel_cases.bench_cases():
        assert case.bytes > 0 and case.op in launch.OPS, case.op
        if case.quick and case.bytes < 2**25:
            assert bench_kernels._difference(case, case.inputs(torch.device("cpu"))) <= case.rtol, (case.op, case.variant)


def measured(op, shape, *, variant="v", **p50_ms):
    return [
        {"bench": "kernels", "op": op, "variant": variant, "shape": shape, "regime": "flushed", "backend": backend, "p50_ms": value}
        for backend, value in p50_ms.items()
    ]


def test_auto_table_takes_the_kernel_where_it_does_not_lose():
    rows = [
        *measured("renoise", [2, 8], fastcm=1.0, compile=2.0, compile_reference=0.9),
        *measured("renoise", [4, 8], fastcm=1.0, compile=0.5, compile_reference=0.99),
        *measured("distance", [2, 8], fastcm=1.0, compile=1.5),
        *measured("distance", [2, 8], variant="w", fastcm=1.0, compile=0.5),
        *measured("distance", [16], fastcm=1.0, eager=0.5),
        *[row | {"regime": "cpu"} for row in measured("philox", [2, 8], fastcm=9.0, compile=1.0)],
    ]
    rows.append({**rows[0], "op": "philox", "regime": "flushed", "error": "out of memory"} | {"p50_ms": None})
    rows[-1].pop("p50_ms")
    assert tables.auto_table(rows) == {"renoise": ((16, False), (32, True)), "distance": ((16, False),)}


def test_auto_table_becomes_the_source_that_launch_reads(monkeypatch):
    rows = [*measured("renoise", [2, 8], fastcm=1.0, compile=2.0), *measured("renoise", [4, 8], fastcm=1.0, compile=0.5)]
    monkeypatch.setattr(tables, "latest", lambda pattern, on_gpu: {"rows": rows})
    source = tables.with_auto_table(tables.LAUNCH.read_text(encoding="utf-8"))
    assert 'MEASURED: dict[str, tuple[tuple[int, bool], ...]] = {\n    "renoise": ((16, True), (32, False),),\n}\n' in source
    assert source.count("# auto table:") == 2
    compile(source, "launch.py", "exec")


def test_only_the_newest_results_of_a_gpu_count(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.latest("kernels*.json", on_gpu=True) is None
    for name, gpu, date in (("kernels-b", "old", "2025-01-01"), ("kernels-a", "new", "2025-06-01"), ("kernels", None, "2025-07-01")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"gpu": gpu, "date": date}, "rows": []}), encoding="utf-8")
    assert tables.latest("kernels*.json", on_gpu=True)["machine"]["gpu"] == "new"
    assert tables.latest("kernels*.json", on_gpu=False)["machine"]["date"] == "2025-07-01"
    assert tables.latest("kernels*.json")["machine"]["date"] == "2025-07-01"


def test_measured_rows_become_a_table():
    rows = measured("renoise", [2, 8], fastcm=1.0, compile=2.0)
    rows[0] |= {"gb_s": 812.34, "percent_of_copy": 91.0}
    machine = {"gpu": "G", "processor": "P", "threads": 2, "driver": "1", "torch": "2", "triton": "3", "date": "d"}
    lines = tables.bench_table({"machine": machine, "rows": rows}).splitlines()
    assert lines[0].startswith("G, driver 1, torch 2, triton 3 (d)")
    assert lines[2] == "| op | variant | shape | cache | compile | fastcm | GB/s | % of copy | auto takes |"
    assert lines[4] == "| renoise | v | 2x8 | flushed | 2 | 1 | 812 | 91 | kernel |"
    lines = tables.bench_table({"machine": machine | {"gpu": None}, "rows": rows}).splitlines()
    assert lines[0].startswith("2 threads of P, torch 2 (d)")
    assert lines[2] == "| op | variant | shape | compile | fastcm | GB/s | % of copy |"
    assert lines[4] == "| renoise | v | 2x8 | 2 | 1 | 812 | 91 |"


def test_a_flushed_call_is_timed_as_a_replay(monkeypatch):
    """From the host a short call would be timed with the host's own work in it."""
    done = []

    class Graph:
        def replay(self):
            done.append("replay")

    @contextlib.contextmanager
    def capture(graph, stream):
        done.append("capture")
        yield

    event = types.SimpleNamespace(record=lambda stream: done.append("event"), synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    device = types.SimpleNamespace(L2_cache_size=2**20)
    replaced = {"CUDAGraph": Graph, "graph": capture, "Event": lambda enable_timing: event, "synchronize": lambda: None}
    replaced |= {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda stream: contextlib.nullcontext()}
    replaced |= {"get_device_properties": lambda index: device, "current_device": lambda: 0}
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    flush = types.SimpleNamespace(zero_=lambda: done.append("flush"))
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: flush)
    assert measure(lambda: done.append("call"), regime="flushed", seconds=0) == (1.0, 1.0, 1.0)
    assert done[:7] == ["call"] * 4 + ["capture", "call", "replay"]
    assert done[7:] == ["flush", "event", "replay", "event"] * 10


@pytest.mark.hardware("measures GB/s")
@pytest.mark.gpu
def test_timing_on_a_gpu():
    device = torch.device("cuda")
    assert 200 < bench_kernels.copy_gb_s(2**31, "flushed", device) < 20_000
    x = torch.rand(2**20, device=device)
    assert launches_of(lambda: x.mul(2)) == 1 and launches_of(lambda: x.mul(2).add(1)) == 2
    one, two = (measure(call, regime="resident", seconds=0.2)[1] for call in (lambda: x.mul(2), lambda: x.mul(2).mul(2)))
    assert 1.5 < two / one < 2.5


@pytest.mark.parametrize("name", NETWORKS)
def test_flat_buffers_are_those_of_the_published_networks(name):
    """Within 2 % for the digits, whose preset may change; 55.7, 295.9 and 526.3 million for the others."""
    with torch.device("meta"):
        network = networks.build(MODELS[name].kind, MODELS[name].options)
    layout, (elements, tensors) = FlatLayout(network, channels_last=True), NETWORKS[name]
    assert elements % 16 == 0 and elements == pytest.approx(layout.size, rel=0.02 if name == "digits" else 0)
    assert name == "digits" or tensors == len(layout.names)


# Cases of a few milliseconds, each as plain torch has it and as fastcm runs it on a CPU; the compiled ones are in `fastcm bench kernels`.
SPEED_CASES = [
    pytest.param(case, backend, id=f"{case.op}-{case.variant}-{'x'.join(str(n) for n in case.shape)}-{backend}")
    for case in kernel_cases.bench_cases()
    if case.quick and case.bytes < 2**25
    for backend in ("eager", *case.variants, "fastcm")
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "backend"), SPEED_CASES)
def test_speed(benchmark, case, backend):
    """Speed of an op on the CPU: `pytest --benchmark-only` on this file compares its backends, a group for each op."""
    benchmark.group = f"{case.op}, {case.variant}, {'x'.join(str(n) for n in case.shape)}"
    inputs = case.inputs(torch.device("cpu"))
    call = case.fastcm if backend == "fastcm" else case.variants.get(backend) or case.idiom or case.reference
    before = [t.clone() for t in inputs if isinstance(t, torch.Tensor)]
    results = benchmark.pedantic(call, inputs, rounds=3, warmup_rounds=1)
    if case.in_place:
        assert any(not torch.equal(was, now) for was, now in zip(before, (t for t in inputs if isinstance(t, torch.Tensor)), strict=True))
    else:
        results = torch.utils._pytree.tree_leaves(results)
        assert results and all(torch.isfinite(t.float()).all() and t.float().std() > 0 for t in results if t is not None)
