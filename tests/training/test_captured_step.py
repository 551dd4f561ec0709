"""Recorded steps: the bits of plain ones, also when N, rates and decays change; what does not agree or does not record is left alone."""

import gc
import weakref

import pytest
import torch
from recorded_steps import record_steps
from test_microbatches import trainer
from torch.profiler import ProfilerActivity, profile
from training_runs import run_out_of_memory

from fastcm import kernels, networks, presets
from fastcm.data.dataset import open_dataset
from fastcm.kernels import philox
from fastcm.training.captured_step import WARM_UP, CapturedStep, CudaGraphs, graphs_for
from fastcm.training.run import build_network, target_of
from fastcm.training.trainer import FLIP_STREAM, Trainer, piece
from fastcm.training.trainer_parts import build_trainer

# N grows from 2 to 12 over the twenty steps, mu with it; the learning rate falls and the averages' half-life rises.
CHANGING = {"objective.curriculum": "progressive", "objective.s0": 2, "objective.s1": 12, "duration_kimg": 0.32}
METHODS = {
    "ct": CHANGING,
    "ict": {"objective.s0": 2, "objective.s1": 12, "duration_kimg": 0.32},
    "ect": {"duration_kimg": 0.32},
    "tcm": {"objective.s1": 4, "duration_kimg": 0.32},
    "sct": {"objective.tangent_warmup_kimg": 0.16, "duration_kimg": 0.32},
    "meanflow": {"objective.velocity": "network", "duration_kimg": 0.32},
}


@pytest.fixture(autouse=True)
def no_numpy(monkeypatch):
    """What the noise stream does by numpy on a CPU no recording of torch's operations sees; the bits are the same."""
    monkeypatch.setattr(philox, "_NUMPY_COUNTERS", -1)


def steps(made, count=20):
    """Losses and norms of the next steps, and N at each."""
    rows = []
    for _ in range(count):
        values = made.train_step()
        rows.append((float(made.loss), float(made.grad_norm), values.steps))
    return rows


def assert_same_state(a, b):
    parts, counters = a.state()
    others, other_counters = b.state()
    assert counters == other_counters
    for role, tensors in parts.items():
        if isinstance(tensors, dict):
            assert all(torch.equal(tensor, others[role][name]) for name, tensor in tensors.items()), role


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_recorded_steps_have_the_bits_of_plain_ones(method):
    plain, recorded = trainer(method=method, **METHODS[method]), trainer(method=method, **METHODS[method])
    graphs = record_steps(recorded)
    expected, found = steps(plain), steps(recorded)
    assert found == expected
    assert method in ("sct", "meanflow") or len({row[2] for row in expected}) > 2
    assert_same_state(plain, recorded)
    assert graphs.events.count("record") == 2 and recorded.work.is_replayed
    # Two replays to compare, one of the first update, then two for each of the steps that are left.
    assert graphs.events.count("replay") == 2 + 1 + 2 * (20 - WARM_UP - 1)
    assert graphs.events.count("run") == WARM_UP + 2


@pytest.mark.slow
def test_a_resumed_run_may_record_at_another_step():
    whole, parts, rest = (trainer(**METHODS["ict"]) for _ in range(3))
    for made in (whole, parts, rest):
        record_steps(made)
    expected = steps(whole)
    found = steps(parts, 7)
    rest.restore(*parts.state())
    assert found + steps(rest, 13) == expected


@pytest.mark.parametrize(
    "frozen",
    [
        lambda made, batch: batch._replace(position=batch.position.clone().fill_(int(batch.position[0]))),
        lambda made, batch: batch._replace(images=torch.from_numpy(batch.images.numpy().copy())),
        lambda made, batch: batch._replace(labels=torch.tensor(batch.labels.tolist())),
    ],
    ids=["position", "images", "labels"],
)
@pytest.mark.slow
def test_a_recording_that_froze_its_input_is_found_out(frozen, capsys):
    """What goes through the host is a constant of the recording."""
    plain, recorded = trainer(**METHODS["ict"]), trainer(**METHODS["ict"])
    for made in (plain, recorded):
        losses = made.losses
        made.losses = lambda batch, made=made, losses=losses: losses(frozen(made, batch))
    record_steps(recorded)
    assert steps(plain) == steps(recorded)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastcm: steps run without a CUDA graph (loss and gradient norm are [[") and not recorded.work.is_replayed
    assert_same_state(plain, recorded)


@pytest.mark.parametrize("which", [1, 2], ids=["gradients", "update"])
@pytest.mark.slow
def test_what_does_not_record_runs_plainly(which, capsys):
    plain, recorded = trainer(**METHODS["ict"]), trainer(**METHODS["ict"])
    graphs = record_steps(recorded)
    original = graphs.record

    def fail(work):
        if graphs.events.count("record") + 1 < which:
            return original(work)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        except RuntimeError:
            raise ValueError("capture_end") from None  # as leaving a broken recording does

    graphs.record = fail
    assert steps(plain) == steps(recorded)
    told = capsys.readouterr().err.splitlines()
    assert told == ["fastcm: steps run without a CUDA graph (RuntimeError: operation not permitted when stream is capturing more)"]
    assert_same_state(plain, recorded)
    assert recorded.work.graphs is None


def test_out_of_memory_ends_the_recording(monkeypatch, capsys):
    made = trainer(**METHODS["ict"])
    record_steps(made)
    steps(made, 2)
    monkeypatch.setattr(Trainer, "losses", run_out_of_memory(above=8))
    steps(made, 6)
    assert made.microbatch == 8 and made.work.graphs is None and "CUDA graph" not in capsys.readouterr().err


def test_a_batch_of_another_shape_goes_its_own_way():
    seen = []
    work = CapturedStep(lambda batch: seen.append(len(batch.images)), lambda: None, check=lambda: torch.ones(2), graphs=None)
    made = trainer()
    whole = made.next_batch()
    work.graphs = record_steps(made)
    work.gradients(whole)
    work.gradients(whole._replace(images=whole.images[:3]))
    work.gradients(whole._replace(images=whole.images.float()))
    assert seen == [16, 3, 16] and made.work.graphs.events == ["run"]


def test_a_trainer_is_in_no_cycle():
    """On a device its memory would stay until Python looks for cycles."""
    made = trainer()
    steps(made, 1)
    gone = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert gone() is None
    finally:
        gc.enable()


def test_a_batch_in_pieces_is_mirrored_as_the_whole():
    made, seen = trainer(microbatch=5), []
    made.method_loss = lambda batch, scalars, factor: seen.append(batch.flip) or made.loss.expand(len(batch.images))
    for start in (0, 5, 10, 15):
        made.losses(piece(made.next_batch(), start, 5))
    whole = kernels.uniform(made.seed, made.next_batch().position, stream=FLIP_STREAM) < 0.5
    assert torch.equal(torch.cat(seen), whole) and 0 < whole.sum() < 16


def test_other_peoples_networks_are_not_recorded(monkeypatch):
    monkeypatch.setattr("fastcm.training.captured_step.CudaGraphs", lambda device: "graphs")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    config = dict(presets.digits().network)
    own = networks.build(config.pop("kind"), config)
    assert graphs_for(cuda, own) == "graphs"
    assert graphs_for(cpu, own) is None and graphs_for(cuda, torch.nn.Conv2d(1, 1, 1)) is None


# With a GPU


def on_the_gpu(*, recorded, precision="bf16", method="ict", device="cuda"):
    """A trainer of a small network on the digits, compiled as its users have it; plain: the same without CUDA graphs."""
    config = trainer(method=method, **METHODS[method]).config
    built = build_network(config).to(device).train()
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.abs().sum() == 0:
                parameter.normal_(0, 0.05, generator=generator)
    made = build_trainer(
        config, built, target_of(built, config), open_dataset("digits"), device=torch.device(device), precision=precision, compiled=True
    )
    if not recorded:
        made.work.stop()
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ct", "ict", "ect"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_train_alike(method, precision, capsys):
    plain, recorded = (on_the_gpu(recorded=recorded, precision=precision, method=method) for recorded in (False, True))
    assert isinstance(recorded.work.graphs, CudaGraphs)
    expected, found = steps(plain), steps(recorded)
    assert capsys.readouterr().err == "" and recorded.work.is_replayed
    assert [row[2] for row in found] == [row[2] for row in expected]
    tolerance = 1e-4 if precision == "fp32" else 2e-2  # sums in the order of the moment, over twenty updates
    for (loss, norm, _), (other_loss, other_norm, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other_loss, rel=tolerance) and norm == pytest.approx(other_norm, rel=5 * tolerance)
    assert int(recorded.optimizer.steps_taken) == 20 and len({row[0] for row in found}) > 15


@pytest.mark.gpu
def test_a_recorded_step_neither_waits_nor_allocates():
    made = on_the_gpu(recorded=True)
    steps(made, WARM_UP + 3)
    assert made.work.is_replayed
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for _ in range(5):
                made.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    names = [event.name for event in profiled.events()]
    graphs = sum(name == "cudaGraphLaunch" for name in names)
    assert graphs == 10  # two a step
    # The profiler's own end waits for the device once.
    waits = [name for name in names if name in ("cudaMalloc", "cudaFree", "cudaStreamSynchronize", "cudaEventSynchronize")]
    assert not waits, waits
    assert not [name for name in names if "DtoH" in name]
    after = torch.cuda.memory_stats()
    for figure in ("num_device_alloc", "allocated_bytes.all.current"):
        assert after[figure] == before[figure]
