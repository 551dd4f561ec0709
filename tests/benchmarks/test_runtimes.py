"""The matrix of runtimes: one run's turns, rows that a second run times again, and what the page of latency says of them."""

import json
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from exported_models import exported

from fastcm import cli
from fastcm.benchmarks import browser
from fastcm.benchmarks.latency import faster_runtimes, runtimes, web_runtime
from fastcm.benchmarks.pages.between_marks import ROOT, mark
from fastcm.benchmarks.pages.tables import latest
from fastcm.benchmarks.quality import screenshots
from fastcm.errors import InputError, RunError

MACHINE = {"cores": 2, "processor": "P", "date": "2026-01-01"}


def row(backend, target, **more):
    return {"bench": "runtimes", "model": "mnist", "target": target, "backend": backend, "outcome": runtimes.SAME, **more}


def test_the_page_of_latency_shows_the_newest_results():
    text = (ROOT / "docs" / "latency.md").read_text(encoding="utf-8")
    assert text.split(mark("other runtimes"))[1].strip() == faster_runtimes.text(latest("runtimes-*.json")).strip()


def test_a_runtime_is_shown_how_to_be_taken_where_it_is_worth_it():
    rows = [
        row("ONNX Runtime", "ort", threads1_p50_ms=2.0, threads1_over_onnxruntime=1.0),
        row("MNN", "mobile", threads1_p50_ms=1.5, threads1_over_onnxruntime=1.31),
        row("ncnn", "mobile", threads1_p50_ms=1.8, threads1_over_onnxruntime=1.19),
    ]
    text = faster_runtimes.text({"machine": MACHINE, "rows": rows})
    assert "| mnist | 1 | 2 | - | 1.31x | 1.19x |" in text and "**MNN is faster** at mnist on one thread (1.31x)" in text
    assert "import MNN" in text and "import ncnn" not in text
    rows[1]["threads1_over_onnxruntime"] = 1.1
    text = faster_runtimes.text({"machine": MACHINE, "rows": rows})
    assert "None of them is 1.2 times as fast" in text and "import" not in text
    assert faster_runtimes.text(None) == faster_runtimes.text({"machine": MACHINE, "rows": [row("ncnn", "mobile")]}) == "Not measured yet."


def worked(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_times_are_of_what_draws_the_same_pictures_in_turns(tmp_path, monkeypatch):
    opened = []

    def open_runtime(runtime, path, *, threads):
        opened.append((runtime, path.stem, threads))
        return lambda feeds: (time.sleep(0.005), worked(0.001 if runtime == "MNN" else 0.004))

    monkeypatch.setattr(runtimes.other_runtimes, "opened", open_runtime)
    monkeypatch.setattr(runtimes, "one_image", lambda path: {})
    rows = [row("ONNX Runtime", "ort"), row("MNN", "mobile"), row("ncnn", "mobile", outcome="refused: x"), row("onnx reference", "ort")]
    rows += [row(runtimes.WEB, "ort"), row(runtimes.WEB, "mobile", outcome="not installed")]
    monkeypatch.setattr(runtimes, "web_times", lambda path, *, seconds: {"threads1_p50_ms": seconds})
    for target in ("ort", "mobile"):
        runtimes.graph(tmp_path, "mnist", target).parent.mkdir(exist_ok=True)
        runtimes.graph(tmp_path, "mnist", target).touch()
    found = list(runtimes.timed(rows, tmp_path, threads=2, seconds=0.2))
    again, waited = list(runtimes.timed(rows, tmp_path, threads=1, seconds=0.2)), found[1]["threads2_p50_ms"]
    mnn, web, absent = again[1], *again[-2:]
    assert web["threads1_p50_ms"] == pytest.approx(0.02) and absent == rows[-1] and found[-2:] == rows[-2:]
    assert mnn["threads1_p50_ms"] < 4 < waited and mnn["threads1_over_onnxruntime"] > 2  # waiting is no work
    del opened[2:]
    assert opened == [("ONNX Runtime", "ort", 2), ("MNN", "mobile", 2)]
    assert [new["backend"] for new in found] == [old["backend"] for old in rows] and found[2:] == rows[2:]
    assert found[0]["threads2_over_onnxruntime"] == 1 and found[1]["threads2_over_onnxruntime"] > 1.1
    assert found[1]["threads2_rounds"] >= 5 and waited > 5.9
    runtimes.graph(tmp_path, "mnist", "mobile").unlink()
    with pytest.raises(InputError, match="no graph in --graphs: .*mobile.onnx"):
        list(runtimes.timed(rows, tmp_path, threads=2, seconds=0.2))
    with pytest.raises(InputError, match="nothing to compare with in --json"):
        runtimes.main(["--times", "--graphs", str(tmp_path), "--json", str(tmp_path / "empty.json")])


def test_times_alone_keep_the_rows_that_were_measured(tmp_path, monkeypatch):
    out, timed = tmp_path / "runtimes.json", []
    monkeypatch.setattr(runtimes, "outcomes", lambda name, target, folder: [row("ONNX Runtime", target, max_error=1e-7)])

    def time_rows(rows, folder, *, threads, seconds):
        timed.append((len(rows), threads))
        return [{**rows[0], f"threads{threads}_p50_ms": float(len(timed))}, *rows[1:]]

    monkeypatch.setattr(runtimes, "timed", time_rows)
    command = ["--model", "mnist", "--graphs", str(tmp_path), "--json", str(out)]
    assert runtimes.main(command) == 0 and runtimes.main([*command, "--times", "--threads", "1"]) == 0
    assert timed == [(4, 1), (4, 2), (4, 1)]
    rows = json.loads(out.read_text())["rows"]
    first = rows[0]
    assert [found["target"] for found in rows] == list(runtimes.TARGETS)
    assert len(rows) == 4 and (first["max_error"], first["threads1_p50_ms"], first["threads2_p50_ms"]) == (1e-7, 3.0, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", faster_runtimes.PROGRAMS)
def test_the_program_that_the_page_may_show_draws(runtime, tmp_path):
    if runtimes.other_runtimes.version(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    form = "mobile" if faster_runtimes.TARGETS[runtime] == "mobile" else "plain"
    shutil.copyfile(exported(form).path, tmp_path / "mnist.onnx")
    path = tmp_path / "mnist.onnx"
    feeds = {name: array[:1] for name, array in runtimes.inputs(exported(form))[0].items()}
    expected = runtimes.other_runtimes.opened(runtime, path)(feeds)  # which leaves the converted file
    for suffix in ("param", "bin"):
        if runtime == "ncnn":
            (tmp_path / "mnist.ncnn" / f"graph.ncnn.{suffix}").rename(tmp_path / f"mnist.ncnn.{suffix}")
    np.savez(tmp_path / "feeds.npz", noise=feeds["noise"], labels=feeds["labels"], rows=feeds["labels"])
    before = "import numpy\nnoise, labels, rows = numpy.load('feeds.npz').values()"
    after = f"numpy.save('images.npy', numpy.array({'image' if runtime == 'ncnn' else 'images'}))"
    program = "\n".join([before, faster_runtimes.PROGRAMS[runtime], after])  # what it gets wrong may end its process
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, timeout=120)
    images = np.load(tmp_path / "images.npy")
    np.testing.assert_allclose(images.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(web_runtime.version() is None, reason="Chromium or npm's onnxruntime-web is not installed")
def test_onnxruntime_web_draws_a_graph_or_says_why_not(tmp_path):
    done = exported("plain")
    feeds, expected = runtimes.inputs(done)
    drawn = web_runtime.draw(done.path, feeds, expected.shape[1:], seconds=0.2)
    assert expected.std() > 0.1 and np.abs(drawn.images - expected).max() < 1e-4 and (drawn.milliseconds > 0).all()
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(RunError, match="ONNX Runtime Web refuses the graph: "):
        web_runtime.draw(broken, feeds, expected.shape[1:], seconds=0)


def test_the_pictures_of_pages_are_of_public_commands(tmp_path, monkeypatch):
    called, drawn = [], []
    monkeypatch.setattr(screenshots, "call", called.append)
    monkeypatch.setattr(browser, "executable", lambda: "chromium")

    async def draw(path):
        drawn.append(path.name)

    monkeypatch.setattr(screenshots, "web", draw)
    monkeypatch.setattr(screenshots, "report", draw)
    monkeypatch.setenv("FASTCM_WEB_RUNTIME", "node")
    assert screenshots.main([]) == 0 and drawn == ["web.png", "evaluation-report.png"]
    for command in called:
        words = shlex.split(command)
        cli.build_parser(words[1]).parse_args(words[1:])
    assert called[0].endswith("--runtime node") and "--report runs/gallery/report" in called[1]
    called.clear()
    assert screenshots.main(["--only", "report"]) == 0 and len(called) == 1
    monkeypatch.setattr(browser, "executable", lambda: None)
    with pytest.raises(SystemExit, match="no browser in PATH"):
        screenshots.main([])
