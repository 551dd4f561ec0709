"""What a network cannot be faster than on this machine, and where ONNX Runtime spends the time of an exported file."""

import collections
import json
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch

from fastcm.benchmarks.interleaved import rounded
from fastcm.benchmarks.latency.backends import Job, exported, precision_of
from fastcm.benchmarks.models import forward_flops
from fastcm.benchmarks.results_file import Row
from fastcm.generation.generator import PRECISIONS

GEMM, COPY_BYTES = 2048, 1 << 28
PROFILED_RUNS, WARM_RUNS = 20, 5


@cache
def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(floating-point operations per second of a large product, bytes per second read and written by a copy), the best of several."""
    a, b = (torch.randn(GEMM, GEMM, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * GEMM**3 / _seconds(lambda: a @ b, device), 2 * COPY_BYTES / _seconds(lambda: target.copy_(source), device)


def _seconds(run, device: torch.device) -> float:
    times = []
    for _ in range(8):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def floor_row(job: Job, identity: Row) -> Row:
    """The larger of the time of the network's products at the rate of one large product, and of reading its weights once."""
    dtype = PRECISIONS[precision_of("fastcm", job)]
    gemm, copy = rates(job.device, dtype)
    weights = sum(p.numel() for p in job.model.meta().parameters())
    flops, weight_bytes = job.batch * forward_flops(job.model), weights * dtype.itemsize
    seconds = max(flops / gemm, weight_bytes / copy)
    return {
        **identity,
        "floor_ms": rounded(1000 * seconds),
        "gflop": rounded(flops / 1e9),
        "weight_mb": rounded(weight_bytes / 1e6),
        "gemm_gflop_s": rounded(gemm / 1e9),
        "copy_gb_s": rounded(copy / 1e9),
    }


def profile_row(job: Job, identity: Row) -> Row:
    """Milliseconds and nodes of each operator in one run of the exported file with seeds, as ONNX Runtime's own profile has them.

    Profiling costs each node some time: the sum is more than an image takes.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(exported(job.model, seeded=True)), options, providers=["CPUExecutionProvider"])
        seeds = job.seeds(0)
        feeds = {"seeds": seeds, **({} if job.model.classes is None else {"labels": seeds % job.model.classes})}
        for _ in range(WARM_RUNS + PROFILED_RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kinds = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kinds[event["args"]["op_name"]].append(event["dur"])
    runs = WARM_RUNS + PROFILED_RUNS
    nodes = {kind: len(times) // runs for kind, times in kinds.items()}
    # The median of the runs' sums, each run's events standing together.
    sums = {kind: np.array(times[: nodes[kind] * runs]).reshape(runs, -1)[WARM_RUNS:].sum(axis=1) for kind, times in kinds.items()}
    spent = {kind: rounded(float(np.median(total)) / 1000) for kind, total in sums.items()}
    order = sorted(spent, key=lambda kind: -spent[kind])
    return {**identity, "operators": {kind: [spent[kind], nodes[kind]] for kind in order}}
