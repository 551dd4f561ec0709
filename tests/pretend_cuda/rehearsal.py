"""What `make gpu STAGE=all ARGS=--dry` runs in the place of `fastcm`: the same commands with small networks and few rounds.

`python -m rehearsal bench kernels|latency|train ...` and `python -m rehearsal start --json OUT`. Their figures mean nothing.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

from fastcm import cli, kernels
from fastcm.benchmarks import models
from fastcm.benchmarks.interleaved import Limits
from fastcm.benchmarks.kernels import bench as kernel_bench
from fastcm.benchmarks.latency import bench as latency_bench
from fastcm.benchmarks.training import bench as train_bench

TINY = {
    "resolution": 8,
    "in_channels": 1,
    "out_channels": 1,
    "channels": 8,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
    "num_classes": 10,
}
# Of a kernel's case: larger ones would only take longer.
CASE_BYTES = 1 << 25
STEPS, BATCH = "12", 8


def main(argv: list[str]) -> int:
    kernels.use("reference")
    for name, model in models.MODELS.items():
        if name != "digits":
            models.MODELS[name] = replace(model, kind="adm", options=TINY, train_batches={"cuda": (8,), "cpu": (8,)})
    if argv[0] == "start":
        from fastcm.benchmarks.first_hour import start

        digits = start.presets.digits()
        start.presets = SimpleNamespace(digits=lambda: replace(digits, network={"kind": "adm", **TINY}, batch=BATCH))
        return start.main([*argv[1:], "--steps", STEPS])
    latency_bench.limits = lambda device, seconds, quick: Limits(0, fewest=3, most=3)
    train_bench.limits = lambda job, seconds, quick: Limits(0, fewest=2, most=2)
    train_bench.matmul_tflop_s = lambda device: 1.0
    cases = kernel_bench.bench_cases()
    kernel_bench.bench_cases = lambda: [replace(case, quick=True) for case in cases if case.bytes <= CASE_BYTES]
    kernel_bench._by_kernel = lambda call: call
    measure = kernel_bench.measure
    kernel_bench.measure = lambda call, *, regime, seconds: measure(call, regime="resident", seconds=0)
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
