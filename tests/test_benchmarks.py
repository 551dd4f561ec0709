"""The benchmarks: what they compare is equal, what they time is what they say, and a file of results goes on where it stopped."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from fastcm import kernels, networks
from fastcm.benchmarks import bench_latency, bench_train, interleaved, latency_backends, results_file, step_split, train_backends
from fastcm.benchmarks.models import MODELS, Model, forward_flops, randomise
from fastcm.benchmarks.plain import PlainDenoiser, plain_network
from fastcm.benchmarks.published_step import Draw, PublishedStep
from fastcm.benchmarks.results_file import ResultsFile
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError, RunError
from fastcm.training.schedule import sigma_pair, step_values
from fastcm.training.trainer import SIGMA_STREAM, Trainer

CPU = torch.device("cpu")
TINY = {
    "resolution": 8, "in_channels": 1, "out_channels": 1, "channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,),
    "head_channels": 8, "num_classes": 10,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """A model of a few thousand weights in the place of digits, so that it trains on its pictures."""
    model = Model("digits", "adm", TINY, cpu_batches=(1,), train_batches={"cpu": (8,)})
    monkeypatch.setitem(MODELS, "digits", model)
    return model


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
    assert len(interleaved.rounds(calls, interleaved.Limits(seconds=99, fewest=1, most=6))["c"]) == 6


def test_percentiles_have_their_names():
    figures = interleaved.percentiles(np.arange(101.0), prefix="device_")
    assert figures == {f"device_p{p}_ms": float(p) for p in (20, 50, 80, 95, 99)}


# What is compared


@pytest.mark.parametrize(
    ("name", "millions", "gflop"),
    [("colour32", 8.0, 3.64), ("cifar10", 55.73, 42.4), ("imagenet64", 295.9, 219), ("lsun256", 526.3, 2239)],
)
def test_models_are_the_published_sizes(name, millions, gflop):
    with torch.device("meta"):
        network = networks.build(MODELS[name].kind, MODELS[name].options)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert forward_flops(MODELS[name]) / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_no_weight_is_zero():
    model = MODELS["digits"]
    state, again = model.network().state_dict(), model.network().state_dict()
    assert all(p.count_nonzero() == p.numel() and torch.equal(p, again[name]) for name, p in state.items())
    images = latency_backends.plain(latency_job(model), model.denoiser(), precision="fp32").same_noise(np.arange(4))
    assert images.std() > 20


@pytest.mark.parametrize(
    ("kind", "options"),
    [("adm", TINY), ("adm", {**TINY, "scale_shift_norm": False}),
     ("song", {"resolution": 8, "channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)})],
)  # fmt: skip
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


# Latency


def latency_job(model, batch=4, precision="auto"):
    return latency_backends.Job(model, batch, CPU, precision)


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
    assert first == ["eager", "diffusers", "fastcm", "onnxruntime_cpu", "onnxruntime_cuda"]
    assert rest == [["eager", "fastcm", "compile"], ["eager", "fastcm", "compile_max"]]
    assert bench_latency.sessions(["compile"]) == [["compile"]]


def test_defaults_by_device():
    gpu = torch.device("cuda")
    assert bench_latency.default_models(CPU, True) == ["digits", "colour32"]
    assert bench_latency.default_models(CPU, False) == ["digits", "colour32", "cifar10"]
    assert bench_latency.default_models(gpu, False) == list(MODELS)
    job = latency_job(MODELS["colour32"], batch=4)
    assert bench_latency.default_backends(job, True) == ["eager", "diffusers", "fastcm", "onnxruntime_cpu"]
    assert "compile" in bench_latency.default_backends(latency_job(MODELS["colour32"], batch=1), True)
    on_gpu = latency_backends.Job(MODELS["imagenet64"], 1, gpu, "auto")
    assert bench_latency.default_backends(on_gpu, False) == ["eager", "diffusers", "fastcm", "compile", "compile_max"]
    assert {latency_backends.precision_of(name, on_gpu) for name in ("eager", "diffusers", "fastcm", "compile")} == {"bf16"}
    assert bench_train.default_models(gpu, False) == list(MODELS) and bench_train.default_models(CPU, True) == ["digits"]
    assert bench_train.default_backends(gpu, False) == ["published_step", "fastcm", "compile"]


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
        bench.main(arguments)


@pytest.mark.slow
def test_diffusers_and_onnxruntime_draw_the_same_images(tmp_path):
    for package in ("diffusers", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out = tmp_path / "latency.json"
    arguments = ["--model", "digits", "--batch", "3", "--backend", "eager,diffusers,fastcm,onnxruntime_cpu"]
    assert bench_latency.main([*arguments, "--seconds", "0.1", "--device", "cpu", "--json", str(out)]) == 0
    rows = {row["backend"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["eager", "diffusers", "fastcm", "onnxruntime_cpu"]
    assert all(row["levels_apart"] <= 1 for row in rows.values()) and "speedup_over_diffusers" in rows["fastcm"]
    # Other weights in the pipeline are noticed.
    job = latency_job(MODELS["digits"], batch=3)
    backend = latency_backends.BACKENDS["diffusers"](job)()
    with pytest.raises(RunError, match="levels apart"):
        bench_latency.check(backend, job, bench_latency.reference_images(job)[::-1], "fp32")


def test_a_network_that_diffusers_lacks_is_left_out(capsys):
    job = latency_job(MODELS["cifar10"], batch=1)
    with pytest.raises(latency_backends.UnavailableError, match="diffusers has no song network"):
        latency_backends.BACKENDS["diffusers"](job)


# Training


def train_job(model, batch=8):
    return train_backends.Job(model, batch, CPU, "fp32", "fp32")


def both_steps(model, *, lr, batch=8, compiled=False):
    """A Trainer and a PublishedStep with the same weights, and the noise stream's draws for the second."""
    job, network = train_job(model, batch), model.network().train()
    config, data = job.config(), train_backends.dataset(model)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=lr))
    published = PublishedStep(config, network, data, device=CPU, precision="fp32", compiled=compiled)
    target = copy.deepcopy(network).requires_grad_(False)
    trainer = Trainer(config, network, target, data, device=CPU, precision="fp32", compiled=False)

    def stream(nimg):
        position = nimg + torch.arange(batch)
        u = kernels.uniform(trainer.seed, position, stream=SIGMA_STREAM)
        noise = kernels.normal(trainer.seed, position, (data.channels, data.resolution, data.resolution), stream=0)
        return Draw(noise, *sigma_pair(config, u, step_values(config, nimg).steps))

    return trainer, published, stream


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_steps_train_alike(tiny, compiled):
    """Twenty updates from the same weights with the same noise: losses, weights, target and averages agree."""
    trainer, published, stream = both_steps(tiny, lr=3e-3, compiled=compiled)
    losses = []
    for _ in range(20):
        trainer.train_step()
        published.train_step(stream)
        losses.append((float(trainer.loss), float(published.loss)))
    ours, theirs = np.array(losses).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert len(set(ours.round(5))) > 15 and ours.min() > 1e-4  # twenty losses, not one number
    state = trainer.optimizer.state_dict()
    start = tiny.network().state_dict()
    for role, tensors in (("weights", published.parameters), ("target", published.target_parameters), ("ema_1", published.averages[1])):
        moved = max(float((value - start[name]).abs().max()) for name, value in state[role].items())
        apart = max(float((value - other.detach()).abs().max()) for value, other in zip(state[role].values(), tensors, strict=True))
        assert apart < 0.02 * moved, (role, apart, moved)


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


@pytest.mark.parametrize("name", ["fastcm", "published_step"])
def test_a_step_is_split_without_a_rest(tiny, name, monkeypatch):
    """Every phase is seen, once, in order, and together they are the step."""
    backend = train_backends.build(name, train_job(tiny))
    clock = step_split.Clock(CPU)
    seen = []
    ticks = iter(range(10_000))
    monkeypatch.setattr(step_split.time, "perf_counter", lambda: next(ticks) / 1000)
    original = step_split.Clock.end_step

    def end_step(self):
        seen.append([phase for phase, _ in self.marks])
        original(self)

    monkeypatch.setattr(step_split.Clock, "end_step", end_step)
    with backend.marks(clock):
        split = step_split.split_step(backend.step, clock, steps=2)
    first = [None, "data", "perturb", "student", "target", "distance", "backward", "optimizer"]
    ours = [None, "optimizer", "data", "perturb", "target", "student", "distance", "backward", "optimizer"]
    assert seen == [ours if name == "fastcm" else first] * 2
    assert split == {f"{phase}_ms": 2.0 if (name, phase) == ("fastcm", "optimizer") else 1.0 for phase in step_split.PHASES}
    before = kernels.perturb
    backend.step()
    assert kernels.perturb is before and not clock.marks or name == "published_step"


def test_train_rows_and_going_on(tiny, tmp_path, capsys):
    out = tmp_path / "train.json"
    arguments = ["--model", "digits", "--backend", "published_step,fastcm", "--seconds", "0.01", "--device", "cpu", "--json", str(out)]
    assert bench_train.main([*arguments, "--precision", "fp32"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["backend"], row["batch"]) for row in rows] == [("published_step", 8), ("fastcm", 8)]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(8000 / row["p50_ms"], rel=1e-2) and row["rounds"] >= 5
        parts = sum(row[f"{phase}_ms"] for phase in step_split.PHASES)
        assert 0.2 * row["p20_ms"] < parts < 5 * row["p80_ms"]
    assert "speedup_of_fastcm" in rows[0] and "speedup_over_published_step" in rows[1] and "mfu_percent" not in rows[0]
    assert "backward" in capsys.readouterr().out
    assert bench_train.main([*arguments, "--precision", "fp32"]) == 0
    assert json.loads(out.read_text())["rows"] == rows and capsys.readouterr().out == ""


def test_a_backend_that_fails_leaves_the_others(tiny, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(train_backends, "PublishedStep", fail)
    out = tmp_path / "train.json"
    arguments = ["--model", "digits", "--backend", "published_step,fastcm", "--seconds", "0.01", "--device", "cpu", "--json", str(out)]
    assert bench_train.main(arguments) == 1
    published, fastcm = json.loads(out.read_text())["rows"]
    assert published["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB." and fastcm["p50_ms"] > 0


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


@pytest.mark.slow
def test_compiled_competitors(tiny, tmp_path):
    out = tmp_path / "out.json"
    shared = ["--model", "digits", "--seconds", "0.1", "--device", "cpu", "--json", str(out)]
    assert bench_latency.main([*shared, "--batch", "1", "--backend", "eager,compile"]) == 0
    assert bench_train.main([*shared, "--backend", "published_step,compile"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["bench"], row["backend"]) for row in rows] == [
        ("latency", "eager"), ("latency", "compile"), ("train", "published_step"), ("train", "compile")
    ]  # fmt: skip
    assert all(row["p50_ms"] > 0 for row in rows) and rows[1]["levels_apart"] <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager", "fastcm", "compile", "compile_max"])
def test_latency_backends_on_the_gpu(name):
    job = latency_backends.Job(MODELS["colour32"], 4, torch.device("cuda"), "auto")
    backend = latency_backends.build(name, job)
    assert bench_latency.check(backend, job, bench_latency.reference_images(job), latency_backends.precision_of(name, job)) <= 4
    times = interleaved.device_rounds({name: backend.on_device}, interleaved.Limits(0, 20, 20))[name]
    assert len(times) == 20 and times.min() > 0


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
