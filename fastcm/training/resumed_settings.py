"""What a run is known by when it is taken up again: data, weights and arithmetic by what they are, not by how they were asked for."""

import dataclasses
import hashlib
import json
from typing import Any

import torch
from torch import nn

from fastcm import networks
from fastcm.data.dataset import Dataset
from fastcm.errors import InputError
from fastcm.training.config import TrainConfig, differences
from fastcm.training.objective_config import ObjectiveConfig

# What may change when a run is resumed: its length, and what leaves the weights as they are, to rounding.
MAY_CHANGE = (
    "duration_kimg",
    "microbatch",
    "checkpoint_every_s",
    "evaluate_every_kimg",
    "sample_every_kimg",
    "sampling",
    "device",
    "compile",
)
# Settings that stand for something that is compared itself: the pictures, the weights, the precision that the run computes in.
STAND_FOR = (
    "data",
    "labels_file",
    "channels",
    "image_column",
    "label_column",
    "bad_images",
    "teacher",
    "guide",
    "init",
    "lpips_weights",
    "precision",
)
FACTS = ("dataset", "parameters", "computed_in", "computed_on", "weights")


def settings(
    config: TrainConfig, dataset: Dataset, network: nn.Module, *, precision: str, device: str, weights: dict[str, nn.Module | None]
) -> dict[str, Any]:
    """What config.json of a run holds: the config, and the facts that a resumed run is compared by.

    precision, device: those that it computes in. weights: the models that the settings of these names stand for.
    """
    return {
        **config.as_dict(),
        "dataset": {"fingerprint": dataset.fingerprint, "images": len(dataset)},
        "parameters": sum(p.numel() for p in network.parameters()),
        "computed_in": precision,
        "computed_on": device,
        "weights": {name: fingerprint(module) for name, module in weights.items() if module is not None},
    }


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, shapes and bytes of a module's tensors, and over the scalings of a denoiser."""
    digest = hashlib.sha256(repr(getattr(module, "preconditioning", None)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_resumed(old: dict[str, Any], new: dict[str, Any], out: object) -> list[str]:
    """Compares the settings of the run in `out` with those it is to go on with; returns lines that say what changes.

    Raises InputError naming the options that make another run of it.
    """
    if old["dataset"] != new["dataset"]:
        counts = f"{old['dataset']['images']:,} -> {new['dataset']['images']:,} pictures"
        raise InputError(f"other data than the run's in --data: {new['data']} ({counts}, {out} began with {old['data']}). Give the same.")
    if old["computed_in"] != new["computed_in"]:
        began = old["computed_in"]
        raise InputError(
            f"another precision than the run's in --precision: {began} -> {new['computed_in']} in {out}. Add --precision {began}."
        )
    for name, before in old.get("weights", {}).items():
        after = new["weights"].get(name)
        if before != after:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"other weights than the run's in {option}: {old[name]} -> {new[name]} in {out}. Give the model that it began with."
            )
    changes = differences(_compared({"weights": new["weights"], **old}), _compared(new))
    if changes:
        raise InputError(f"other settings than the run in --out: {out} ({'; '.join(changes)}). Use its settings, or another --out.")
    before, after = old["duration_kimg"], new["duration_kimg"]
    if after < before:
        raise InputError(f"shorter than the run in --out: --duration {after:g}kimg ({before:g} -> {after:g}). It may grow, not shrink.")
    notes = []
    if after > before:
        notes.append(f"duration {before:g} -> {after:g} kimg: learning rate, N and mu follow the new total from here on")
    if old.get("computed_on", new["computed_on"]) != new["computed_on"]:
        notes.append(f"resumed on {new['computed_on']}, not {old['computed_on']}: sums differ in the last bits")
    return notes


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that have to be equal, with the defaults of those that an earlier version did not write."""
    whole = _whole(TrainConfig, {**settings, "objective": _whole(ObjectiveConfig, settings["objective"])})
    kept = {name: value for name, value in whole.items() if name not in (*MAY_CHANGE, *STAND_FOR, *FACTS)}
    network = dict(kept["network"])
    kind = network.pop("kind", None)
    if kind in networks.KINDS:
        config_class, _ = networks.KINDS[kind]
        whole = {"kind": kind, **dataclasses.asdict(config_class(**network))}
        kept["network"] = json.loads(json.dumps(whole))
    return {**kept, "weights": sorted(settings["weights"])}


def _whole(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a section with its defaults, as JSON has them."""
    return {**{f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}, **settings}
