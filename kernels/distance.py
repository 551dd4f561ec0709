"""Weighted distance of two denoised images per sample, with its gradient computed in the same pass.

With D = c_skip x + c_out F of student and target and d = D_student - D_target over the n elements of a sample:

    l1: mean |d|        l2: mean d^2        pseudo_huber: sqrt(sum d^2 + c^2) - c  (iCT, 2310.14189, Eq. 8; c = 0 is the plain 2-norm)

each times weight [B]. The gradient reaches F_student only: weight c_out d'(d). Images [B, C, H, W] in float32, bfloat16 or float16, values
fp32 [B]. Bytes per fp32 element: 20 for value and gradient, in one launch where a sample fits one program (n <= 16384); beyond, l1 and l2
take a second launch over the partial sums and pseudo_huber one over its gradient (28 bytes). A backward whose incoming gradient is 1, as
that of a sum over the batch, moves nothing more on CUDA; any other scales the gradient in place (8 bytes).
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcm.kernels import launch
from fastcm.kernels.launch import tl, triton
from fastcm.kernels.precondition import FLOATS, block_and_warps, dense, other_layout, precondition_reference, relative_layout, sample_block

KINDS = ("l1", "l2", "pseudo_huber")
ONE_PROGRAM, CHUNK = 16384, 4096


def distance(
    x_student: Tensor,
    F_student: Tensor,
    c_skip_student: Tensor,
    c_out_student: Tensor,
    x_target: Tensor,
    F_target: Tensor | None,
    c_skip_target: Tensor | None,
    c_out_target: Tensor | None,
    weight: Tensor,
    *,
    kind: str,
    c: float = 0.0,
) -> Tensor:
    """Return weight * d(D_student, D_target), fp32 [B]; its gradient to F_student is computed in the forward pass.

    x_*, F_*: float32, bfloat16 or float16 [B, C, H, W]; coefficients and weight fp32 [B] or [1]. F_target=None, with its coefficients
    None, means D_target = x_target. kind: "l1", "l2" or "pseudo_huber" with c >= 0. Only F_student may require a gradient. Raises
    ValueError naming a bad argument.
    """
    inputs = (x_student, F_student, c_skip_student, c_out_student, x_target, F_target, c_skip_target, c_out_target, weight)
    _check(*inputs, kind, c)
    arguments = (*inputs, kind, c, torch.is_grad_enabled() and F_student.requires_grad)
    if launch.chosen("distance", x_student) == "triton":
        return launch.call(_distance_op, *arguments)[0]
    # Without a kernel, an eager step on the CPU still takes the one pass over a single buffer; graphs take the definition, to be fused.
    if not (x_student.is_cuda or launch.INTERPRETED or _is_traced()):
        return _distance_op(*arguments)[0]
    return distance_reference(*inputs, kind=kind, c=c)


def distance_reference(
    x_student, F_student, c_skip_student, c_out_student, x_target, F_target, c_skip_target, c_out_target, weight, *, kind, c=0.0
):
    """The definition, in torch: differentiable in every argument."""
    D_student = precondition_reference(x_student, F_student, c_skip_student, c_out_student)
    D_target = x_target.float() if F_target is None else precondition_reference(x_target, F_target, c_skip_target, c_out_target)
    d = (D_student - D_target).flatten(1)
    if kind == "l1":
        return weight * d.abs().mean(1)
    if kind == "l2":
        return weight * d.square().mean(1)
    # The square root has no derivative at 0: a difference of zero gets the subgradient 0.
    squared = d.square().sum(1) + c * c
    positive = squared > 0
    return weight * (torch.where(positive, squared, 1.0).sqrt() * positive - c)


@triton.jit
def _denoised(side, i_b, o_x, o_F, m, N: tl.constexpr):
    """c_skip x + c_out F, or x where there is no F, of side = (x, F_x, c_skip, its stride, c_out, its stride)."""
    x, F_x, c_skip, skip_stride, c_out, out_stride = side
    b_D = tl.load(x + i_b * N + o_x, m, other=0.0).to(tl.float32)
    if F_x is not None:
        b_F = tl.load(F_x + i_b * N + o_F, m, other=0.0).to(tl.float32)
        b_D = tl.load(c_skip + i_b * skip_stride) * b_D + tl.load(c_out + i_b * out_stride) * b_F
    return b_D


@triton.jit
def _difference(student, target, i_b, o, m, N: tl.constexpr, INNER: tl.constexpr, INNER_TARGET: tl.constexpr):
    """D_student - D_target at the offsets o of F_student, whose gradient goes there: loads of the images may scatter, stores may not."""
    o_x = other_layout(o, N, INNER)
    return _denoised(student, i_b, o_x, o, m, N) - _denoised(target, i_b, o_x, other_layout(o, N, INNER_TARGET), m, N)


@triton.jit
def _store_gradient(gradient, student, slope, i_b, o, m, N: tl.constexpr):
    c_out, stride = student[4], student[5]
    slope *= tl.load(c_out + i_b * stride)
    tl.store(gradient + i_b * N + o, slope.to(gradient.dtype.element_ty), m)


@triton.jit
def _terms(d, N: tl.constexpr, KIND: tl.constexpr):
    """What the value sums, and what the gradient of l1 and l2 is a multiple of: |d| / n, d^2 / n or d^2."""
    if KIND == "l1":
        return tl.abs(d) / N, tl.where(d > 0, 1.0 / N, tl.where(d < 0, -1.0 / N, 0.0))
    elif KIND == "l2":
        return d * d / N, d * (2.0 / N)
    else:
        return d * d, d


@triton.jit
def _finished(total, c, KIND: tl.constexpr):
    """(distance, what scales `_terms`' gradient) from the sum over a sample."""
    if KIND == "pseudo_huber":
        root = tl.sqrt(total + c * c)
        return root - c, tl.where(root > 0, 1.0 / tl.where(root > 0, root, 1.0), 0.0)
    return total, 1.0


@triton.jit
def _distance_fwd_kernel(
    student,
    target,
    weight,
    weight_stride: tl.constexpr,
    value,
    gradient,
    c,
    N: tl.constexpr,
    INNER: tl.constexpr,
    INNER_TARGET: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program with a whole sample: its distance and gradient. Else its part of the sum; the gradient lacks the factor of `_finished`."""
    i_b, o, m = sample_block(N, BLOCK)
    term, slope = _terms(_difference(student, target, i_b, o, m, N, INNER, INNER_TARGET), N, KIND)
    total, w = tl.sum(term, 0), tl.load(weight + i_b * weight_stride)
    scale = w
    if N <= BLOCK:
        distance_, factor = _finished(total, c, KIND)
        total, scale = w * distance_, w * factor
    tl.store(value + tl.program_id(0), total)
    if gradient is not None:
        _store_gradient(gradient, student, slope * scale, i_b, o, m, N)


@triton.jit
def _distance_finish_kernel(
    partial,
    weight,
    weight_stride: tl.constexpr,
    value,
    unscaled,
    gradient,
    c,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b, o, m = sample_block(N if gradient is not None else BLOCK, BLOCK)
    o_chunk = tl.arange(0, PADDED)
    total = tl.sum(tl.load(partial + i_b * CHUNKS + o_chunk, o_chunk < CHUNKS, other=0.0), 0)
    distance_, factor = _finished(total, c, KIND)
    # Every program of a sample stores the same number.
    tl.store(value + i_b, tl.load(weight + i_b * weight_stride) * distance_)
    if gradient is not None:
        slope = factor * tl.load(unscaled + i_b * N + o, m)
        tl.store(gradient + i_b * N + o, slope.to(gradient.dtype.element_ty), m)


@triton.jit
def _distance_bwd_kernel(gradient, upstream, stride, N: tl.constexpr, BLOCK: tl.constexpr):
    i_b, o, m = sample_block(N, BLOCK)
    b_upstream = tl.load(upstream + i_b * stride)
    if b_upstream != 1.0:
        p = gradient + i_b * N + o
        tl.store(p, (tl.load(p, m).to(tl.float32) * b_upstream).to(gradient.dtype.element_ty), m)


def _launch_fwd(
    x_student, F_student, c_skip_student, c_out_student, x_target, F_target, c_skip_target, c_out_target, weight, kind, c, needs_gradient
):
    value, gradient = outputs = _empty_outputs(x_student, F_student, needs_gradient)
    batch, n = value.shape[0], F_student[0].numel() if F_student.shape[0] else 0
    if batch == 0 or n == 0:
        return value.zero_(), gradient
    x_student, F_student, x_target = dense(x_student), dense(F_student), dense(x_target)
    if relative_layout(x_student, x_target):
        x_target = x_target.contiguous(memory_format=torch.contiguous_format if x_student.is_contiguous() else torch.channels_last)
    F_target = None if F_target is None else dense(F_target)
    sides = (
        (x_student, F_student, *launch.strided(c_skip_student, batch), *launch.strided(c_out_student, batch)),
        (x_target, F_target, *launch.strided(c_skip_target, batch), *launch.strided(c_out_target, batch)),
    )
    weight = launch.strided(weight, batch)
    constants = {
        "N": n,
        "KIND": kind,
        "INNER": relative_layout(F_student, x_student),
        "INNER_TARGET": 0 if F_target is None else relative_layout(F_student, F_target),
    }
    with launch.device_guard(x_student):
        if n <= ONE_PROGRAM:
            block, warps = block_and_warps(n, ONE_PROGRAM)
            output = gradient if needs_gradient else None
            _distance_fwd_kernel[(batch,)](*sides, *weight, value, output, c, **constants, BLOCK=block, num_warps=min(32, warps))
        else:
            _launch_split(sides, weight, value, gradient if needs_gradient else None, c, constants)
    return outputs


def _launch_split(sides, weight, value, gradient, c, constants):
    n, kind, batch = constants["N"], constants["KIND"], value.shape[0]
    chunks = triton.cdiv(n, CHUNK)
    partial = torch.empty(batch, chunks, device=value.device)
    rescaled = gradient is not None and kind == "pseudo_huber"
    unscaled = torch.empty_like(gradient, dtype=torch.float32) if rescaled and gradient.dtype != torch.float32 else gradient
    _distance_fwd_kernel[(batch * chunks,)](*sides, *weight, partial, unscaled, c, **constants, BLOCK=CHUNK, num_warps=16)
    block, warps = block_and_warps(n, 1024)
    _distance_finish_kernel[(batch * (triton.cdiv(n, block) if rescaled else 1),)](
        partial,
        *weight,
        value,
        unscaled if rescaled else None,
        gradient if rescaled else None,
        c,
        N=n,
        CHUNKS=chunks,
        PADDED=triton.next_power_of_2(chunks),
        KIND=kind,
        BLOCK=block,
        num_warps=warps,
    )


def _launch_bwd(gradient: Tensor, upstream: Tensor) -> None:
    if gradient.numel():
        n = gradient[0].numel()
        block, warps = block_and_warps(n, 4096)
        with launch.device_guard(gradient):
            _distance_bwd_kernel[(gradient.shape[0] * triton.cdiv(n, block),)](
                gradient, upstream, upstream.stride(0), N=n, BLOCK=block, num_warps=warps
            )


def _empty_outputs(x_student, F_student, *others):
    value = torch.empty(x_student.shape[0], dtype=torch.float32, device=x_student.device)
    return value, torch.empty_like(dense(F_student)) if others[-1] else F_student.new_empty(0)


@torch.library.custom_op("fastcm::distance", mutates_args=())
def _distance_op(
    x_student: Tensor,
    F_student: Tensor,
    c_skip_student: Tensor,
    c_out_student: Tensor,
    x_target: Tensor,
    F_target: Tensor | None,
    c_skip_target: Tensor | None,
    c_out_target: Tensor | None,
    weight: Tensor,
    kind: str,
    c: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(value, gradient to F_student or an empty tensor), on two buffers: on the CPU a fresh one costs more than a pass."""
    d = _denoised_in_place(x_student, F_student, c_skip_student, c_out_student)
    d.sub_(x_target if F_target is None else _denoised_in_place(x_target, F_target, c_skip_target, c_out_target))
    n = d.shape[1:].numel()
    scale = weight * c_out_student
    if kind == "l1":
        value = d.abs().mean((1, 2, 3))
        d, scale = d.sign_(), scale / n
    elif kind == "l2":
        value = torch.linalg.vector_norm(d, 2, dim=(1, 2, 3)).square() / n
        scale = scale * 2 / n
    else:
        root = (torch.linalg.vector_norm(d, 2, dim=(1, 2, 3)).square() + c * c).sqrt()
        value = root - c
        scale = torch.where(root > 0, scale / torch.where(root > 0, root, 1.0), 0.0)
    if not needs_gradient:
        return weight * value, F_student.new_empty(0)
    return weight * value, d.mul_(scale.view(-1, 1, 1, 1)).to(F_student.dtype)


def _denoised_in_place(x, F_x, c_skip, c_out):
    """c_skip x + c_out F_x as a new fp32 tensor in the layout of F_x."""
    D_x = torch.empty_like(dense(F_x), dtype=torch.float32)
    return torch.mul(c_out.view(-1, 1, 1, 1), F_x, out=D_x).addcmul_(x.float(), c_skip.view(-1, 1, 1, 1))


@torch.library.custom_op("fastcm::distance_backward", mutates_args={"gradient"})
def _backward_op(gradient: Tensor, upstream: Tensor) -> None:
    gradient.mul_(upstream.view(-1, 1, 1, 1))


launch.register(_distance_op, _launch_fwd)
launch.register(_backward_op, _launch_bwd)
_distance_op.register_fake(_empty_outputs)


def _may_overwrite(gradient: Tensor) -> bool:
    # A graph that is kept (retain_graph=True) runs again with what it saved; a traced graph (a subclass of Tensor) fuses the product.
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    return (gradient.is_cuda or launch.INTERPRETED) and not kept and type(gradient) is Tensor


def _setup_context(ctx, inputs, output):
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)


def _backward(ctx, upstream, _):
    if torch.is_grad_enabled():
        raise RuntimeError("distance has no second derivative. Call fastcm.kernels.distance.distance_reference where one is needed.")
    (gradient,) = ctx.saved_tensors
    if upstream is None:
        gradient = None
    elif _may_overwrite(gradient):
        _backward_op(gradient, upstream)
    else:
        gradient = (gradient * upstream.view(-1, 1, 1, 1)).to(gradient.dtype)
    return None, gradient, *[None] * 10


_distance_op.register_autograd(_backward, setup_context=_setup_context)


def _is_traced() -> bool:
    """True in a compiled or exported graph and inside torch.func's transforms, which registered ops do not pass."""
    return torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def _check(x_student, F_student, c_skip_student, c_out_student, x_target, F_target, c_skip_target, c_out_target, weight, kind, c):
    op, x, batch = "distance", x_student, len(x_student)
    launch.check_tensor(op, "x_student", x, dtypes=FLOATS, shape=(None,) * 4)
    launch.check_tensor(op, "F_student", F_student, dtypes=FLOATS, shape=x.shape, like=x)
    launch.check_tensor(op, "x_target", x_target, dtypes=FLOATS, shape=x.shape, like=x)
    coefficients = {"c_skip_student": c_skip_student, "c_out_student": c_out_student, "weight": weight}
    if F_target is not None:
        launch.check_tensor(op, "F_target", F_target, dtypes=FLOATS, shape=x.shape, like=x)
        coefficients |= {"c_skip_target": c_skip_target, "c_out_target": c_out_target}
    elif c_skip_target is not None or c_out_target is not None:
        raise ValueError("coefficients without their image in distance(F_target): None. Give F_target, or None for all three.")
    for name, tensor in coefficients.items():
        launch.check_per_sample(op, name, tensor, batch, like=x)
    constants = {"x_student": x, "x_target": x_target, "F_target": F_target, **coefficients}
    for name, tensor in constants.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(f"argument with requires_grad in distance({name}). Only F_student gets a gradient: detach the others.")
    if kind not in KINDS:
        raise ValueError(f"unknown kind in distance(kind): {kind!r}. Use {', '.join(KINDS)}.")
    if not 0 <= c < float("inf"):
        raise ValueError(f"illegal value in distance(c): {c}. Use a number from 0.")
