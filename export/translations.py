"""ONNX forms of some operators, shorter than torch's own: fixed shapes are written down, only the batch stays open."""

import itertools
from collections.abc import Callable

import torch

from fastcm.export.operators import Table
from fastcm.export.plane_translations import plane_translations

# Up to here GroupNorm is written as InstanceNormalization over groups; opset 21 has an operator of its own.
LAST_WITHOUT_GROUP_NORM = 20


def translations(opset: int, runtime: Table) -> dict[object, Callable]:
    """The custom_translation_table of torch.onnx.export for graphs of `opset` that run on `runtime`."""
    import onnx_ir as ir
    from onnxscript import opset18 as op
    from onnxscript import opset21

    def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
        channels, *pixels = (int(size) for size in x.shape[1:])
        one, zero = (op.CastLike(op.Constant(value_floats=[value] * num_groups), x) for value in (1.0, 0.0))
        groups = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
        # In a Reshape, 0 copies a dimension: the batch keeps its name.
        norm = op.Reshape(op.InstanceNormalization(groups, one, zero, epsilon=eps), op.Constant(value_ints=[0, channels, *pixels]))
        if weight is None:
            return norm
        per_channel = op.Constant(value_ints=[1, channels, *[1] * len(pixels)])
        return op.Add(op.Mul(norm, op.Reshape(weight, per_channel)), op.Reshape(bias, per_channel))

    def plain_group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
        channels = int(x.shape[1])
        if weight is None:
            weight, bias = (op.CastLike(op.Constant(value_floats=[value] * channels), x) for value in (1.0, 0.0))
        return opset21.GroupNormalization(x, weight, bias, epsilon=eps, num_groups=num_groups)

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        if attn_mask is not None or is_causal or enable_gqa:
            raise NotImplementedError("attention with a mask or grouped heads")
        scale = int(query.shape[-1]) ** -0.5 if scale is None else scale
        last = len(query.shape) - 1
        transposed = op.Transpose(key, perm=[*range(last - 1), last, last - 1])
        # The query is scaled before the product, so that half precision does not overflow.
        weights = op.Softmax(op.MatMul(op.Mul(query, op.CastLike(op.Constant(value_float=scale), query)), transposed), axis=-1)
        return op.MatMul(weights, value)

    def unbind(x, dim=0):
        return tuple(op.Gather(x, op.Constant(value_int=index), axis=dim) for index in range(int(x.shape[dim])))

    def split(x, split_sizes, dim=0):
        ends = list(itertools.accumulate(split_sizes, initial=0))
        numbers = [op.Constant(value_ints=[number]) for number in (*ends, dim)]
        return tuple(op.Slice(x, start, end, numbers[-1]) for start, end in itertools.pairwise(numbers[:-1]))

    def pixel_shuffle(x, upscale_factor):
        channels, height, width = (int(size) for size in x.shape[1:])
        r = upscale_factor
        parts = op.Reshape(x, op.Constant(value_ints=[0, channels // r**2, r, r, height, width]))
        woven = op.Transpose(parts, perm=[0, 1, 4, 2, 5, 3])
        return op.Reshape(woven, op.Constant(value_ints=[0, channels // r**2, height * r, width * r]))

    def pixel_unshuffle(x, downscale_factor):
        # Unlike SpaceToDepth, which lets the channel vary fastest.
        channels, height, width = (int(size) for size in x.shape[1:])
        r = downscale_factor
        parts = op.Reshape(x, op.Constant(value_ints=[0, channels, height // r, r, width // r, r]))
        gathered = op.Transpose(parts, perm=[0, 1, 3, 5, 2, 4])
        return op.Reshape(gathered, op.Constant(value_ints=[0, channels * r**2, height // r, width // r]))

    def round_half_up(x):
        # A value next to a half may round to either side, as everywhere between runtimes.
        return op.Floor(op.Add(x, op.CastLike(op.Constant(value_float=0.5), x)))

    def right_shift(x, other):
        # ONNX shifts unsigned numbers alone. With the sign bit turned over, a signed number is an unsigned one, 2^63 further up.
        if x.dtype != ir.DataType.INT64:
            raise NotImplementedError(f"right shift of {x.dtype}")
        moved = op.Cast(op.BitwiseXor(x, op.Constant(value_int=-(2**63))), to=ir.DataType.UINT64)
        shifted = op.BitShift(moved, op.Cast(op.Constant(value_int=other), to=ir.DataType.UINT64), direction="RIGHT")
        return op.Sub(op.Cast(shifted, to=ir.DataType.INT64), op.Constant(value_int=2 ** (63 - other)))

    aten = torch.ops.aten
    table = {aten.scaled_dot_product_attention.default: attention, aten.unbind.int: unbind, aten.pixel_unshuffle.default: pixel_unshuffle}
    table |= dict.fromkeys((aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar), right_shift)
    if "Round" not in runtime.operators:
        table[aten.round.default] = round_half_up
    if "DepthToSpace" not in runtime.operators:
        table[aten.pixel_shuffle.default] = pixel_shuffle
    if runtime.buffers is not None:
        table[aten.split_with_sizes.default] = split
    table[aten.group_norm.default] = group_norm if opset <= LAST_WITHOUT_GROUP_NORM else plain_group_norm
    if "Gather" not in runtime.operators:
        table |= plane_translations()
    return table
