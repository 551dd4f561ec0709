"""bench_serve and bench latency FILE|URL: small runs of the real thing."""

import json

import pytest
from benchmark_models import TINY_MODEL
from http_server import served
from test_generator import small_denoiser

from fastcm.benchmarks.latency import serving as bench_serve
from fastcm.benchmarks.models import MODELS
from fastcm.cli import main
from fastcm.weights.model_folder import save_model


@pytest.mark.slow
def test_a_small_load(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(MODELS, "digits", TINY_MODEL)
    out = tmp_path / "serve.json"
    options = ["--requests", "40", "--concurrency", "4", "--device", "cpu", "--seconds", "0.1"]
    code = bench_serve.main(["--model", "digits", *options, "--json", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert code == 0 and row["failed"] == 0 and row["requests"] == 40 and 1 < row["images_per_batch"] <= 4
    assert row["percent_of_generator"] == pytest.approx(100 * row["images_per_s"] / row["generator_images_per_s"], rel=1e-2)
    assert 0 < row["p50_ms"] <= row["p99_ms"] and "0 of 40 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_latency_of_a_folder_and_of_a_server(tmp_path, capsys):
    model = tmp_path / "model"
    save_model(model, small_denoiser(3), {})
    out = tmp_path / "latency.json"
    options = ["--batch", "1,2", "--seconds", "0.01", "--json", str(out)]
    assert main(["bench", "latency", str(model), "--device", "cpu", *options]) == 0
    with served(model) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert main(["bench", "latency", url, *options]) == 0
        assert main(["bench", "latency", url + "/nowhere", "--batch", "999", "--seconds", "0.01"]) == 1
        assert "an error of the server in FILE|URL" in capsys.readouterr().err
    rows = json.loads(out.read_text())["rows"]
    found = [(row["backend"], row["batch"], row["part"]) for row in rows]
    assert found == [
        *(("torch cpu", batch, part) for batch in (1, 2) for part in ("together", "noise")),
        *(("fastcm serve", batch, part) for batch in (1, 2) for part in ("together", "health")),
    ]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["rounds"] >= 3 for row in rows)
    assert rows[1]["p50_ms"] < rows[0]["p50_ms"] and rows[5]["p50_ms"] < rows[4]["p50_ms"]  # the noise, the way without images
    assert main(["bench", "latency", url, *options]) == 1
    assert "no answer in FILE|URL" in capsys.readouterr().err
