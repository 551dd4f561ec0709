"""The form that every exported file must have before it is published: well-formed, as its contract says, and runnable on its target."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastcm.errors import RunError, reason_of
from fastcm.export.quiet import quiet
from fastcm.export.targets import Target
from fastcm.generation.onnx_contract import Contract


def check_structure(path: Path, contract: Contract, target: Target) -> None:
    """Raises RunError, naming the node or input, unless the file passes onnx.checker and strict shape inference, has the contract's
    inputs and outputs with their batch, and uses operators, domains and types of the target alone."""
    model = checked(path)
    check_values(path, model, contract)
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx", *target.domains):
            operator = f"{node.domain}::{node.op_type} ({node.name})"
            raise refused(path, f"operator of a domain that {target.name} lacks", operator)
    for fault in unsupported(model, target):
        raise refused(path, f"operator that {target.table.source} ({target.table.version}) does not list", fault)


def refused(path: Path, what: str, found: str) -> RunError:
    return RunError(f"{what} in {path.name}: {found}. Nothing was written.")


def checked(path: Path):
    """The model with the types and shapes of every value, weights left in their file where they have one."""
    import onnx

    inferred = path.with_name("inferred.onnx")
    try:
        with quiet():
            onnx.checker.check_model(str(path), full_check=True)
            onnx.shape_inference.infer_shapes_path(str(path), str(inferred), strict_mode=True)
            return onnx.load(inferred, load_external_data=False)
    except Exception as error:
        raise refused(path, "malformed graph", reason_of(error)) from error
    finally:
        inferred.unlink(missing_ok=True)


def check_values(path: Path, model, contract: Contract) -> None:
    from onnx import TensorProto, helper

    wanted = {**contract.inputs, "images": contract.output}
    values = [*model.graph.input, *model.graph.output]
    if [value.name for value in values] != list(wanted):
        raise refused(path, "unexpected inputs and outputs", ", ".join(value.name for value in values))
    for value in values:
        kind, (shape, dtype) = value.type.tensor_type, wanted[value.name]
        dims = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
        found = f"{value.name} is {TensorProto.DataType.Name(kind.elem_type)} {dims}"
        if contract.batch is None and not isinstance(dims[0], str):
            raise refused(path, "fixed batch", found)
        if contract.batch is not None and dims[0] != contract.batch:
            raise refused(path, f"another batch than {contract.batch}", found)
        if (tuple(dims[1:]), kind.elem_type) != (shape, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))):
            raise refused(path, "unexpected shape or type", found)


def unsupported(model, target: Target) -> Iterator[str]:
    """Nodes whose operator, element type or number of values the target's table does not list. Concat takes its inputs in turns
    (onnxruntime, pull request 25390)."""
    types = element_types(model)
    for node in model.graph.node:
        listed = target.table.operators.get(f"{node.domain}/{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type)
        if listed is None:
            yield f"{node.op_type} ({node.name})"
            continue
        values = [name for name in (*node.input, *node.output) if name]
        used = {types[name] for name in values}
        if not used <= listed:
            yield f"{node.op_type} ({node.name}) of {', '.join(sorted(used - listed))}"
        if target.table.buffers is not None and node.op_type != "Concat" and len(values) > target.table.buffers:
            yield f"{node.op_type} ({node.name}) with {len(values)} inputs and outputs of {target.table.buffers}"


def element_types(model) -> dict[str, str]:
    """Value name -> its type's NumPy name."""
    from onnx import helper

    graph = model.graph
    numbers = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    numbers |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: helper.tensor_dtype_to_np_dtype(number).name for name, number in numbers.items()}
