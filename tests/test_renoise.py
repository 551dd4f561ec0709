"""renoise and to_uint8: the sampler's step and the final pixels, against float64."""

import pytest
import torch

from fastcm import kernels

B, SEED, ZERO = 3, torch.tensor([1, -1, 2**63 - 1]), torch.zeros(1, dtype=torch.int64)
SIGMA = torch.tensor([0.8, 20.0, 0.002])


def denoised(shape, dtype=torch.float32):
    return (torch.randn((B, *shape), generator=torch.Generator().manual_seed(3)) * 1.2).to(dtype)


def expected(D_x, step, *, clip=True, known=None, mask=None):
    x = D_x.double().clamp(-1, 1) if clip else D_x.double()
    if known is not None:
        x = torch.where((mask != 0).expand_as(x), x, known.double().expand_as(x))
    z = kernels.normal(SEED, ZERO, D_x.shape[1:], stream=16 + step).double()
    return x + (SIGMA.double() ** 2 - 0.002**2).clamp(min=0).sqrt().view(-1, 1, 1, 1) * z


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [True, False])
def test_renoise_matches_float64(shape, dtype, clip):
    D_x = denoised(shape, dtype)
    found = kernels.renoise(D_x, SEED, ZERO, SIGMA, step=2, sigma_min=0.002, clip=clip)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected(D_x, 2, clip=clip), rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("mask_shape", [(1, 1, 6, 5), (B, 3, 6, 5)], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.float32])
def test_known_pixels_replace_the_masked(mask_shape, mask_dtype):
    D_x, known = denoised((3, 6, 5)), torch.linspace(-1, 1, 90).view(1, 3, 6, 5)
    mask = (torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) < 0.5).to(mask_dtype)
    found = kernels.renoise(D_x, SEED, ZERO, SIGMA, step=1, sigma_min=0.002, known=known, mask=mask)
    torch.testing.assert_close(found.double(), expected(D_x, 1, known=known, mask=mask), rtol=3e-7, atol=3e-7)


def test_renoise_ignores_memory_format_and_batch():
    D_x = denoised((3, 6, 5))
    whole = kernels.renoise(D_x, SEED, ZERO, SIGMA, step=1, sigma_min=0.002)
    last = kernels.renoise(D_x.contiguous(memory_format=torch.channels_last), SEED, ZERO, SIGMA, step=1, sigma_min=0.002)
    assert torch.equal(whole, last) and last.is_contiguous()
    for b in range(B):
        rows = slice(b, b + 1)
        assert torch.equal(kernels.renoise(D_x[rows], SEED[rows], ZERO, SIGMA[rows], step=1, sigma_min=0.002)[0], whole[b])


def test_renoise_has_a_gradient_and_a_tangent():
    D_x = denoised((1, 4, 4)).requires_grad_()
    inside = (D_x.detach().abs() <= 1).float()
    kernels.renoise(D_x, SEED, ZERO, SIGMA, step=1, sigma_min=0.002).sum().backward()
    assert torch.equal(D_x.grad, inside)
    step = torch.func.jvp(
        lambda v: kernels.renoise(v, SEED, ZERO, SIGMA, step=1, sigma_min=0.002), (D_x.detach(),), (torch.ones_like(D_x),)
    )
    assert torch.equal(step[1], inside)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)], ids=str)
def test_to_uint8_rounds_and_clamps(layout, shape):
    D_x = denoised(shape)
    found = kernels.to_uint8(D_x, layout=layout)
    want = ((D_x.double() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    want = want.permute(0, 2, 3, 1) if layout == "NHWC" else want
    assert found.dtype == torch.uint8 and found.is_contiguous() and torch.equal(found, want)


def test_to_uint8_inverts_the_bytes():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(kernels.to_uint8(pixels.float() / 127.5 - 1, layout="NCHW"), pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"D_x": torch.zeros(B, 3, 4, 4).double()}, r"renoise\(D_x\): float64"),
        ({"sigma": torch.tensor(1.0)}, r"renoise\(sigma\): \[\]\. Use \[3\] or \[1\]"),
        ({"step": 0}, r"renoise\(step\): 0"),
        ({"known": torch.zeros(1, 3, 4, 4)}, r"renoise\(mask\): None"),
        ({"known": torch.zeros(1, 3, 4, 4), "mask": torch.zeros(1, 2, 4, 4)}, r"renoise\(mask\): \[1, 2, 4, 4\]"),
        ({"known": torch.zeros(1, 1, 4, 4), "mask": torch.zeros(1, 1, 4, 4)}, r"renoise\(known\): \[1, 1, 4, 4\]"),
        ({"known": torch.zeros(1, 3, 4, 5), "mask": torch.zeros(1, 1, 4, 4)}, r"renoise\(known\): \[1, 3, 4, 5\]"),
    ],
)
def test_renoise_names_the_bad_argument(changes, message):
    arguments = {"D_x": torch.zeros(B, 3, 4, 4), "seed": SEED, "position": ZERO, "sigma": SIGMA, "step": 1, "sigma_min": 0.002} | changes
    with pytest.raises(ValueError, match=message):
        kernels.renoise(**arguments)


def test_to_uint8_names_the_bad_argument():
    with pytest.raises(ValueError, match=r'to_uint8\(layout\): \'HWC\'\. Use "NHWC" or "NCHW"'):
        kernels.to_uint8(torch.zeros(1, 1, 2, 2), layout="HWC")
