"""bench_latency: competitors draw the same images before they are timed, and the file goes on where it stopped."""

import json

import numpy as np
import pytest
import torch
from benchmark_models import TINY_MODEL
from PIL import Image, ImageColor

from fastcm.benchmarks import interleaved
from fastcm.benchmarks.latency import backends as latency_backends
from fastcm.benchmarks.latency import bench as bench_latency
from fastcm.benchmarks.latency import first_image
from fastcm.benchmarks.latency import floor as latency_floor
from fastcm.benchmarks.latency import tables as latency_tables
from fastcm.benchmarks.models import MODELS, forward_flops
from fastcm.benchmarks.pages import tables
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


@pytest.mark.slow
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
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["rounds"] >= 3
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


@pytest.mark.slow
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
    anchors = ["eager", "diffusers", "fastcm", "onnxruntime_seeded"]
    assert rest == [[*anchors, "fastcm_compile"], [*anchors, "compile"], [*anchors, "compile_max"]]
    assert bench_latency.sessions(["compile"]) == [["compile"]]


def test_what_is_measured_unasked():
    """On a CPU: what starts at once for every batch; compiled networks for one image, and none of a model that is slow there."""
    defaults = {
        (name, batch): bench_latency.default_backends(latency_job(MODELS[name], batch), False)
        for name, batch in (("colour32", 1), ("colour32", 4), ("cifar10", 1), ("lsun256", 1))
    }
    assert {"fastcm_compile", "compile", "onnxruntime_seeded", "diffusers"} <= set(defaults["colour32", 1])
    assert defaults["colour32", 4] == defaults["cifar10", 1] and "onnxruntime_seeded" in defaults["cifar10", 1]
    assert not any("compile" in name for name in defaults["cifar10", 1]) and "onnxruntime_cpu" not in defaults["lsun256", 1]
    assert bench_latency.default_models(CPU, False) == ["digits", "mnist", "colour32", "cifar10"]


def test_the_floor_is_products_or_weights(tiny, monkeypatch):
    monkeypatch.setattr(latency_floor, "rates", lambda device, dtype: (1e9, 1e9))
    weights = sum(p.numel() for p in tiny.network().parameters())
    row = latency_floor.floor_row(latency_job(tiny, batch=3), {"backend": "floor"})
    assert row["weight_mb"] == pytest.approx(4 * weights / 1e6, rel=1e-3)
    assert row["gflop"] == pytest.approx(3 * forward_flops(tiny) / 1e9, rel=1e-3)
    assert row["floor_ms"] == pytest.approx(1000 * max(3 * forward_flops(tiny), 4 * weights) / 1e9, rel=1e-3)
    monkeypatch.setattr(latency_floor, "rates", lambda device, dtype: (1e15, 1e9))
    assert latency_floor.floor_row(latency_job(tiny), {})["floor_ms"] == pytest.approx(4e-6 * weights, rel=1e-3)


def results(tmp_path, monkeypatch, rows):
    machine = {name: None for name in ("gpu", "onnxruntime", "diffusers")} | {
        "threads": 2,
        "processor": "P",
        "torch": "2.13",
        "date": "2026-01-01",
        "commit": "abc",
        "onnxruntime-gpu": "1.31",
    }
    (tmp_path / "latency.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)


def timed_row(backend, ms, **more):
    return {
        "bench": "latency",
        "model": "digits",
        "batch": 1,
        "backend": backend,
        "levels_apart": 0,
        "images_per_s": 1000 / ms,
        **{f"p{percent}_ms": ms for percent in (20, 50, 80, 95, 99)},
        **more,
    }


def test_pages_and_picture_follow_the_results(tmp_path, monkeypatch):
    rows = [
        timed_row("diffusers", 10.0),
        timed_row("fastcm", 5.0, speedup_over_diffusers=2.0),
        timed_row("onnxruntime_seeded", 2.5, speedup_over_diffusers=4.1),
        {**timed_row("eager", 7.0), "batch": 64},
        timed_row("fastcm_compile", 4.0, first_image_cold_s=61.5, first_image_warm_s=3.25),
        {"bench": "latency", "model": "digits", "batch": 1, "backend": "compile", "error": "RuntimeError: no"},
        {
            "bench": "latency",
            "model": "digits",
            "batch": 1,
            "backend": "floor",
            "floor_ms": 0.5,
            "gflop": 0.1,
            "weight_mb": 2.0,
            "gemm_gflop_s": 135.0,
            "copy_gb_s": 20.0,
        },
        {
            "bench": "latency_profile",
            "model": "digits",
            "batch": 1,
            "backend": "onnxruntime_seeded",
            "operators": {"Conv": [1.5, 25], "Add": [0.25, 40]},
        },
    ]
    results(tmp_path, monkeypatch, rows)
    page = tables.with_latency("".join(f"<!-- {name} -->\n<!-- {name} -->\n" for name in latency_tables.pages(None)))
    for line in (
        "| digits | 1 | 10 | 5 | 4 | 2.5 | 4.10x | 0.5 |",
        "| digits | 1 | 61.5 | 3.25 |",
        "| Conv | 1.5 (25) |",
        "| others | 0 (0) |",
        "| digits | 0.1 | 2 | 135 | 20 | 0.5 | 2.5 |",
        "| digits | 64 | plain network | 7 | 7 | 7 | - | 143 | - | - | 0 |",
    ):
        assert line in page, line
    assert tables.with_latency(page) == page and "plain, torch.compile" not in page
    latency_tables.plot(tables.latest("latency*.json"), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        colours = {tuple(colour) for colour in np.unique(np.array(picture).reshape(-1, 3), axis=0)}
    assert {ImageColor.getrgb(name) for name in (latency_tables.OWN, latency_tables.OTHER, latency_tables.FLOOR)} <= colours
    (tmp_path / "latency.json").unlink()
    assert tables.with_latency(page).count("Not measured yet.") == 5


def test_committed_pages_are_what_the_results_say():
    for page in tables.LATENCY:
        text = page.read_text(encoding="utf-8")
        assert "latency -->" in text or "latencies -->" in text
        assert tables.with_latency(text) == text
    assert tables.LATENCY_PICTURE.is_file()


@pytest.mark.slow
def test_the_profile_counts_nodes(tiny):
    onnx = pytest.importorskip("onnx")
    row = latency_floor.profile_row(latency_job(tiny, batch=1), {})
    nodes = [n.op_type for n in onnx.load(latency_backends.exported(tiny, seeded=True)).graph.node]
    # ONNX Runtime may make further convolutions of scalings by channel, and never fewer.
    assert nodes.count("Conv") <= row["operators"]["Conv"][1] < 1.2 * nodes.count("Conv")
    assert all(ms > 0 for ms, _ in row["operators"].values())


@pytest.mark.long
def test_a_restarted_process_finds_its_code(tmp_path, monkeypatch):
    """The first image of a fresh process, twice; without a compiler or with a failing one there is none."""
    options = {"batch": 1, "device": "cpu", "precision": "auto", "cache": tmp_path / "cache"}
    with pytest.raises(RunError, match="no first image of nothing: .*nothing"):
        first_image.seconds_to_first_image("nothing", **options)
    cold, warm = (first_image.seconds_to_first_image("digits", **options) for _ in range(2))
    assert any((tmp_path / "cache").rglob("*.so")) and 0 < warm < cold


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
    operators = {
        name: {n.op_type for n in onnx.load(path(MODELS["digits"])).graph.node}
        for name, path in (("ours", latency_backends.exported), ("theirs", latency_backends.unfolded))
    }
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


@pytest.mark.hardware("Inductor's code, and 8 million weights")
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager", "fastcm", "fastcm_compile", "compile", "compile_max"])
def test_latency_backends_on_the_gpu(name):
    job = latency_backends.Job(MODELS["colour32"], 4, torch.device("cuda"), "auto")
    backend = latency_backends.build(name, job)
    assert bench_latency.check(backend, job, bench_latency.reference_images(job), latency_backends.precision_of(name, job)) <= 4
    times = interleaved.device_rounds({name: backend.on_device}, interleaved.Limits(0, 20, 20))[name]
    assert len(times) == 20 and times.min() > 0
