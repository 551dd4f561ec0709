"""What the benchmarks share: models and their plain twins, timing in turns, options, files of results."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from benchmark_models import TINY, TINY_MODEL
from torch import nn

from fastcm import networks
from fastcm.benchmarks import interleaved, results_file
from fastcm.benchmarks.latency import backends as latency_backends
from fastcm.benchmarks.latency import bench as bench_latency
from fastcm.benchmarks.models import MODELS, forward_flops, randomise
from fastcm.benchmarks.plain import PlainDenoiser, plain_network
from fastcm.benchmarks.results_file import ResultsFile
from fastcm.benchmarks.training import bench as bench_train
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError

CPU = torch.device("cpu")


# Results files


def results(path, machine=None, monkeypatch=None):
    if machine is not None:
        monkeypatch.setattr(results_file, "machine", lambda: dict(machine))
    return ResultsFile(path, identity=("bench", "batch"))


def test_a_results_file_is_complete_after_every_row(tmp_path):
    path = tmp_path / "new" / "out.json"
    file = results(path)
    for batch in (1, 4):
        file.add({"bench": "x", "batch": batch, "p50_ms": 1.5})
        assert [row["batch"] for row in json.loads(path.read_text())["rows"]] == [1, 4][: 1 + (batch == 4)]
    again = results(path)
    assert again.find({"bench": "x", "batch": 4, "p50_ms": None}) == {"bench": "x", "batch": 4, "p50_ms": 1.5}
    assert again.find({"bench": "y", "batch": 4}) is None
    again.add({"bench": "x", "batch": 1, "error": "out of memory"}, {"bench": "y", "batch": 1})
    rows = json.loads(path.read_text())["rows"]
    assert [(row["bench"], row["batch"]) for row in rows] == [("x", 4), ("x", 1), ("y", 1)]
    assert results(path).find({"bench": "x", "batch": 1}) is None  # what failed is measured again
    assert list(path.parent.iterdir()) == [path]


def test_a_results_file_is_of_one_machine(tmp_path, monkeypatch):
    path, here = tmp_path / "out.json", {"processor": "A", "torch": "2.13", "commit": "one", "date": "2026-01-01"}
    results(path, here, monkeypatch).add({"bench": "x", "batch": 1})
    results(path, here | {"commit": "two", "date": "2026-01-02"}, monkeypatch).add({"bench": "x", "batch": 2})
    content = json.loads(path.read_text())
    assert content["machine"]["commit"] == "one" and [row.get("commit") for row in content["rows"]] == [None, "two"]
    with pytest.raises(InputError, match=r"another machine in --json: .*torch 2.13 -> 2.11"):
        results(path, here | {"torch": "2.11"}, monkeypatch)
    path.write_text("[]")
    with pytest.raises(InputError, match="not a results file in --json"):
        results(path, here, monkeypatch)


def test_the_machine_is_described():
    machine = results_file.machine()
    assert machine["torch"].split("+")[0] == torch.__version__.split("+")[0] and machine["cores"] >= 1 and machine["processor"]
    assert {"driver", "gpu", "commit", "date", "triton", "python"} <= set(machine)


# Timing in turns


class FakeTime:
    """A clock that stands still but for what calls take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(interleaved.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(interleaved.time, "perf_counter_ns", lambda: round(self.now * 1e9))
        monkeypatch.setattr(interleaved.time, "sleep", self.take)

    def take(self, seconds):
        self.now += seconds


@pytest.mark.slow
def test_rounds_time_every_call_in_turns(monkeypatch):
    clock, order = FakeTime(monkeypatch), []

    def call(name, seconds):
        def timed(turn):
            order.append((turn, name))
            clock.take(seconds * (1 + turn))  # the machine slows down: every competitor meets it

        return timed

    calls = {"a": call("a", 0.001), "b": call("b", 0.003), "c": call("c", 0.002)}
    times = interleaved.rounds(calls, interleaved.Limits(seconds=0.2, fewest=2, most=50), settle_s=0.01)
    turns = len(times["a"])
    assert 2 < turns < 50 and clock.now >= 0.2
    assert [sorted(order[3 * i : 3 * i + 3]) for i in range(turns)] == [[(i, "a"), (i, "b"), (i, "c")] for i in range(turns)]
    assert len({tuple(name for _, name in order[3 * i : 3 * i + 3]) for i in range(turns)}) > 1  # shuffled
    np.testing.assert_allclose(times["b"], 3.0 * np.arange(1, turns + 1))
    assert interleaved.speedup(times["a"], times["b"]) == 3.0 and interleaved.speedup(times["b"], times["a"]) == 0.3333
    assert len(interleaved.rounds(calls, interleaved.Limits(seconds=0, fewest=4, most=50))["c"]) == 4
    order.clear()
    warmed = interleaved.rounds(calls, interleaved.Limits(seconds=0, fewest=2, most=50), warm=2)
    np.testing.assert_allclose(warmed["b"], [3.0, 6.0])  # the last of a turn's three calls alone
    assert len(order) == 2 * 3 * 3
    assert len(interleaved.rounds(calls, interleaved.Limits(seconds=99, fewest=1, most=6))["c"]) == 6


def test_percentiles_have_their_names():
    figures = interleaved.percentiles(np.arange(101.0), prefix="device_")
    assert figures == {f"device_p{p}_ms": float(p) for p in (20, 50, 80, 95, 99)}


# What is compared


@pytest.mark.parametrize(
    ("name", "millions", "gflop"),
    [
        ("colour32", 8.0, 3.64),
        ("cifar10", 55.73, 42.4),
        pytest.param("imagenet64", 295.9, 219, marks=pytest.mark.slow),
        pytest.param("lsun256", 526.3, 2239, marks=pytest.mark.slow),
    ],
)
def test_models_are_the_published_sizes(name, millions, gflop):
    with torch.device("meta"):
        network = networks.build(MODELS[name].kind, MODELS[name].options)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert forward_flops(MODELS[name]) / 1e9 == pytest.approx(gflop, rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("adm", TINY),
        ("adm", {**TINY, "scale_shift_norm": False}),
        ("song", {"resolution": 8, "channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)}),
    ],
)
def test_plain_networks_are_the_same_functions(kind, options):
    network = randomise(networks.build(kind, {**options, "dropout": 0.1})).eval()
    plain = plain_network(network)
    assert not {type(module).__module__ for module in plain.modules()} & {"fastcm.networks.dropout"}
    assert any(isinstance(module, nn.Dropout) and module.p == 0.1 for module in plain.modules())
    x, sigma = torch.randn(3, network.config.in_channels, 8, 8), torch.tensor([0.01, 1.0, 80.0])
    labels = torch.tensor([1, 2, 9]) if kind == "adm" else None
    expected = Denoiser(network, Preconditioning())(x, sigma, labels)
    torch.testing.assert_close(PlainDenoiser(plain, Preconditioning())(x, sigma, labels), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain.train()(x, sigma, labels), network(x, sigma, labels))  # dropout draws
    half = PlainDenoiser(plain.eval(), Preconditioning(), autocast=torch.bfloat16)(x, sigma, labels)
    assert half.dtype == torch.float32 and 0 < (half - expected).abs().max() < 0.1


# Options


@pytest.mark.slow
def test_defaults_by_device():
    gpu = torch.device("cuda")
    assert bench_latency.default_models(CPU, True) == ["digits", "mnist", "colour32"]
    assert bench_latency.default_models(CPU, False) == ["digits", "mnist", "colour32", "cifar10"]
    assert bench_latency.default_models(gpu, False) == list(MODELS)
    job = latency_backends.Job(MODELS["colour32"], 4, CPU, "auto")
    onnx = ["onnxruntime_cpu", "onnxruntime_seeded", "onnxruntime_unfolded"]
    assert bench_latency.default_backends(job, True) == ["eager", "diffusers", "fastcm", *onnx]
    assert "compile" in bench_latency.default_backends(latency_backends.Job(MODELS["colour32"], 1, CPU, "auto"), True)
    on_gpu = latency_backends.Job(MODELS["imagenet64"], 1, gpu, "auto")
    assert bench_latency.default_backends(on_gpu, False) == ["eager", "diffusers", "fastcm", "fastcm_compile", "compile", "compile_max"]
    small = latency_backends.Job(MODELS["digits"], 64, gpu, "auto")
    assert not any(name.startswith("onnxruntime") and name != "onnxruntime_cuda" for name in bench_latency.default_backends(small, False))
    larger = latency_backends.Job(MODELS["imagenet64"], 16, gpu, "auto")
    assert bench_latency.default_backends(larger, False) == ["eager", "diffusers", "fastcm", "fastcm_compile", "compile"]
    assert {latency_backends.precision_of(name, on_gpu) for name in ("eager", "diffusers", "fastcm", "compile")} == {"bf16"}
    assert bench_train.default_models(gpu, False) == list(MODELS) and bench_train.default_models(CPU, True) == ["digits", "mnist"]
    assert bench_train.default_models(CPU, False) == ["digits", "mnist", "colour32", "cifar10"]
    digits, larger = MODELS["digits"], MODELS["cifar10"]
    assert bench_train.default_backends(larger, 128, gpu, False) == ["published_step", "fastcm", "compile"]
    assert bench_train.default_backends(larger, 2, CPU, False) == ["published_step", "fastcm"]
    assert bench_train.default_backends(digits, 64, CPU, False) == ["published_step", "fastcm", "fastcm_compile", "compile"]
    assert bench_train.default_backends(digits, 64, CPU, True) == ["published_step", "fastcm", "compile"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "digit"], "unknown value in --model: digit. .*Did you mean 'digits'"),
        (["--model", "digits", "--batch", "1,0"], "illegal value in --batch: 0"),
        (["--model", "digits", "--backend", "tensorflow"], "unknown value in --backend: tensorflow"),
        (["--device", "cuda:x"], "unknown device in --device"),
    ],
)
@pytest.mark.parametrize("bench", [bench_latency, bench_train])
def test_wrong_options_are_named(bench, arguments, message):
    with pytest.raises(InputError, match=message):
        bench.main([*arguments, "--quick"])  # whose default models take no seconds to choose


@pytest.mark.parametrize("bench", [bench_latency, bench_train])
@pytest.mark.slow
def test_what_compiles_comes_last(bench):
    planned = bench.plan(bench.parse(["--model", "digits,colour32", "--batch", "1,2", "--backend", "compile,fastcm"]), CPU)
    at_once = [(name, batch, ["fastcm"]) for name in ("digits", "colour32") for batch in (1, 2)]
    expected = at_once + [(name, batch, ["fastcm", "compile"]) for name, batch, _ in at_once]
    assert [(job.model.name, job.batch, session) for job, session in planned] == expected


@pytest.mark.long
def test_compiled_competitors(tmp_path, monkeypatch):
    """Dynamo and autograd's graphs without the C++ compiler, which takes minutes; test_bench_train.py compiles one step for real."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setitem(MODELS, "digits", TINY_MODEL)
    out = tmp_path / "out.json"
    shared = ["--model", "digits", "--seconds", "0.1", "--device", "cpu", "--json", str(out)]
    assert bench_latency.main([*shared, "--batch", "1", "--backend", "eager,compile"]) == 0
    assert bench_train.main([*shared, "--op", "step", "--backend", "published_step,compile,fastcm_compile"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["bench"], row["backend"]) for row in rows] == [
        ("latency", "eager"),
        ("latency", "compile"),
        ("train", "published_step"),
        ("train", "compile"),
        ("train", "fastcm_compile"),
    ]
    assert all(row["p50_ms"] > 0 for row in rows) and rows[1]["levels_apart"] <= 1
    assert all(row["student_ms"] > row["distance_ms"] > 0 for row in rows[2:])
