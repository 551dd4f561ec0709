"""The memory estimate: against what the allocator hands out in a real step, and of networks that do not fit this machine."""

import gc
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastcm import cli, presets
from fastcm.data.dataset import open_dataset
from fastcm.training.memory import StorageWatch, estimate
from fastcm.training.run import build_network, target_of
from fastcm.training.trainer_parts import build_trainer


def config(*, method="ct", channels=32, batch=16, precision="fp32", **changes):
    """A network in colour whose activations outweigh what a machine adds by itself."""
    preset = presets.preset("digits", method=method)
    shape = {"resolution": 32, "in_channels": 3, "out_channels": 3, "channels": channels, "head_channels": 16, "num_classes": None}
    network = {**preset.network, **shape, "dropout": 0.1}
    return replace(preset, network=network, batch=batch, device="cpu", precision=precision, resolution=32, **changes)


def measured_peak(config):
    """Bytes that torch's allocator had out at once, from the making of the trainer to the end of a step."""
    pictures = open_dataset(np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8))

    def train():
        network = build_network(config).train()
        trainer = build_trainer(
            config, network, target_of(network, config), pictures, device=torch.device("cpu"), precision=config.precision, compiled=False
        )
        trainer.train_step()

    gc.collect()  # what earlier tests left, freed within, would count against the step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"microbatch": 4}], ids=["whole", "microbatch"])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(changes):
    settings = config(**changes)
    peak, estimated = measured_peak(settings), estimate(settings)
    assert estimated["activations"] > 3 * estimated["weights"]
    assert estimated["total"] == sum(size for name, size in estimated.items() if name != "total")
    assert 0.85 < estimated["total"] / peak < 1.15, (estimated, peak)


@pytest.mark.slow
def test_components_follow_the_settings():
    small = {"channels": 16, "batch": 8}
    plain = estimate(config(**small))
    assert plain["target"] == plain["weights"] == plain["averages"] == plain["gradient"] == plain["moments"] / 2
    parameters = sum(parameter.numel() for parameter in build_network(config(**small)).parameters())
    assert 4 * parameters <= plain["weights"] < 4.1 * parameters
    mixed = estimate(config(precision="bf16", **small))
    assert mixed["16-bit copies"] == plain["weights"] and mixed["gradient"] == plain["weights"] / 2
    assert 0.45 < mixed["activations"] / plain["activations"] < 0.75
    scaled = estimate(config(precision="fp16", **small))
    assert scaled["gradient"] == 1.5 * plain["weights"]
    assert estimate(config(microbatch=2, **small))["activations"] < 0.35 * plain["activations"]
    assert estimate(config(method="ict", **small))["target"] == 0


def test_the_watch_counts_what_was_made_within_and_still_lives():
    before = torch.ones(1000)
    with StorageWatch() as watch:
        made = before + 1
        view = made[:10]
        before.mul_(2)
        del made
        assert watch.now == watch.peak == 4000
        del view
        assert watch.now == 0
        before + 1
    assert watch.now == 0 and watch.peak == 4000


@pytest.mark.slow
def test_the_published_imagenet_network_is_estimated_without_its_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate(replace(presets.preset("imagenet64", method="edm"), device="cpu", precision="bf16", batch=64, microbatch=32))
    assert 1.17e9 < found["weights"] < 1.2e9  # 296 M parameters
    assert found["moments"] == 2 * found["weights"] and found["activations"] > 2e9
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4e8


@pytest.mark.slow
def test_a_dry_run_prints_it(capsys):
    assert cli.main(["train", "digits", "--dry-run", "--device", "cpu", "--precision", "fp32", "--batch", "8"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    assert [row[1] for row in rows][0] == "weights" and rows[-1][1] == "total" and float(rows[-1][2]) > 5
