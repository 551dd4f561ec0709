"""A run's stored averages: one file at each interval, complete or absent, and the model of any width that they are combined to."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from fastcm.errors import InputError
from fastcm.training.power_average import WIDEST, combination
from fastcm.training.run_folder import CONFIG_NAME, is_run_folder
from fastcm.weights import model_folder

PREFIX, SUFFIX = "step-", ".safetensors"
# The most that a combination's profile may miss of the wanted one, and the widths among which an error names those within it.
MOST_ERROR = 0.05
TRIED_WIDTHS = tuple(hundredth / 100 for hundredth in range(1, 29))


def write_snapshot(folder: Path, step: int, averages: dict[str, dict[str, Tensor]]) -> None:
    """Writes `folder/step-N.safetensors`, the named averages after step N. A step that is there already is written anew."""
    folder.mkdir(exist_ok=True)
    tensors = {f"{average}.{name}": tensor for average, state in averages.items() for name, tensor in state.items()}
    model_folder.write_safetensors(_path(folder, step), tensors)


def cut_snapshots(folder: Path, step: int) -> None:
    """Removes those after `step`: a resumed run takes them again."""
    for later in snapshot_steps(folder):
        if later > step:
            _path(folder, later).unlink()


def snapshot_steps(folder: Path) -> list[int]:
    """Ascending."""
    names = (path.name.removeprefix(PREFIX).removesuffix(SUFFIX) for path in folder.glob(f"{PREFIX}*{SUFFIX}"))
    return sorted(int(name) for name in names if name.isdigit())


def reconstruct(run: Path, width: float, out: Path) -> dict:
    """Writes the model folder `out` with the average of `width` at the run's last snapshot.

    Returns its facts: ema_width, nimg, snapshots, least_squares_error (of the profile, as a share of its length). Needs the memory of a few
    tensors at a time. Raises InputError where the run has no snapshots, or none that span the width.
    """
    if not is_run_folder(run):
        raise InputError(f"no run in RUN: {run}. Give the folder of a training run.")
    if not 0 < width < WIDEST:
        raise InputError(f"illegal value in --width: {width:g}. Give a number above 0, below {WIDEST:.3g}.")
    if out.exists():
        raise InputError(f"--out exists already: {out}. Name a new folder, or remove it first.")
    settings, steps = model_folder.read_json(run / CONFIG_NAME), snapshot_steps(run / "snapshots")
    widths = settings["optimizer"].get("ema_widths") or ()
    if not steps or not widths:
        remedy = "Train with --set optimizer.ema_widths=0.05,0.1 --set optimizer.snapshot_every_kimg=N."
        raise InputError(f"no snapshots of averages in RUN: {run}. {remedy}")
    if not model_folder.is_model_folder(run / "model"):
        raise InputError(f"no model yet in {run}: the run has not written model/. Let it train longer.")
    taken_at, of_width = np.repeat(steps, len(widths)), np.tile(widths, len(steps))
    shares, error = combination(taken_at, of_width, step=steps[-1], width=width)
    if error > MOST_ERROR:
        fitting = [each for each in TRIED_WIDTHS if combination(taken_at, of_width, step=steps[-1], width=each)[1] <= MOST_ERROR]
        whole = fitting and len(fitting) == round(100 * (fitting[-1] - fitting[0])) + 1
        spanned = f"{fitting[0]:g} to {fitting[-1]:g}" if whole else ", ".join(f"{each:g}" for each in fitting or widths)
        raise InputError(
            f"a width that the snapshots do not span in --width: {width:g} (least-squares error {error:.1%}, {MOST_ERROR:.0%} at most). "
            f"Give {spanned}."
        )
    config = model_folder.read_json(run / "model" / model_folder.CONFIG_NAME)
    state = model_folder.read_safetensors(run / "model" / model_folder.WEIGHTS_NAME)
    with ExitStack() as stack:
        files = {step: stack.enter_context(_opened(_path(run / "snapshots", step))) for step in steps}
        parts = [(files[step], f"width-{each:g}.") for step in steps for each in widths]
        state = {name: _combined(parts, shares, name, tensor) for name, tensor in state.items()}
    facts = {"ema_width": width, "nimg": steps[-1] * settings["batch"], "snapshots": len(steps), "least_squares_error": error}
    training = {name: value for name, value in config["training"].items() if name != "ema_halflife_kimg"}
    model_folder.write_model(out, {**config, "training": {**training, **facts}}, state)
    return facts


def _combined(parts: list, shares: np.ndarray, name: str, tensor: Tensor) -> Tensor:
    """The tensor's combination, summed in fp64; one that no average holds, a buffer, as it is."""
    if parts[0][1] + name not in parts[0][0].keys():  # noqa: SIM118 - a file, not a dictionary
        return tensor
    total = torch.zeros(tensor.shape, dtype=torch.float64)
    for (file, prefix), share in zip(parts, shares, strict=True):
        total.add_(file.get_tensor(prefix + name), alpha=float(share))
    return total.float()


def _opened(path: Path):
    try:
        return safetensors.safe_open(path, "pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"unreadable snapshot: {path} ({error}). Remove it; the others then stand for it.") from None


def _path(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:09d}{SUFFIX}"
