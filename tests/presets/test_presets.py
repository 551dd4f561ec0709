"""Published presets: every constant against the table of published_runs.py, schedules, sizes, refusals, docs/presets.md."""

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from published_runs import DEFAULTS, NETWORKS, PUBLISHED, D

from fastcm import networks, presets, runs
from fastcm.errors import InputError
from fastcm.training.methods import ECT_METHODS, FIELDS_OF, METHODS, TAUGHT_METHODS
from fastcm.training.objective_config import ObjectiveConfig
from fastcm.training.schedule import step_values

DOCS = Path(__file__).resolve().parents[2] / "docs" / "presets.md"
BUILT_IN = {"mnist": METHODS, "digits": METHODS, "emoji32": ("edm", "cd", "ict", "ect"), "emoji32-large": ("edm", "cd", "ict", "ect")}
OURS = [(name, method) for name, methods in BUILT_IN.items() for method in methods]


def config_of(name, method):
    return presets.preset(name, method=method, teacher="teacher" if method in TAUGHT_METHODS else None)


BUILT = {}


def network_of(name, method, **changes):
    """The network of a preset on the meta device, one for all methods that train it: nothing is allocated."""
    options = {**config_of(name, method).network, **changes}
    key = repr(sorted(options.items()))
    if key not in BUILT:
        with torch.device("meta"):
            BUILT[key] = networks.build(options.pop("kind"), options)
    return BUILT[key]


def weights_of(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_table_holds_every_preset():
    assert {name for name, _ in [*PUBLISHED, *OURS]} | {"folder"} == set(presets.PRESETS)


@pytest.mark.parametrize(("name", "method"), PUBLISHED)
def test_published_constants(name, method):
    config = config_of(name, method)
    _, steps, batch, lr, averages, loss, rest = PUBLISHED[name, method]
    rest = {**DEFAULTS, **rest}
    assert (config.preset, config.method, config.batch) == (name, method, batch)
    assert config.duration_kimg * 1000 == pytest.approx(steps * batch, abs=0.5)
    optimizer = config.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.betas, optimizer.eps) == (rest["optimizer"], lr, rest["betas"], rest["eps"])
    assert (optimizer.lr_warmup_kimg, optimizer.ema_rampup) == (rest["warmup_kimg"], rest["rampup"])
    assert (optimizer.weight_decay, optimizer.clip) == (0.0, None)
    decay = None if rest["decay_steps"] is None else rest["decay_steps"] * batch / 1000
    assert (optimizer.lr_decay, optimizer.lr_decay_kimg) == ("none" if decay is None else "inverse-sqrt", decay)
    assert optimizer.ema_widths == rest["widths"]
    assert (config.flip, config.precision) == (rest["flip"], rest["precision"])
    network = network_of(name, method).config
    assert network.dropout == rest["dropout"] and getattr(network, "dropout_resolution", None) == rest["dropout_resolution"]
    for average, kimg in zip(averages, optimizer.ema_halflife_kimg, strict=True):
        decay = average if average < 1 else 0.5 ** (batch / (average * 1000))
        assert 0.5 ** (batch / (kimg * 1000)) == pytest.approx(decay, abs=1e-10)
    for field in FIELDS_OF[method]:
        if field in loss:
            assert getattr(config.objective, field) == loss[field], field
    unread = {field.name for field in fields(ObjectiveConfig)} - set(FIELDS_OF[method])
    assert not unread & set(loss), "a row of the table names what its method does not read"


@pytest.mark.parametrize(("name", "method"), PUBLISHED)
def test_published_network(name, method):
    config = config_of(name, method)
    kind, resolution, classes, weights, options = NETWORKS[PUBLISHED[name, method][0]]
    network = network_of(name, method)
    assert weights_of(network) == weights
    assert (config.network["kind"], config.resolution) == (kind, resolution)
    assert (network.config.resolution, network.config.in_channels, network.config.num_classes) == (resolution, 3, classes)
    for field, value in options.items():
        assert getattr(network.config, field) == value, field


@pytest.mark.slow
def test_augmentation_labels_give_the_published_count():
    """EDM's own DDPM++ for CIFAR-10 embeds nine augmentation labels."""
    assert weights_of(network_of("cifar10", "edm", augment_channels=9)) == 55_733_891


@pytest.mark.parametrize(("name", "method"), [*PUBLISHED, *OURS])
def test_form_and_conditioning(name, method):
    noise = config_of(name, method).noise
    assert (noise.sigma_min, noise.sigma_max, noise.sigma_data, noise.rho) == (0.002, 80.0, 0.5, 7.0)
    assert noise.form == {"cd": "boundary", "ct": "boundary", "ict": "boundary", "meanflow": "flow"}.get(method, "edm")
    if method == "meanflow":
        assert noise.c_noise == "sigma / (1 + sigma)" and config_of(name, method).network["second_time"] == "gap"
        return
    network = "ln sigma / 4" if name.startswith(("cifar10", "imagenet64-edm2")) or name == "emoji32-large" else "250 ln sigma"
    theirs = (("digits", "scd"), ("mnist", "scd"), ("cifar10-fastgen", "scd"), ("cifar10-fastgen", "sct"))  # that of their teacher
    trigflow = method in ("scd", "sct") and (name, method) not in theirs and "edm2" not in name
    assert noise.transition == (1.0 if method == "tcm" else None)
    assert noise.c_noise == ("arctan(sigma / sigma_data)" if trigflow else network)


# N(k) and mu(k) at shares of the run, calculated by hand from the papers' formulas; for ECT the stage.
SCHEDULES = {
    ("cifar10", "cd"): [(0.0, 18, 0.0), (1.0, 18, 0.0)],
    ("cifar10", "ct"): [(0.0, 2, 0.9), (0.125, 54, 0.99611), (0.5, 107, 0.99803), (1.0, 151, 0.99861)],
    ("cifar10-code", "ct"): [(0.0, 2, 0.81), (0.125, 54, 0.99603), (0.5, 107, 0.99801), (1.0, 151, 0.99860)],
    ("cifar10", "ict"): [(0.0, 11, 0.0), (0.125, 21, 0.0), (0.49, 81, 0.0), (0.5, 161, 0.0), (0.875, 1281, 0.0), (1.0, 1281, 0.0)],
    ("cifar10", "ect"): [(0.0, 0, 0.0), (0.1249, 0, 0.0), (0.125, 1, 0.0), (0.9, 7, 0.0), (1.0, 7, 0.0)],
    ("cifar10-ect-hour", "ect"): [(0.0, 0, 0.0), (1.0, 0, 0.0)],
    ("cifar10-fastgen", "ect"): [(0.0, 0, 0.0), (0.25, 7, 0.0), (0.3215, 9, 0.0), (1.0, 27, 0.0)],
    ("cifar10-fastgen", "tcm"): [(0.0, 0, 0.0), (1.0, 0, 0.0)],
    ("imagenet64", "ect"): [(0.0, 0, 0.0), (0.25, 1, 0.0), (0.99, 3, 0.0)],
    ("imagenet64", "cd"): [(0.0, 40, 0.95), (1.0, 40, 0.95)],
    ("imagenet64", "ct"): [(0.0, 2, 0.95), (0.00125, 8, 0.98726), (0.125, 72, 0.99858), (0.5, 143, 0.99928), (1.0, 201, 0.99949)],
    ("imagenet64-code", "ct"): [(0.0, 2, 0.9025), (0.00125, 8, 0.98545), (0.125, 72, 0.99856), (0.5, 143, 0.99928), (1.0, 201, 0.99949)],
    ("lsun256-code", "ct"): [(0.0, 2, 0.9025), (0.00125, 6, 0.97969), (0.125, 54, 0.99807), (1.0, 151, 0.99932)],
}


@pytest.mark.parametrize(("name", "method"), SCHEDULES)
def test_schedules_against_tabulated_values(name, method):
    config = config_of(name, method)
    for progress, steps, mu in SCHEDULES[name, method]:
        values = step_values(config, round(progress * config.duration_kimg * 1000))
        assert values.steps == steps and values.mu == pytest.approx(mu, abs=6e-6), (progress, values)


# The second level of two-step samples: published indices of the run's grid, or noise levels (sCM: half the tangent of 1.1).
TWO_STEPS = {
    "cifar10": {"cd": 0.585, "ict": 0.821, "ect": 0.821, "scd": 0.982, "sct": 0.982, "tcm": 1.0},
    "cifar10-fastgen": {"ect": 0.821, "scd": 0.821, "sct": 0.821, "tcm": 1.0},
    "cifar10-code": {"cd": 0.585},
    "cifar10-ict-deep": {"ict": 0.821},
    "cifar10-ect-hour": {"ect": 0.821},
    "imagenet64": {"cd": 1.382, "ct": 1.913, "ect": 1.526, "scd": 0.982, "sct": 0.982},
    "imagenet64-edm2": {"ect": 1.526, "scd": 0.982, "sct": 0.982, "tcm": 1.526},
    "imagenet64-edm2-fastgen": {"ect": 1.526, "tcm": 1.526},
    "imagenet64-edm2-xl-fastgen": {"ect": 1.526, "tcm": 1.526},
    "imagenet64-code": {"cd": 1.382, "ct": 1.913},
    "imagenet64-l2": {"cd": 1.382},
    "lsun256": {"cd": 4.366, "ct": 3.991},
    "lsun256-code": {"cd": 4.366, "ct": 3.991},
    "lsun256-l2": {"cd": 3.520},
}


@pytest.mark.parametrize(("name", "method"), PUBLISHED)
def test_two_step_levels(name, method):
    level = TWO_STEPS[name].get(method)
    sampling = config_of(name, method).sampling
    assert sampling == ({} if level is None else {"2": [80.0, pytest.approx(level, abs=5e-4)]})


def test_warm_ups_in_steps():
    """The papers count them in steps: sCM's tangent over 10,000, EDM's learning rate over 10 million images."""
    for name, batch in (("cifar10", 512), ("imagenet64", 2048)):
        for method in ("scd", "sct"):
            config = config_of(name, method)
            assert [step_values(config, k * batch).tangent_warmup for k in (0, 5_000, 10_000, 20_000)] == [0.0, 0.5, 1.0, 1.0]
    falling = [step_values(config_of("imagenet64-edm2", "ect"), steps * 128).lr for steps in (0, 2_000, 8_000)]
    assert falling == pytest.approx([1e-3, 1e-3, 5e-4])
    rates = [step_values(config_of("cifar10", "edm"), nimg).lr for nimg in (0, 5_000_000, 10_000_000, 200_000_000)]
    assert rates == [0.0, 5e-4, 1e-3, 1e-3]


def test_half_lives():
    assert presets.ema_halflife_kimg(D, 4096) == pytest.approx(50_000, rel=1e-9)
    assert presets.ema_halflife_kimg(0.5, 1000) == pytest.approx(1.0)
    assert presets.ema_halflife_kimg(0.999, 2048) == pytest.approx(1418.8555, rel=1e-6)
    assert 28_391 == pytest.approx(0.05 * 400_000 * 2048 / 1000 * math.log(2), abs=0.5)


@pytest.mark.parametrize(("name", "method"), OURS)
def test_built_in_presets(name, method):
    config = config_of(name, method)
    assert config.data == name.removesuffix("-large") and config.preset == name and config.method == method
    assert weights_of(network_of(name, method)) < {"mnist": 1e6, "digits": 1e6, "emoji32": 4e6, "emoji32-large": 5e7}[name]
    assert (config.network["resolution"], config.network["in_channels"]) == {"mnist": (28, 1), "digits": (8, 1)}.get(name, (32, 3))


@pytest.mark.parametrize("name", [name for name in presets.PRESETS if name != "folder"])
def test_methods_without_settings_are_refused(name):
    """One line that lists those the preset has; its own method is one of them, and `data` is what the config reads."""
    known = [method for preset, method in [*PUBLISHED, *OURS] if preset == name]
    assert presets.preset(name, method=known[0], teacher="t" if known[0] in TAUGHT_METHODS else None, data="there").data == "there"
    for method in METHODS:
        if method not in known:
            with pytest.raises(InputError) as error:
                presets.preset(name, method=method)
            assert str(error.value) == f"no settings of the preset {name} in --method: {method}. Use one of {', '.join(known)}."
    if not set(known) <= set(TAUGHT_METHODS):
        assert presets.preset(name, method=None).method in known


def test_misspelt_names_get_a_suggestion():
    with pytest.raises(InputError, match=r"unknown preset in PRESET: imagnet64\..* Did you mean 'imagenet64'\?"):
        presets.preset("imagnet64", method=None)
    with pytest.raises(InputError, match=r"unknown value in --method: ikt\..* Did you mean 'ict'\?"):
        presets.preset("cifar10", method="ikt")


def test_data_sets_of_presets():
    """Labels are dropped where the network has no classes, and kept where --set gives it some; built-in pictures need no --data."""
    pictures = np.zeros((10, 32, 32, 3), dtype=np.uint8), np.arange(10)
    assert runs.plan("cifar10", data=pictures).dataset.labels is None
    assert len(runs.plan("cifar10", data=pictures, changes={"network.num_classes": 10}).dataset.class_names) == 10
    ready = runs.plan("emoji32-large")
    assert (len(ready.dataset), ready.dataset.resolution, ready.dataset.labels, ready.config.data) == (1432, 32, None, "emoji32")
    with pytest.raises(InputError, match="missing option for the preset lsun256: --data"):
        runs.plan("lsun256")


def documented_row(name, method):
    """The row of docs/presets.md for a preset and method, written from its config."""
    config = config_of(name, method)
    loss, optimizer = config.objective, config.optimizer
    count = weights_of(network_of(name, method)) / 1e6
    kind = {"adm": "ADM", "edm2": "EDM2", "song": "NCSN++" if config.network.get("embedding") == "fourier" else "DDPM++"}[
        config.network["kind"]
    ]
    levels = f"P {loss.P_mean:g}, {loss.P_std:g}"
    if "distance" not in FIELDS_OF[method]:
        objective = levels
    else:
        ends = f"{loss.s0}" if loss.s0 == loss.s1 else f"{loss.s0} to {loss.s1}"
        mu = {"zero": "0", "fixed": f"{loss.mu0:g}", "adaptive": f"adaptive {loss.mu0:g}", "adaptive-code": f"code's {loss.mu0:g}"}
        pairs = "" if loss.pairs == "uniform" else f", {levels}"
        limit = "" if loss.ect_limit is None else f" to {loss.ect_limit:g}"
        map_of_ect = f", q {loss.ect_q:g}{limit}" if method in ECT_METHODS else ""
        objective = f"{loss.distance}, weight {loss.loss_weight}, {loss.curriculum} {ends}, mu {mu[loss.mu_schedule]}{pairs}{map_of_ect}"
    decays = [f"{0.5 ** (config.batch / kimg / 1000):.6g}" for kimg in optimizer.ema_halflife_kimg]
    decays += [f"width {width:g}" for width in optimizer.ema_widths]
    steps = round(config.duration_kimg * 1000 / config.batch)
    cells = [
        name,
        method,
        f"{kind} {count:.1f} M",
        objective,
        f"{steps:,}",
        f"{config.batch}",
        f"{optimizer.kind} {optimizer.lr:g}",
        ", ".join(decays),
        f"{config.network.get('dropout', 0.0):g}",
        "yes" if config.flip else "no",
        config.precision,
    ]
    return f"| {' | '.join(cells)} |"


def test_docs_table_equals_the_code():
    documented = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.count(" | ") == 10 and "| preset" not in line]
    expected = [documented_row(name, method) for name, method in [*PUBLISHED, *OURS] if name not in ("mnist", "digits")]
    assert documented == expected, "docs/presets.md should hold:\n" + "\n".join(expected)
