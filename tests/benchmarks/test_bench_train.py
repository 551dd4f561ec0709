"""bench_train: both steps train alike, a step's phases are the whole of it, and a failure leaves the other rows."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark_models import TINY, TINY_MODEL

from fastcm import kernels
from fastcm.benchmarks.models import MODELS, Model
from fastcm.benchmarks.training import backends as train_backends
from fastcm.benchmarks.training import bench as bench_train
from fastcm.benchmarks.training import child as train_child
from fastcm.benchmarks.training import growth as train_growth
from fastcm.benchmarks.training import step_split
from fastcm.benchmarks.training.published_step import Draw, PublishedStep
from fastcm.training.method_loss import SIGMA_STREAM
from fastcm.training.schedule import sigma_pair, step_values
from fastcm.training.trainer_parts import build_trainer

CPU = torch.device("cpu")
ONE_STEP = ("--op", "step", "--model", "digits", "--backend", "published_step,fastcm", "--seconds", "0.01", "--device", "cpu")


@pytest.fixture
def tiny(monkeypatch):
    """A model of a few thousand weights in the place of digits, so that it trains on its pictures."""
    monkeypatch.setitem(MODELS, "digits", TINY_MODEL)
    # Children have the real networks; what they say is tested by itself.
    monkeypatch.setattr(train_child, "ask", lambda job, name, *, seconds, processes=1: {"peak_memory_gb": 0.5})
    return TINY_MODEL


def train_job(model, batch=8):
    return train_backends.Job(model, batch, CPU, "fp32", "fp32")


def both_steps(model, *, lr=3e-3, batch=8, compiled=False, ours_compiled=False):
    """A Trainer and a PublishedStep with the same weights, and the noise stream's draws for the second."""
    job, network = train_job(model, batch), model.network().train()
    config, data = job.config(), train_backends.dataset(model)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=lr))
    published = PublishedStep(config, network, data, device=CPU, precision="fp32", compiled=compiled)
    target = copy.deepcopy(network).requires_grad_(False)
    trainer = build_trainer(config, network, target, data, device=CPU, precision="fp32", compiled=ours_compiled)

    def stream(nimg):
        position = nimg + torch.arange(batch)
        u = kernels.uniform(trainer.seed, position, stream=SIGMA_STREAM)
        noise = kernels.normal(trainer.seed, position, (data.channels, data.resolution, data.resolution), stream=0)
        return Draw(noise, *sigma_pair(config, u, step_values(config, nimg).steps))

    return trainer, published, stream


@pytest.mark.parametrize(
    "which", [{}, *(pytest.param({name: True}, marks=pytest.mark.long) for name in ("compiled", "ours_compiled"))], ids=str
)
@pytest.mark.slow
def test_all_steps_train_alike(tiny, which):
    """A hundred updates from the same weights with the same noise: losses, weights, target and averages agree."""
    trainer, published, stream = both_steps(tiny, **which)
    losses = []
    for _ in range(100):
        trainer.train_step()
        published.train_step(stream)
        losses.append((float(trainer.loss), float(published.loss)))
    ours, theirs = np.array(losses).T
    np.testing.assert_allclose(ours[:20], theirs[:20], rtol=1e-4)
    np.testing.assert_allclose(ours, theirs, rtol=5e-3)  # RAdam's first rectified steps enlarge what rounding tells apart
    assert len(set(ours.round(5))) > 80 and ours.min() > 1e-4  # a hundred losses, not one number
    state = trainer.optimizer.state_dict()
    start = tiny.network().state_dict()
    for role, tensors in (("weights", published.parameters), ("target", published.target_parameters), ("ema_1", published.averages[1])):
        moved = max(float((value - start[name]).abs().max()) for name, value in state[role].items())
        apart = max(float((value - other.detach()).abs().max()) for value, other in zip(state[role].values(), tensors, strict=True))
        assert apart < 0.02 * moved, (role, apart, moved)


@pytest.mark.slow
def test_the_published_step_draws_its_own_noise(tiny):
    job = train_job(tiny)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        step = PublishedStep(job.config(), tiny.network(), train_backends.dataset(tiny), device=CPU, precision="fp32", compiled=False)
        step.train_step()
        losses.append(float(step.loss))
    assert losses[0] == losses[1] != losses[2]


def test_student_and_target_share_their_dropout(monkeypatch):
    """With both networks and both levels equal the loss is zero, unless the masks differ."""
    model = Model("digits", "adm", {**TINY, "dropout": 0.5})
    step = PublishedStep(
        train_job(model).config(), model.network(), train_backends.dataset(model), device=CPU, precision="fp32", compiled=False
    )
    same = Draw(torch.randn(8, 1, 8, 8), torch.ones(8), torch.ones(8))
    step.train_step(lambda nimg: same)
    assert float(step.loss) == 0
    monkeypatch.setattr(PublishedStep, "_restore", lambda self, states: None)
    step.train_step(lambda nimg: same)
    assert float(step.loss) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastcm", "published_step"])
def test_a_step_is_split_without_a_rest(tiny, name, monkeypatch):
    """Every phase is seen, once, in order, and together they are the step."""
    backend = train_backends.build(name, train_job(tiny))
    clock = step_split.Clock(CPU)
    seen = []
    ticks = iter(range(10_000))
    # That module's clock alone: the trainer reads the time too.
    monkeypatch.setattr(step_split, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 1000))
    original = step_split.Clock.end_step

    def end_step(self):
        seen.append([phase for phase, _ in self.marks])
        original(self)

    monkeypatch.setattr(step_split.Clock, "end_step", end_step)
    with backend.marks(clock):
        split = step_split.split_step(backend.step, clock, steps=2)
    first = [None, "data", "perturb", "student", "target", "distance", "backward", "optimizer"]
    ours = [None, "optimizer", "data", "optimizer", "perturb", "target", "student", "distance", "backward", "optimizer"]
    assert seen == [ours if name == "fastcm" else first] * 2
    assert split == {f"{phase}_ms": 3.0 if (name, phase) == ("fastcm", "optimizer") else 1.0 for phase in step_split.PHASES}
    before = kernels.perturb
    backend.step()
    assert kernels.perturb is before and not clock.marks or name == "published_step"


@pytest.mark.slow
def test_train_rows_and_going_on(tiny, tmp_path, capsys):
    out = tmp_path / "train.json"
    arguments = [*ONE_STEP, "--json", str(out)]
    assert bench_train.main([*arguments, "--precision", "fp32"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["backend"], row["batch"]) for row in rows] == [("published_step", 8), ("fastcm", 8)]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(8000 / row["p50_ms"], rel=1e-2) and row["rounds"] >= 3
        parts = sum(row[f"{phase}_ms"] for phase in step_split.PHASES)
        assert 0.2 * row["p20_ms"] < parts < 5 * row["p80_ms"]
    assert "speedup_of_fastcm" in rows[0] and "speedup_over_published_step" in rows[1] and "mfu_percent" not in rows[0]
    assert "backward" in capsys.readouterr().out
    assert bench_train.main([*arguments, "--precision", "fp32"]) == 0
    assert json.loads(out.read_text())["rows"] == rows and capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_backend_that_fails_leaves_the_others(tiny, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(train_backends, "PublishedStep", fail)
    out = tmp_path / "train.json"
    arguments = [*ONE_STEP, "--json", str(out)]
    assert bench_train.main(arguments) == 1
    published, fastcm = json.loads(out.read_text())["rows"]
    assert published["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB." and fastcm["p50_ms"] > 0


def test_a_preset_is_measured_in_its_own_precision(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    jobs = {
        (name, asked): train_backends.Job(MODELS[name], 2, CPU, asked, "auto")
        for name in ("mnist", "cifar10")
        for asked in ("auto", "bf16")
    }
    expected = {("mnist", "auto"): "fp32", ("mnist", "bf16"): "bf16", ("cifar10", "auto"): "bf16", ("cifar10", "bf16"): "bf16"}
    assert {key: job.precision_of("fastcm") for key, job in jobs.items()} == expected


@pytest.mark.slow
def test_the_share_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 PCIe")
    assert bench_train.device_tflop_s(torch.device("cuda")) == 756
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    job = train_backends.Job(MODELS["cifar10"], 128, torch.device("cuda"), "bf16", "bf16")
    times = {"fastcm": np.full(5, 1000 * 128 / 1840), "published_step": np.full(5, 3000 * 128 / 1840)}
    row = bench_train.figures("fastcm", times, job, 780.0)
    # 1,840 images/s are 40 % of what four passes of 42.4 GFLOP leave of 780 TFLOP/s.
    assert row["images_per_s"] == 1840 and row["percent_of_matmul"] == pytest.approx(40, abs=0.1)
    assert row["mfu_percent"] == pytest.approx(31.5, abs=0.1) and row["speedup_over_published_step"] == 3.0


@pytest.mark.hardware("steps of 8 million weights: too slow on a processor")
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["published_step", "fastcm", "compile"])
def test_train_backends_on_the_gpu(name):
    device = torch.device("cuda")
    job = train_backends.Job(MODELS["colour32"], 16, device, "auto", "auto")
    backend = train_backends.build(name, job)
    # Weights, gradient, target, three averages and two moments: 32 bytes a weight, and activations.
    assert backend.peak_bytes > 8 * 4 * 8e6
    split = backend.split(device, steps=3)
    assert split["backward_ms"] > split["distance_ms"] > 0 and split["student_ms"] > 0
    assert name != "fastcm" or backend.is_recorded()


# Growth


@pytest.mark.slow
def test_rows_of_memory_and_scaling(tiny, tmp_path, capsys, monkeypatch):
    axes = {"batch": (2, 4), "resolution": (8, 16), "parameters": (8, 16), "processes": (1, 2)}
    monkeypatch.setitem(train_growth.VARIED, "cpu", ("digits", 8, axes))
    monkeypatch.setattr(train_growth, "CPU_BATCHES", {"digits": (8,)})
    answers = {"images_per_s": 7.0, "p50_ms": 1.0, "peak_memory_gb": 0.25, "rounds": 3}
    asked = []

    def ask(job, name, *, seconds, processes=1):
        asked.append((job, name, seconds, processes))
        return answers

    monkeypatch.setattr(train_child, "ask", ask)
    out = tmp_path / "train.json"
    arguments = ["--op", "memory,scaling", "--seconds", "0.01", "--device", "cpu", "--json", str(out)]
    assert bench_train.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    memory, scaling = (rows[:3], rows[3:])
    assert [(row["backend"], row["recomputed"], row["peak_memory_gb"]) for row in memory] == [
        ("published_step", False, 0.25),
        ("fastcm", False, 0.25),
        ("fastcm", True, 0.25),
    ]
    assert [job.model.options["checkpoint"] for job, _, _, _ in asked[:3]] == [False, False, True]
    assert [(row["axis"], row["value"]) for row in scaling] == [(axis, value) for axis, values in axes.items() for value in values]
    by_value = {(row["axis"], row["value"]): row for row in scaling}
    assert by_value["parameters", 16]["parameters"] > 3 * by_value["parameters", 8]["parameters"]
    assert by_value["batch", 2]["batch"] == 2 and by_value["resolution", 16]["batch"] == 8 and by_value["batch", 4]["images_per_s"] > 0
    assert [processes for _, _, seconds, processes in asked[3:]] == [1, 2] and by_value["processes", 2]["images_per_s"] == 7.0
    capsys.readouterr()
    assert bench_train.main(arguments) == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize("room", [0, 1, 7, 100, 777, 4096, 9999])
def test_the_largest_batch_is_found_to_an_eighth(room):
    tried = []
    found = train_growth.largest(lambda batch: tried.append(batch) or batch <= room, most=4096)
    assert found <= room and (found >= min(room, 4096) * 7 / 8 or room == 0) and len(tried) < 20


def test_memory_at_the_edge_is_that_of_the_try_that_fitted(monkeypatch, capsys):
    tries = []

    def peak(name, job):
        tries.append(job.batch)
        return 1.5 * job.batch if job.batch <= 5 and tries.count(job.batch) == 1 else None

    monkeypatch.setattr(train_growth, "_peak", peak)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8e9))
    job = train_backends.Job(MODELS["digits"], 64, torch.device("cuda"), "bf16", "bf16")
    row = train_growth.measure_memory("fastcm", False, job)
    assert (row["batch"], row["peak_memory_gb"], row["device_memory_gb"]) == (5, 7.5, 8.0) and "7.5 GB" in bench_train.growth_line(row)
    monkeypatch.setattr(train_growth, "_peak", lambda name, job: None)
    row = train_growth.measure_memory("fastcm", False, job)
    assert bench_train.growth_line(row).endswith("failed: out of memory with one image")


@pytest.mark.long
def test_children_measure_memory_and_several_processes():
    job = train_backends.Job(MODELS["digits"], 16, CPU, "fp32", "fp32")
    peaks = [train_child.ask(dataclasses.replace(job, batch=batch), "fastcm", seconds=None)["peak_memory_gb"] for batch in (16, 512)]
    assert 0.005 < peaks[0] < peaks[1] < 2
    together = train_child.ask(job, "fastcm", seconds=0.1, processes=2)
    assert together["rounds"] >= 6 and together["images_per_s"] > 1
    with pytest.raises(RuntimeError, match="batch"):
        train_child.ask(dataclasses.replace(job, batch=15), "fastcm", seconds=0.1, processes=2)
