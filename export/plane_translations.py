"""ONNX forms of some operators for runtimes that look up nothing and have four dimensions at most: MNN and ncnn."""

import itertools
from collections.abc import Callable

import numpy as np
import torch


def plane_translations() -> dict[object, Callable]:
    """Entries of the custom_translation_table of torch.onnx.export, in opset 18."""
    import onnx_ir as ir
    from onnxscript import opset18 as op

    def sliced_unbind(x, dim=0):
        rest = [int(size) for axis, size in enumerate(x.shape) if axis not in (0, dim)]
        bounds = [op.Constant(value_ints=[number]) for number in range(int(x.shape[dim]) + 1)]
        parts = [op.Slice(x, *ends, op.Constant(value_ints=[dim])) for ends in itertools.pairwise(bounds)]
        return tuple(op.Reshape(part, op.Constant(value_ints=[0, *rest])) for part in parts)

    def unshuffling_convolution(x, downscale_factor):
        # Four dimensions at most: each channel of the result has a kernel that picks one pixel of the patch.
        channels, r = int(x.shape[1]), downscale_factor
        kernel = np.eye(channels * r**2, dtype=np.float32).reshape(channels * r**2, channels, r, r)
        return op.Conv(x, op.Constant(value=ir.tensor(kernel)), strides=[r, r])

    def group_norm_of_planes(x, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
        # ncnn's instances are planes.
        channels, height, width = (int(size) for size in x.shape[1:])
        one, zero = (op.Constant(value_floats=[value] * num_groups) for value in (1.0, 0.0))
        planes = op.Reshape(x, op.Constant(value_ints=[0, num_groups, channels // num_groups * height, width]))
        norm = op.InstanceNormalization(planes, one, zero, epsilon=eps)
        norm = op.Reshape(norm, op.Constant(value_ints=[0, channels, height, width]))
        if weight is None:
            return norm
        per_channel = op.Constant(value_ints=[1, channels, 1, 1])
        return op.Add(op.Mul(norm, op.Reshape(weight, per_channel)), op.Reshape(bias, per_channel))

    def mean_of_planes(x, dim, keepdim=False, dtype=None):
        # pnnx loses the axis of a ReduceMean that has one alone.
        (axis,), size = dim, int(x.shape[dim[0]])
        if axis == 1 and keepdim:
            return op.Conv(x, op.Constant(value=ir.tensor(np.full((1, size, 1, 1), 1 / size, np.float32))))
        if axis == 2 and keepdim:
            return op.AveragePool(x, kernel_shape=[size, 1], strides=[size, 1])
        raise NotImplementedError(f"a mean over dimension {axis}")

    aten = torch.ops.aten
    return {
        aten.unbind.int: sliced_unbind,
        aten.pixel_unshuffle.default: unshuffling_convolution,
        aten.group_norm.default: group_norm_of_planes,
        aten.mean.dim: mean_of_planes,
    }
