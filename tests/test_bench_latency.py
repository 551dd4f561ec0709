"""bench_latency: competitors draw the same images before they are timed, and the file goes on where it stopped."""

import json

import numpy as np
import pytest
import torch
from benchmark_models import TINY_MODEL

from fastcm.benchmarks import bench_latency, interleaved, latency_backends
from fastcm.benchmarks.models import MODELS
from fastcm.errors import RunError

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """A model of a few thousand weights in the place of digits, so that it trains on its pictures."""
    monkeypatch.setitem(MODELS, "digits", TINY_MODEL)
    return TINY_MODEL


def latency_job(model, batch=4, precision="auto"):
    return latency_backends.Job(model, batch, CPU, precision)


def test_no_weight_is_zero():
    model = MODELS["digits"]
    state, again = model.network().state_dict(), model.network().state_dict()
    assert all(p.count_nonzero() == p.numel() and torch.equal(p, again[name]) for name, p in state.items())
    images = latency_backends.plain(latency_job(model), model.denoiser(), precision="fp32").same_noise(np.arange(4))
    assert images.std() > 20


def test_latency_rows_and_going_on(tiny, tmp_path, capsys):
    out = tmp_path / "latency.json"
    arguments = ["--model", "digits", "--batch", "1,3", "--backend", "eager,fastcm", "--seconds", "0.01", "--json", str(out)]
    assert bench_latency.main([*arguments, "--device", "cpu"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["backend"], row["device"]) for row in rows] == [
        (batch, name, "cpu") for batch in (1, 3) for name in ("eager", "fastcm")
    ]
    for row in rows:
        assert row["bench"] == "latency" and row["model"] == "digits" and row["precision"] == "fp32" and row["levels_apart"] <= 1
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["rounds"] >= 7
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["p50_ms"], rel=1e-2)
    assert "speedup_of_fastcm" in rows[0] and "speedup_over_eager" in rows[1]
    assert "p95_ms" in capsys.readouterr().out
    assert bench_latency.main([*arguments, "--device", "cpu"]) == 0
    assert json.loads(out.read_text())["rows"] == rows and capsys.readouterr().out == ""
    content = json.loads(out.read_text())
    content["rows"].pop(1)
    out.write_text(json.dumps(content))
    assert bench_latency.main([*arguments, "--device", "cpu"]) == 0
    again = json.loads(out.read_text())["rows"]
    assert again[:3] == [rows[0], *rows[2:]] and again[3]["backend"] == "fastcm" and again[3]["batch"] == 1


def test_other_images_are_not_timed(tiny, tmp_path, monkeypatch, capsys):
    honest = latency_backends.BACKENDS["fastcm"]

    def darker(job):
        start = honest(job)

        def begin():
            backend = start()
            return latency_backends.Backend(backend.images, lambda seeds: backend.same_noise(seeds) // 8 * 8)

        return begin

    monkeypatch.setitem(latency_backends.BACKENDS, "fastcm", darker)
    out = tmp_path / "latency.json"
    code = bench_latency.main(
        ["--model", "digits", "--batch", "2", "--backend", "eager,fastcm", "--seconds", "0.01", "--device", "cpu", "--json", str(out)]
    )
    eager, fastcm = json.loads(out.read_text())["rows"]
    assert code == 1 and "p50_ms" in eager and "p50_ms" not in fastcm
    assert fastcm["error"] == "RunError: other images than the fp32 network's: 7 levels apart, 1 allowed in fp32."
    assert "failed: RunError" in capsys.readouterr().out


def test_images_that_say_nothing_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(
        bench_latency, "plain", lambda *args, **options: latency_backends.Backend(None, lambda seeds: np.zeros((4, 8, 8, 1)))
    )
    with pytest.raises(RunError, match="hardly vary"):
        bench_latency.reference_images(latency_job(tiny))


def test_bf16_images_are_within_its_tolerance():
    job = latency_job(MODELS["digits"], batch=8, precision="bf16")
    expected = bench_latency.reference_images(job)
    for name in ("eager", "fastcm"):
        backend = latency_backends.BACKENDS[name](job)()
        assert 0 < bench_latency.check(backend, job, expected, latency_backends.precision_of(name, job)) <= 4


def test_compiled_backends_have_a_measurement_each():
    wanted = list(latency_backends.BACKENDS)
    first, *rest = bench_latency.sessions(wanted)
    assert first == ["eager", "diffusers", "fastcm", "onnxruntime_cpu", "onnxruntime_seeded", "onnxruntime_unfolded", "onnxruntime_cuda"]
    assert rest == [["eager", "fastcm", "compile"], ["eager", "fastcm", "compile_max"]]
    assert bench_latency.sessions(["compile"]) == [["compile"]]


@pytest.mark.slow
def test_diffusers_and_onnxruntime_draw_the_same_images(tiny, tmp_path):
    for package in ("diffusers", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    onnx = pytest.importorskip("onnx")
    out = tmp_path / "latency.json"
    backends = ["eager", "diffusers", "fastcm", "onnxruntime_cpu", "onnxruntime_seeded", "onnxruntime_unfolded"]
    arguments = ["--model", "digits", "--batch", "3", "--backend", ",".join(backends)]
    assert bench_latency.main([*arguments, "--seconds", "0.1", "--device", "cpu", "--json", str(out)]) == 0
    rows = {row["backend"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == backends
    assert all(row["levels_apart"] <= 1 for row in rows.values()) and "speedup_over_diffusers" in rows["fastcm"]
    assert "speedup_over_diffusers" in rows["onnxruntime_cpu"] and "speedup_over_onnxruntime_unfolded" in rows["onnxruntime_cpu"]
    # The competitor computes its noise embedding at every call; ours has none.
    operators = {name: {n.op_type for n in onnx.load(path(MODELS["digits"])).graph.node} for name, path in (
        ("ours", latency_backends.exported), ("theirs", latency_backends.unfolded))}  # fmt: skip
    assert "Gemm" in operators["theirs"] and "Gemm" not in operators["ours"]
    # Other weights in the pipeline are noticed.
    job = latency_job(MODELS["digits"], batch=3)
    backend = latency_backends.BACKENDS["diffusers"](job)()
    with pytest.raises(RunError, match="levels apart"):
        bench_latency.check(backend, job, bench_latency.reference_images(job)[::-1], "fp32")


def test_a_network_that_diffusers_lacks_is_left_out(capsys):
    job = latency_job(MODELS["cifar10"], batch=1)
    with pytest.raises(latency_backends.UnavailableError, match="diffusers has no song network"):
        latency_backends.BACKENDS["diffusers"](job)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager", "fastcm", "compile", "compile_max"])
def test_latency_backends_on_the_gpu(name):
    job = latency_backends.Job(MODELS["colour32"], 4, torch.device("cuda"), "auto")
    backend = latency_backends.build(name, job)
    assert bench_latency.check(backend, job, bench_latency.reference_images(job), latency_backends.precision_of(name, job)) <= 4
    times = interleaved.device_rounds({name: backend.on_device}, interleaved.Limits(0, 20, 20))[name]
    assert len(times) == 20 and times.min() > 0
