"""The benchmark of long jobs: phases are told apart, nothing stays instrumented, and a network that idles is seen to idle."""

import json
import time

import pytest
from benchmark_models import TINY_MODEL

from fastcm import kernels
from fastcm.benchmarks.latency import generation as bench_generation
from fastcm.errors import InputError
from fastcm.generation.background import Background
from fastcm.generation.generator import Generator


@pytest.fixture
def generator():
    made = Generator(TINY_MODEL.denoiser(), TINY_MODEL.info, device="cpu")
    made.batch_size = 8
    return made


def test_rows_and_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_generation.MODELS, "digits", TINY_MODEL)
    own = kernels.normal, kernels.to_uint8, Background.run
    assert bench_generation.main(["--model", "digits", "--images", "20", "--device", "cpu", "--json", str(tmp_path / "rows.json")]) == 0
    content = json.loads((tmp_path / "rows.json").read_text())
    assert {"processor", "torch", "commit", "date", "threads"} <= content["machine"].keys()
    assert [(row["bench"], row["model"], row["images"], row["output"]) for row in content["rows"]] == [
        ("generation", "digits", 20, "npz"),
        ("generation", "digits", 20, "folder"),
    ]
    for row in content["rows"]:
        here = [row[f"{phase}_percent"] for phase in ("network", "noise", "uint8")]
        assert min(here) > 0 and sum(here) <= 100 and row["written_beside_percent"] > 0 and row["images_per_s"] > 0
    assert (kernels.normal, kernels.to_uint8, Background.run) == own
    assert capsys.readouterr().out.count("network") == 2


@pytest.mark.slow
def test_a_busy_and_an_idle_network_are_told_apart(generator, monkeypatch):
    level = generator.level(80.0)
    forward, write = level.forward, bench_generation.write_npz

    def slow_network(x, labels):
        time.sleep(0.1)
        return forward(x, labels)

    def slow_loop(out, batches, *rest):
        write(out, ((time.sleep(0.3), batch)[1] for batch in batches), *rest)

    monkeypatch.setattr(level, "forward", slow_network)
    busy = bench_generation.measure(TINY_MODEL, generator, 32, "npz", 1)
    monkeypatch.setattr(bench_generation, "write_npz", slow_loop)
    idle = bench_generation.measure(TINY_MODEL, generator, 32, "npz", 1)
    assert busy["network_percent"] > 50 > 35 > idle["network_percent"]


def test_overlapping_kernels_count_once():
    assert bench_generation.union([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5
    assert bench_generation.union([]) == 0


@pytest.mark.parametrize(
    ("kernel", "phase"),
    [
        ("_philox_kernel", "noise"),
        ("_renoise_kernel", "noise"),
        ("_to_uint8_kernel", "uint8"),
        ("Memcpy DtoH", "copies"),
        ("sm90_xmma_gemm_bf16", "network"),
        ("_group_norm_kernel", "network"),
    ],
)
def test_kernels_belong_to_phases(kernel, phase):
    assert bench_generation.phase_of(kernel) == phase


def test_no_images_are_refused():
    with pytest.raises(InputError, match="--images: 0"):
        bench_generation.main(["--images", "0"])


@pytest.mark.hardware("reads the profiler's kernels")
@pytest.mark.gpu
def test_cuda_phases_come_from_the_profiler():
    row = bench_generation.measure(TINY_MODEL, Generator(TINY_MODEL.denoiser(), TINY_MODEL.info, device="cuda"), 4096, "npz", 1)
    assert 0 < row["network_percent"] <= row["gpu_percent"] <= 100 and row["device"] == "cuda"
