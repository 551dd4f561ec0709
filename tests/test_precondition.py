"""precondition against float64: values, gradients, tangents."""

import torch

from fastcm.kernels.precondition import precondition


def arguments(batch=3, shape=(3, 5, 7), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, F_x = (torch.randn(batch, *shape, generator=generator) for _ in range(2))
    return x, F_x.to(dtype), torch.rand(batch, generator=generator), torch.rand(batch, generator=generator) + 0.5


def test_value_and_gradients_match_float64():
    x, F_x, c_skip, c_out = arguments()
    x.requires_grad_()
    F_x.requires_grad_()
    D = precondition(x, F_x, c_skip, c_out)
    upstream = torch.randn_like(D)
    grad_x, grad_F = torch.autograd.grad(D, (x, F_x), upstream)
    c_skip, c_out = (c.double().view(-1, 1, 1, 1) for c in (c_skip, c_out))
    assert D.dtype == torch.float32
    assert torch.allclose(D.double(), c_skip * x.double() + c_out * F_x.double(), atol=1e-6)
    assert torch.allclose(grad_x.double(), c_skip * upstream.double(), atol=1e-6)
    assert torch.allclose(grad_F.double(), c_out * upstream.double(), atol=1e-6)
