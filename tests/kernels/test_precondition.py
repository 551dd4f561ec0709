"""precondition: c_skip x + c_out F, its gradients and its tangent, against float64."""

import pytest
import torch
from kernel_checks import assert_as_close_as_eager, each_implementation, using  # noqa: F401

from fastcm import kernels
from fastcm.kernels import launch
from fastcm.kernels.precondition import precondition_reference

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# One element, odd sizes (63 and 1023 elements), a whole image.
SHAPES = [(1, 1, 1, 1), (2, 1, 7, 9), (1, 3, 11, 31), (3, 3, 32, 32)]


def arguments(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, F_x = (torch.randn(shape, generator=generator) for _ in range(2))
    return x, F_x.to(dtype), torch.rand(shape[0], generator=generator), torch.rand(shape[0], generator=generator) + 0.5


def column(coefficient):
    return coefficient.double().view(-1, 1, 1, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("x_format", "F_format"), [("nchw", "nchw"), ("nchw", "nhwc"), ("nhwc", "nchw"), ("nhwc", "nhwc")])
def test_value_and_gradients_match_float64(device, shape, dtype, x_format, F_format):
    x, F_x, c_skip, c_out = arguments(shape, dtype)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    leaves = [t.to(device).contiguous(memory_format=FORMATS[f]).requires_grad_() for t, f in ((x, x_format), (F_x, F_format))]
    D_x = kernels.precondition(*leaves, c_skip.to(device), c_out.to(device))
    grad_x, grad_F = torch.autograd.grad(D_x, leaves, upstream.to(device))
    eager = precondition_reference(x, F_x, c_skip, c_out)
    assert D_x.dtype == torch.float32 and D_x.stride() == leaves[0].stride()
    assert_as_close_as_eager(D_x, eager, column(c_skip) * x.double() + column(c_out) * F_x.double(), atol=1e-7)
    assert (grad_x.dtype, grad_F.dtype) == (torch.float32, dtype)
    if launch.INTERPRETED or device.type == "cuda":
        assert grad_F.stride() == leaves[1].stride()
    # The interpreter truncates where a GPU rounds to bf16: two errors of half a step.
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert torch.allclose(grad_x.cpu().double(), column(c_skip) * upstream.double(), rtol=1e-6, atol=0)
    assert torch.allclose(grad_F.cpu().double(), column(c_out) * upstream.double(), rtol=2.1 * unit, atol=1e-7)


@pytest.mark.parametrize("needed", ["x", "F_x"])
@pytest.mark.parametrize(("x_format", "F_format"), [("nchw", "nchw"), ("nchw", "nhwc"), ("nhwc", "nchw")])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 6, 12, 9)], ids=str)  # few planes, whose pixels a program has together; and more
def test_one_gradient_alone(device, needed, x_format, F_format, shape):
    x, F_x, c_skip, c_out = (t.to(device) for t in arguments(shape))
    x, F_x = x.contiguous(memory_format=FORMATS[x_format]), F_x.contiguous(memory_format=FORMATS[F_format])
    leaf, coefficient = (x, c_skip) if needed == "x" else (F_x, c_out)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    D_x = kernels.precondition(x, F_x, c_skip, c_out) if leaf.requires_grad_().is_leaf else None
    assert torch.allclose(D_x.detach(), precondition_reference(x, F_x, c_skip, c_out).detach(), atol=1e-6)
    D_x.backward(upstream)
    assert torch.equal(leaf.grad, coefficient.view(-1, 1, 1, 1) * upstream) and leaf.grad.stride() == leaf.stride()
    assert (F_x if needed == "x" else x).grad is None


def test_a_view_is_copied_and_one_coefficient_is_shared(device):
    x, F_x, _, _ = (t.to(device) for t in arguments((4, 3, 8, 8)))
    half = torch.full((1,), 0.5, device=device)
    found = kernels.precondition(x[:, :, ::2, 1:], F_x[:, :, ::2, 1:], half, half)
    assert torch.equal(found, 0.5 * x[:, :, ::2, 1:] + 0.5 * F_x[:, :, ::2, 1:])


def test_tangent_matches_float64():
    x, F_x, c_skip, c_out = arguments((2, 3, 5, 7))
    tangents = tuple(torch.randn_like(t) for t in (x, F_x, c_skip, c_out))
    with using("triton"):
        _, found = torch.func.jvp(kernels.precondition, (x, F_x, c_skip, c_out), tangents)
    dx, dF, dskip, dout = (t.double() for t in tangents)
    want = column(dskip) * x.double() + column(c_skip) * dx + column(dout) * F_x.double() + column(c_out) * dF
    assert want.abs().max() > 1 and torch.allclose(found.double(), want, atol=1e-5)


def test_coefficients_get_gradients():
    x, F_x, c_skip, c_out = arguments((2, 3, 5, 7))
    with using("triton"):
        kernels.precondition(x, F_x, c_skip.requires_grad_(), c_out.requires_grad_()).sum().backward()
    assert torch.allclose(c_skip.grad, x.sum((1, 2, 3)), atol=1e-4) and torch.allclose(c_out.grad, F_x.sum((1, 2, 3)), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.float64)}, r"precondition\(x\): float64\. Use float32 or bfloat16 or float16"),
        ({"x": torch.zeros(3, 4, 4)}, r"precondition\(x\): \[3, 4, 4\]\. Use \[any, any, any, any\]"),
        ({"F_x": torch.zeros(2, 3, 4, 5)}, r"precondition\(F_x\): \[2, 3, 4, 5\]\. Use \[2, 3, 4, 4\]"),
        ({"c_skip": torch.zeros(3)}, r"precondition\(c_skip\): \[3\]\. Use \[2\] or \[1\]"),
        ({"c_out": torch.zeros(2, dtype=torch.bfloat16)}, r"precondition\(c_out\): bfloat16\. Use float32"),
        ({"F_x": torch.zeros(2, 3, 4, 4, device="meta")}, r"wrong device in precondition\(F_x\): meta"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    good = {"x": torch.zeros(2, 3, 4, 4), "F_x": torch.zeros(2, 3, 4, 4), "c_skip": torch.zeros(2), "c_out": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        kernels.precondition(**(good | changes))


@pytest.mark.slow
def test_registered_ops_keep_their_contract(device):
    x, F_x, c_skip, c_out = (t.to(device) for t in arguments((2, 3, 5, 7), torch.float16))
    kernels.precondition(x, F_x, c_skip, c_out)
    op = torch.ops.fastcm.precondition.default
    torch.library.opcheck(op, (x.requires_grad_(), F_x.requires_grad_(), c_skip, c_out))
    torch.library.opcheck(op, (x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), F_x, c_skip, c_out))


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    inputs = [t.to(device) for t in arguments((2, 3, 5, 7))]
    inputs[1].requires_grad_()
    compiled = torch.compile(kernels.precondition, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(function(*inputs).square().sum(), inputs[1])[0] for function in (compiled, kernels.precondition)]
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0.1


@pytest.mark.slow
def test_exports_by_the_reference_with_any_batch():
    class Denoised(torch.nn.Module):
        def forward(self, x, F_x, c_skip, c_out):
            return kernels.precondition(x, F_x, c_skip, c_out)

    batch = {0: torch.export.Dim("batch")}
    with using("triton"):
        program = torch.export.export(Denoised(), arguments((2, 3, 5, 7)), dynamic_shapes=(batch, batch, batch, batch))
    assert "fastcm" not in str(program.graph)
    inputs = arguments((5, 3, 5, 7))
    assert torch.equal(program.module()(*inputs), precondition_reference(*inputs))


@pytest.mark.hardware("needs gigabytes")
@pytest.mark.gpu
@pytest.mark.slow
def test_batches_beyond_2_to_the_31_elements():
    batch = 2**31 // (3 * 64 * 64) + 2
    if torch.cuda.get_device_properties(0).total_memory < 14 * batch * 3 * 64 * 64:
        pytest.skip("needs 30 GB of memory on the GPU")
    x = torch.zeros(batch, 3, 64, 64, device="cuda")
    x[0], x[-1] = 1.0, 2.0
    with using("triton"):
        found = kernels.precondition(x, x.bfloat16(), torch.full((1,), 0.5, device="cuda"), torch.ones(1, device="cuda"))
    assert (found[0] == 1.5).all() and (found[-1] == 3.0).all() and not found[1:-1].any()


def test_samples_beyond_2_to_the_31_elements_are_refused():
    from fastcm.kernels.precondition import block_and_warps

    with pytest.raises(ValueError, match=r"too many elements per sample: 2147483648\. Use fewer than 2\^31"):
        block_and_warps(2**31, 1024)
