"""Weighted distance of two denoised images per sample, with its gradient computed in the same pass.

With D = c_skip x + c_out F of student and target and d = D_student - D_target over the n elements of a sample:

    l1: mean |d|        l2: mean d^2        pseudo_huber: sqrt(sum d^2 + c^2) - c  (iCT, 2310.14189, Eq. 8; c = 0 is the plain 2-norm)

each times weight [B]. The gradient reaches F_student only: weight c_out d'(d). Bytes per fp32 element: 20, value and gradient together.
"""

import torch

KINDS = ("l1", "l2", "pseudo_huber")


def distance(
    x_student, F_student, c_skip_student, c_out_student, x_target, F_target, c_skip_target, c_out_target, weight, *, kind, c=0.0
):
    """Return weight * d(D_student, D_target), fp32 [B]; its gradient to F_student is computed in the forward pass.

    x_*, F_*: [B, C, H, W], any float dtype; coefficients and weight fp32 [B]. F_target=None (with its coefficients None) means
    D_target = x_target. kind: "l1", "l2" or "pseudo_huber" with c >= 0. Only F_student may require grad. Raises ValueError naming a bad
    argument.
    """
    if torch.autograd.forward_ad._current_level >= 0 or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return distance_reference(
            x_student, F_student, c_skip_student, c_out_student, x_target, F_target, c_skip_target, c_out_target, weight, kind=kind, c=c
        )
    with torch.no_grad():
        D_target = _denoised(x_target, F_target, c_skip_target, c_out_target)
    return _Distance.apply(F_student, x_student, c_skip_student, c_out_student, D_target, weight, kind, c)


def _denoised(x, F_x, c_skip, c_out):
    # The target may be given denoised: F_x is None there.
    if F_x is None:
        return x.float()
    return torch.addcmul(c_out.view(-1, 1, 1, 1) * F_x.float(), c_skip.view(-1, 1, 1, 1), x.float())


def distance_reference(
    x_student, F_student, c_skip_student, c_out_student, x_target, F_target, c_skip_target, c_out_target, weight, *, kind, c=0.0
):
    """The definition, in torch: differentiable in every argument, any number of times."""
    D_student = _denoised(x_student, F_student, c_skip_student, c_out_student)
    d = (D_student - _denoised(x_target, F_target, c_skip_target, c_out_target)).flatten(1)
    if kind == "l1":
        return weight * d.abs().mean(1)
    if kind == "l2":
        return weight * d.square().mean(1)
    # The square root has no derivative at 0: a difference of zero gets the subgradient 0.
    squared = d.square().sum(1) + c * c
    positive = squared > 0
    return weight * (torch.where(positive, squared, 1.0).sqrt() * positive - c)


def _value_and_gradient(F_student, x_student, c_skip, c_out, D_target, weight, kind, c):
    """(value fp32 [B], gradient to F_student in F_student's dtype), in place on one difference buffer."""
    d = _denoised(x_student, F_student, c_skip, c_out).sub_(D_target)
    n = d[0].numel()
    dims = (1, 2, 3)
    scale = weight * c_out
    if kind == "l1":
        value = weight * torch.linalg.vector_norm(d, 1, dim=dims) / n
        d.sign_()
        scale = scale / n
    elif kind == "l2":
        value = weight * torch.linalg.vector_norm(d, 2, dim=dims).square() / n
        scale = scale * 2 / n
    else:
        root = (torch.linalg.vector_norm(d, 2, dim=dims).square() + c * c).sqrt()
        value = weight * (root - c)
        scale = torch.where(root > 0, scale / torch.where(root > 0, root, 1.0), 0.0)
    return value, d.mul_(scale.view(-1, 1, 1, 1)).to(F_student.dtype)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, F_student, x_student, c_skip, c_out, D_target, weight, kind, c):
        value, gradient = _value_and_gradient(F_student, x_student, c_skip, c_out, D_target, weight, kind, c)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.view(-1, 1, 1, 1).to(gradient.dtype), *[None] * 7)
