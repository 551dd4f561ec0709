"""Exports of a tiny network that several tests read: each takes seconds, so each is made once for all workers of a test run."""

import fcntl
import os
import pickle
from functools import cache
from pathlib import Path

from test_generator import small_denoiser

from fastcm.export.program import build
from fastcm.export.to_onnx import Exported, export_onnx

TINY = {"channels": 8, "head_channels": 8, "channel_mult": (1,), "patch": 2, "attention_resolutions": (4,)}
INFO = {"classes": ["ant", "bee", "cat"], "licence": "MIT"}
LEVELS = (80.0, 3.0)
# The options of each export; together they hold every option that a graph can have.
FORMS = {
    "plain": {},
    "tensorrt": {"target": "tensorrt", "precision": "fp16", "sigmas": LEVELS, "uint8": True},
    "inpaint": {"task": "inpaint", "sigmas": LEVELS},
    "superres": {"task": "superres", "factor": 2, "target": "web", "uint8": True, "steps": 1},
    "seeded": {"seeded": True},
    "batch": {"batch": 3},
}
MOBILE_FORMS = {"mobile": {"target": "mobile"}, "mobile-steps": {"target": "mobile", "sigmas": LEVELS}}


def tiny_denoiser(classes=3, seed=0):
    return small_denoiser(classes, seed, **TINY)


@cache
def exported(form: str) -> Exported:
    """The export of FORMS[form] or MOBILE_FORMS[form], in a folder of its own; read it, do not change it."""

    def make(folder):  # a program is not for pickles, and soon built again
        done = export_onnx(tiny_denoiser(), INFO, out=folder / f"{form}.onnx", **{**FORMS, **MOBILE_FORMS}[form])
        return done._replace(reference=None)

    done = once(form, make)
    return done._replace(reference=build(tiny_denoiser().eval(), done.sigmas, done.contract._replace(precision="fp32")))


def once(name: str, make):
    """What `make(folder)` returns: made by the first worker that asks, while the others wait, and read by them."""
    folder = Path(os.environ["FASTCM_SHARED"]) / f"once-{name}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = folder / "made.pickle"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(kept.read_bytes())
