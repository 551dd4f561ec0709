"""Small runs that the tests of training share: a network of a few thousand weights on the built-in digits."""

from pathlib import Path

from fastcm import runs
from fastcm.training.run import RunResult

SMALL = {
    "network.channels": 8, "network.head_channels": 8, "network.channel_mult": (1, 2), "network.blocks": 1, "batch": 16,
    "precision": "fp32", "device": "cpu", "compile": "off", "checkpoint_every_s": 1e9,
}  # fmt: skip


def small_run(
    out: Path, *, kimg: float = 0.16, method: str | None = None, teacher: str | None = None, callbacks=(), **changes
) -> RunResult:
    """Trains digits with the small network for `kimg` thousand images (ten steps by default)."""
    changes = {**SMALL, "duration_kimg": kimg, **changes}
    return runs.start(runs.plan("digits", method=method, teacher=teacher, out=out, changes=changes), callbacks=callbacks)
