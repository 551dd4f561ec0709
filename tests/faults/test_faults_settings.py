"""Settings of any name and value, and manifests of any content: each is taken or refused in a line that names it, and nothing is made."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fault_counts import times
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import small_run

from fastcm import networks, presets, runs
from fastcm.errors import InputError
from fastcm.training.checkpoint import read_checkpoint, save_checkpoint
from fastcm.training.config import OptimizerConfig, TrainConfig, override
from fastcm.training.config_file import read_config_file
from fastcm.training.methods import FIELDS_OF
from fastcm.training.objective_config import ObjectiveConfig

NUMBERS = st.one_of(st.integers(-3, 200), st.integers(), st.floats(), st.sampled_from([0, 1, -1, 0.5, 1e-30, 1e30, 2**31, 2**63]))
VALUES = st.recursive(
    st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=8), st.sampled_from(["auto", "fp16", "ict", "radam", "l2", "doubling"])),
    lambda inside: st.one_of(st.lists(inside, max_size=4), st.dictionaries(st.text(max_size=4), inside, max_size=2)),
    max_leaves=4,
)
BASE = presets.preset("digits", method=None)
FIELDS = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in ("network", "noise", "objective", "optimizer", "preset")]
FIELDS += [f"noise.{name}" for name in ("sigma_min", "sigma_max", "sigma_data", "rho", "c_noise")]
FIELDS += [f"objective.{f.name}" for f in dataclasses.fields(ObjectiveConfig) if f.name in FIELDS_OF[BASE.method]]
FIELDS += [f"optimizer.{f.name}" for f in dataclasses.fields(OptimizerConfig)]
NETWORK = [f"network.{name}" for name in runs.network_fields(BASE.network)]
# The smallest that a careless setting can make of it stays small: what is built here costs nothing.
NAMES = st.one_of(st.sampled_from(FIELDS), st.sampled_from(NETWORK), st.text(max_size=12))


def refused_or(function, *arguments):
    """What the function returns; None where it raised an InputError."""
    try:
        return function(*arguments)
    except InputError as error:
        assert str(error).strip()
        return None


@pytest.mark.slow
def test_any_setting_is_taken_or_refused(record_property):
    taken = []

    @settings(max_examples=times(60, 5000))
    @given(changes=st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
    def try_settings(changes):
        def resolve():
            config = override(BASE, changes, network_fields=runs.network_fields(BASE.network))
            network = dict(config.network)
            with torch.device("meta"):
                networks.build(network.pop("kind"), network)
            return json.dumps(config.as_dict())

        taken.append(refused_or(resolve) is not None)

    try_settings()
    assert any(taken) and not all(taken)
    record_property("tries", len(taken))
    record_property("seen", f"{len(taken) - sum(taken)} refused, {sum(taken)} taken")


@pytest.mark.slow
def test_any_settings_file_is_read_or_refused(tmp_path, record_property):
    count = 0

    @settings(max_examples=times(40, 5000))
    @given(
        content=st.one_of(VALUES.map(lambda v: json.dumps(v).encode()), st.binary(max_size=64), st.text(max_size=40).map(str.encode)),
        suffix=st.sampled_from([".json", ".toml"]),
    )
    def try_file(content, suffix):
        nonlocal count
        count += 1
        path = Path(tmp_path / f"x{suffix}")
        path.write_bytes(content)
        refused_or(read_config_file, path)

    try_file()
    record_property("tries", count)


@pytest.mark.slow
def test_any_manifest_is_refused_or_true(tmp_path, record_property):
    """Only the manifest that was written, however it is spelt, lets a checkpoint be read."""
    save_checkpoint(tmp_path, step=1, parts={"weights": {"a": torch.arange(3.0)}}, state={"step": 1})
    path, count = tmp_path / "step-000000001" / "manifest.json", 0
    good = json.loads(path.read_text())
    names = st.one_of(st.sampled_from([*good["files"], "../weights.safetensors", "/etc/passwd", "manifest.json"]), st.text(max_size=6))
    facts = st.one_of(VALUES, st.fixed_dictionaries({"bytes": VALUES, "sha256": VALUES}), st.sampled_from(list(good["files"].values())))
    manifests = st.one_of(VALUES, st.fixed_dictionaries({"files": st.one_of(VALUES, st.dictionaries(names, facts, max_size=3))}))

    @settings(max_examples=times(60, 5000))
    @given(content=manifests)
    def try_manifest(content):
        nonlocal count
        count += 1
        path.write_text(json.dumps(content))
        found = refused_or(read_checkpoint, path.parent)
        if found is not None:
            assert {name: good["files"].get(name) for name in content["files"]} == content["files"]

    try_manifest()
    path.write_text(json.dumps(good))
    assert read_checkpoint(path.parent)[1] == {"step": 1}
    record_property("tries", count)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": float("inf")}, "--lr: inf"),
        ({"lr": "fast"}, "--lr: fast"),
        ({"noise.sigma_min": 80.0}, "noise.sigma_min: 80"),
        ({"noise.sigma_data": 0.0}, "noise.sigma_data: 0"),
        ({"network.channels": 24, "network.norm_groups": 7}, "network.norm_groups: 7"),
        ({"network.patch": 3}, "network.patch: 3"),
        ({"network.blocks": 10**9}, "network.blocks: 1000000000"),
        ({"optimizer.ema_halflife_kimg": (-1.0,)}, "optimizer.ema_halflife_kimg"),
        ({"seed": 2**64}, "--seed: 18446744073709551616"),
        ({"microbatch": 0}, "--microbatch: 0"),
        ({"checkpoint_every_s": float("nan")}, "--checkpoint-every: nan"),
    ],
)
def test_values_out_of_range_name_themselves(tmp_path, changes, words):
    with pytest.raises(InputError) as caught:
        small_run(tmp_path / "run", **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
