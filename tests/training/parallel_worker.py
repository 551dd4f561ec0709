"""One process of several, started by test_parallel.py with torchrun's variables: it runs the parts named and writes what it saw."""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from training_runs import SMALL, recorded_losses, run_out_of_memory, stop_after  # noqa: E402

from fastcm import cli, runs  # noqa: E402
from fastcm.errors import InputError, RunError  # noqa: E402
from fastcm.training.parallel import joined  # noqa: E402
from fastcm.training.trainer import Trainer  # noqa: E402


def train(processes, out, *, kimg=0.16, method=None, **changes):
    ready = runs.plan("digits", method=method, out=out, changes={**SMALL, "duration_kimg": kimg, **changes})
    return runs.start(ready, processes=processes)


def whole(processes, folder):
    with recorded_losses() as losses:
        train(processes, folder / "whole")
    return losses


def stopped(processes, folder):
    """The second process alone is asked to stop."""
    original = Trainer.train_step
    if processes.rank == 1:
        Trainer.train_step = stop_after(4)
    result = train(processes, folder / "stopped")
    Trainer.train_step = original
    return [result.signal, result.nimg]


def resumed(processes, folder):
    return train(processes, folder / "resumed").nimg


def learned_weight(processes, folder):
    """A method with a second optimizer."""
    with recorded_losses() as losses:
        train(processes, folder / "sct", method="sct", kimg=0.064)
    return losses


def short_of_memory(processes, folder):
    """The second process alone has no room for more than two images."""
    original = Trainer.losses
    if processes.rank == 1:
        Trainer.losses = run_out_of_memory(above=2)
    with recorded_losses() as losses:
        train(processes, folder / "short")
    Trainer.losses = original
    return losses


def apart(processes, folder):
    tensor = torch.full((100,), 1.0 + (processes.rank == 1) * 2**-23)
    processes.check_same([torch.ones(3)])
    try:
        processes.check_same([torch.ones(3), tensor])
    except RunError as error:
        return str(error)


def undivided(processes, folder):
    try:
        processes.share(15)
    except InputError as error:
        return str(error)


def hundred(processes, folder):
    with recorded_losses() as losses:
        train(processes, folder / "hundred", kimg=0.8, batch=8)
    return losses


def fail(argv):
    """The command line, in which the second process fails at its third step."""
    original = Trainer.train_step

    def step(self):
        if self.step == 2 and self.processes.rank == 1:
            raise InputError("a fault of the second process in here: 2. Mend it.")
        return original(self)

    Trainer.train_step = step
    return cli.main(argv)


if __name__ == "__main__":
    if sys.argv[1] == "fail":
        sys.exit(fail(sys.argv[2:]))
    target, *parts = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with joined() as group:
        found = {part: globals()[part](group, Path(target)) for part in parts}
    Path(target, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
