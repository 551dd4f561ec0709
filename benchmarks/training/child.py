"""One training step in a process of its own: its peak memory, or its part of a step that several processes take together.

`python -m fastcm.benchmarks.training.child SETTINGS`, SETTINGS being JSON; under torchrun's variables each process runs its share. The
first one prints a line of JSON: what `alone` or `together` return.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastcm.benchmarks.interleaved import Limits, percentiles, rounded, rounds
from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.results_file import Row
from fastcm.benchmarks.training.backends import Job, build, synchronize
from fastcm.errors import PeerError
from fastcm.training.parallel import joined


def main() -> None:
    settings = json.loads(sys.argv[1])
    with joined() as processes:
        device = torch.device(settings["device"])
        processes.use(device)
        model = MODELS[settings["model"]]
        job = Job(
            replace(model, options={**model.options, **settings["options"]}),
            settings["batch"],
            device,
            settings["precision"],
            settings["precision"],
            processes,
        )
        name, seconds = settings["backend"], settings["seconds"]
        row = one_step(job, name) if seconds is None else many_steps(job, name, seconds)
        if processes.is_writer:
            print(json.dumps(row))


def one_step(job: Job, name: str) -> Row:
    """peak_memory_gb: resident memory beyond that of the imports, at its highest during the making of the backend and three steps."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_bytes("VmRSS")
    build(name, job, compiled=False)
    return {"peak_memory_gb": rounded((resident_bytes("VmHWM") - before) / 1e9)}


def many_steps(job: Job, name: str, seconds: float) -> Row:
    backend = build(name, job)

    def step(turn: int) -> None:
        backend.step()
        synchronize(job.device)

    # As many rounds in every process: a step is one of all of them.
    (count,) = job.processes.agree(max(6, round(seconds / _seconds(step))))
    times = rounds({name: step}, Limits(1e9, fewest=count, most=count))[name]
    return {**percentiles(times), "images_per_s": rounded(1000 * job.batch / float(np.median(times))), "rounds": len(times)}


def _seconds(step) -> float:
    return float(np.median(rounds({"": step}, Limits(0, fewest=3, most=3))[""])) / 1000


def resident_bytes(field: str) -> int:
    """VmRSS, resident memory, or VmHWM, its peak since this process began to run this program (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def ask(job: Job, name: str, *, seconds: float | None, processes: int = 1) -> Row:
    """What `processes` children say of the job; seconds: None for the memory of a step. RuntimeError: the last line of one that fails."""
    settings = {
        "model": job.model.name,
        "options": job.model.options,
        "batch": job.batch,
        "device": job.device.type,
        "precision": job.precision_of(name),
        "backend": name,
        "seconds": seconds,
    }
    command = [sys.executable, "-m", "fastcm.benchmarks.training.child", json.dumps(settings)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        environment |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
    answers = [process.communicate() for process in started]
    last = [(errors.strip().splitlines() or ["ended without a word"])[-1] for _, errors in answers]
    failed = [line for process, line in zip(started, last, strict=True) if process.returncode]
    if failed:  # the one that failed first says why, the others that it did
        raise RuntimeError(next((line for line in failed if PeerError.__name__ not in line), failed[0]))
    return json.loads(answers[0][0].strip().splitlines()[-1])


if __name__ == "__main__":
    main()
