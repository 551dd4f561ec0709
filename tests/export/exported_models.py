"""Exports of a tiny network that several tests read: each takes seconds, so each is made once per process."""

import tempfile
from functools import cache
from pathlib import Path

from test_generator import small_denoiser

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
_folder = tempfile.TemporaryDirectory()


def tiny_denoiser(classes=3, seed=0):
    return small_denoiser(classes, seed, **TINY)


@cache
def exported(form: str) -> Exported:
    """The export of FORMS[form] or MOBILE_FORMS[form], in a folder of its own; read it, do not change it."""
    return export_onnx(tiny_denoiser(), INFO, out=Path(_folder.name) / form / f"{form}.onnx", **{**FORMS, **MOBILE_FORMS}[form])
