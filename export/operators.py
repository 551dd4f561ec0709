"""Which operators and element types each runtime supports, as its own published table says: the ones that these graphs may need.

A row is an operator and the types of its inputs and outputs together; an operator without a row is not supported.
"""

import re
from typing import NamedTuple

FLOATS = "float32 float16"
ALL = "float32 float16 int32 int64 uint8 bool"
INTEGERS = "uint32 uint64 int32 int64 bool"


class Table(NamedTuple):
    """source and version: where the rows were read. opsets: the first and last opset that the runtime reads. buffers: inputs and outputs
    together that a node may have, None where any number."""

    source: str
    version: str
    opsets: tuple[int, int]
    operators: dict[str, frozenset[str]]
    buffers: int | None = None


def _rows(text: str) -> dict[str, frozenset[str]]:
    """`Name Name: type type` on each line; operators of another domain than ONNX's as domain/Name."""
    rows = {}
    for names, types in re.findall(r"^ *([\w ./]+): *(.+)$", text, flags=re.MULTILINE):
        rows |= dict.fromkeys(names.split(), frozenset(types.split()))
    return rows


_MOVING = f"""
    Cast Concat Expand Gather Identity Reshape Shape Slice Split Squeeze Transpose Unsqueeze: {ALL} uint32 uint64
    And Not Or: bool
"""

# What both of ONNX Runtime's providers have: a graph of these runs whole on CUDA, without a copy to the CPU and back.
ORT_ROWS = _rows(f"""
    {_MOVING}
    Add Sub Mul Div: {FLOATS} int32 int64
    AveragePool Conv ConvTranspose Gemm GlobalAveragePool InstanceNormalization LayerNormalization MatMul: {FLOATS}
    Ceil Cos DepthToSpace Erf Exp Floor Log Pow Reciprocal Round Sigmoid Sin Softmax Sqrt Sum Tanh: {FLOATS}
    Clip: {FLOATS} int64 uint8
    Equal Greater GreaterOrEqual Less LessOrEqual: {FLOATS} int32 int64 bool
    Max Min Neg: {FLOATS} int32 int64
    Pad ReduceMean ReduceSum: {FLOATS} int64
    Resize: {FLOATS} int64
    Tile: {FLOATS} int32 int64
    Where: {FLOATS} int32 int64 uint8 bool
    com.microsoft/FusedMatMul com.microsoft/QuickGelu: {FLOATS}
""")

# The CPU provider alone: integer words of the noise stream. It has no half precision; ONNX Runtime puts casts around those nodes.
ORT_CPU_ROWS = {
    **ORT_ROWS,
    **_rows(f"""
    BitShift BitwiseAnd BitwiseOr BitwiseXor: {INTEGERS}
    Less Greater Equal: {FLOATS} {INTEGERS}
    Where: {FLOATS} int32 int64 uint8 uint64 bool
"""),
}

TENSORRT_ROWS = _rows(f"""
    Cast: {ALL}
    Concat Expand Gather Identity Reshape Shape Slice Split Squeeze Transpose Unsqueeze Tile: {FLOATS} int32 int64 bool
    And Not Or: bool
    Add Sub Mul Div Max Min Neg Pow ReduceMean ReduceSum Pad: {FLOATS} int32 int64
    AveragePool Conv ConvTranspose Gemm GlobalAveragePool GroupNormalization InstanceNormalization LayerNormalization MatMul: {FLOATS}
    Ceil Cos DepthToSpace Erf Exp Floor Log Reciprocal Round Sigmoid Sin Softmax Sqrt Tanh: {FLOATS}
    Clip: {FLOATS}
    Equal Greater GreaterOrEqual Less LessOrEqual: {FLOATS} int32 int64 bool
    Resize: {FLOATS} int64
    Sum: {FLOATS} int32 int64
    Where: {FLOATS} int32 int64 bool
""")

# The WebGPU table names no types; those that its shaders hold, and int64 for indices and shapes, which stay on the CPU.
WEB_ROWS = _rows(f"""
    Add AveragePool Cast Ceil Clip Concat Conv ConvTranspose Cos Div Erf Exp Expand Floor Gather Gemm: {ALL}
    GlobalAveragePool InstanceNormalization LayerNormalization Log MatMul Mul Neg Pad Pow Reciprocal ReduceMean ReduceSum: {ALL}
    Equal Greater GreaterOrEqual Less LessOrEqual Not Where: {ALL}
    Reshape Resize Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze: {ALL}
""")

# Floats alone: integers are shapes and indices that stand in the graph.
MOBILE_ROWS = _rows("""
    Add Sub Mul Div Neg Clip Erf Exp Floor Sigmoid Softmax Sqrt Tanh: float32
    AveragePool Conv ConvTranspose DepthToSpace Gemm GlobalAveragePool InstanceNormalization MatMul: float32
    Concat Transpose: float32
    Pad Reshape Resize Slice Squeeze Unsqueeze: float32 int64
""")

ORT = Table("ONNX Runtime, docs/OperatorKernels.md, CUDAExecutionProvider", "commit 8f063305aacd", (7, 25), ORT_ROWS)
ORT_CPU = Table("ONNX Runtime, docs/OperatorKernels.md, CPUExecutionProvider", "commit 8f063305aacd", (7, 25), ORT_CPU_ROWS)
TENSORRT = Table("ONNX-TensorRT, docs/operators.md", "TensorRT 10.15", (9, 24), TENSORRT_ROWS)
MOBILE = Table("converters of MNN and of ncnn (pnnx), as the tests run them", "MNN 3.6.1, ncnn 20261020", (9, 20), MOBILE_ROWS)
# The storage buffers of a shader that WebGPU guarantees (W3C, "Limits": maxStorageBuffersPerShaderStage).
WEB = Table("ONNX Runtime Web, js/web/docs/webgpu-operators.md", "commit 51f617724148", (7, 25), WEB_ROWS, buffers=8)
