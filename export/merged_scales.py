"""Products with single numbers in the one form that MNN takes.

Its converter aborts where a sum takes a chain of such products (3.6.1: `vector::_M_range_check`), and its runtime multiplies some channels
alone where a number of shape [1, 1, 1, 1] stands before the result of a convolution.
"""

import numpy as np


def merge_scales(model) -> None:
    """c2 * (c1 * x) becomes (c1 c2) * x with a number of rank 0, in place. model: an onnx_ir.Model."""
    import onnx_ir as ir

    graph = model.graph
    for node in graph:
        if (outer := _scaled(node)) is None:
            continue
        place, value, scale = outer
        while (inner := _scaled(value.producer())) is not None:
            _, value, factor = inner
            scale = scale * factor
        number = ir.tensor(np.array(scale, np.float32))
        merged = ir.Value(name=f"{node.outputs[0].name}_number", const_value=number, shape=ir.Shape(()), type=ir.TensorType(number.dtype))
        graph.register_initializer(merged)
        node.replace_input_with(place, value)
        node.replace_input_with(1 - place, merged)


def _scaled(node):
    """(place of x, x, c) of a node c * x of a single number c; None for every other."""
    if node is None or node.op_type != "Mul":
        return None
    for place, value in enumerate(node.inputs):
        other = node.inputs[1 - place]
        if other.const_value is not None and other.const_value.size == 1 and value.const_value is None:
            return place, value, other.const_value.numpy().reshape(())[()]
    return None
