"""The runtimes that a graph can be made for, and what each asks of it."""

from typing import NamedTuple

from fastcm.errors import InputError, nearest
from fastcm.export import operators
from fastcm.export.operators import Table
from fastcm.export.translations import LAST_WITHOUT_GROUP_NORM


class Target(NamedTuple):
    """opset: the default one; from 21 on GroupNorm is one node, below it is InstanceNormalization over groups.
    domains: operator domains beyond ONNX's own that the runtime has. floats: the contract's, with a batch of 1 where none is asked for."""

    name: str
    opset: int
    table: Table
    domains: tuple[str, ...] = ()
    floats: bool = False


# ONNX Runtime's fusions for CUDA look for the InstanceNormalization form; 18 is the smallest opset that torch exports to without
# down-conversion. TensorRT reads the operator of opset 21 from 10.9 on, where InstanceNormalization is the slower form.
# WebGPU has no GroupNormalization.
TARGETS = {
    target.name: target
    for target in (
        Target("ort", 18, operators.ORT, domains=("com.microsoft",)),
        Target("tensorrt", 21, operators.TENSORRT),
        Target("web", 18, operators.WEB),
        Target("mobile", 18, operators.MOBILE, floats=True),
    )
}
OPSETS = range(18, 24)


def chosen_target(name: str, *, seeded: bool) -> Target:
    """The target by name; a graph that holds the noise stream's integers runs on ONNX Runtime's CPU provider alone."""
    if name not in TARGETS:
        raise InputError(f"unknown value in --target: {name}. Use one of {', '.join(TARGETS)}.{nearest(str(name), TARGETS)}")
    if not seeded:
        return TARGETS[name]
    if name != "ort":
        raise InputError(f"a runtime without 64-bit shifts for --seeded in --target: {name}. Use --target ort, or leave --seeded out.")
    return TARGETS[name]._replace(table=operators.ORT_CPU)


def chosen_opset(opset: int | None, target: Target) -> int:
    if opset is None:
        return target.opset
    last = OPSETS[-1] if "GroupNormalization" in target.table.operators else LAST_WITHOUT_GROUP_NORM
    if not OPSETS[0] <= opset <= min(last, target.table.opsets[1]):
        raise InputError(f"opset out of range in --opset: {opset}. Use {OPSETS[0]} to {last} for {target.name}.")
    return opset
