"""renoise and to_uint8: the sampler's step and the final pixels, against float64."""

import pytest
import torch
from kernel_checks import NORMAL_TOLERANCE, each_implementation, exact_normals, using  # noqa: F401

from fastcm import kernels

B, SEED, ZERO = 3, torch.tensor([1, -1, 2**63 - 1]), torch.zeros(1, dtype=torch.int64)
SIGMA = torch.tensor([0.8, 20.0, 0.002])
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPES = [(3, 5, 7), (1, 8, 8), (3, 28, 20)]


def denoised(shape, dtype=torch.float32):
    return (torch.randn((B, *shape), generator=torch.Generator().manual_seed(3)) * 1.2).to(dtype)


def assert_renoised(found, D_x, step, *, clip=True, known=None, mask=None):
    x = D_x.double().clamp(-1, 1) if clip else D_x.double()
    if known is not None:
        x = torch.where((mask != 0).expand_as(x), x, known.double().expand_as(x))
    scale = (SIGMA.double() ** 2 - 0.002**2).clamp(min=0).sqrt().view(-1, 1, 1, 1)
    want = x + scale * exact_normals(SEED, ZERO, tuple(D_x.shape[1:]), 16 + step)
    allowed = scale * NORMAL_TOLERANCE[found.device.type] + 3e-7 * (1 + want.abs())
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert ((found.cpu() - want).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("memory_format", "clip"), [("nchw", True), ("nhwc", False)])
def test_renoise_matches_float64(device, shape, dtype, clip, memory_format):
    D_x = denoised(shape, dtype)
    source = D_x.to(device).contiguous(memory_format=FORMATS[memory_format])
    found = kernels.renoise(source, SEED.to(device), ZERO.to(device), SIGMA.to(device), step=2, sigma_min=0.002, clip=clip)
    assert_renoised(found, D_x, 2, clip=clip)


@pytest.mark.parametrize("mask_shape", [(1, 1, 6, 5), (B, 1, 6, 5), (B, 3, 6, 5)], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("known_batch", [1, B])
def test_known_pixels_replace_the_masked(device, mask_shape, mask_dtype, known_batch):
    D_x, known = denoised((3, 6, 5)), torch.linspace(-1, 1, 90 * known_batch).view(known_batch, 3, 6, 5)
    mask = (torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) < 0.5).to(mask_dtype)
    found = kernels.renoise(
        D_x.to(device),
        SEED.to(device),
        ZERO.to(device),
        SIGMA.to(device),
        step=1,
        sigma_min=0.002,
        known=known.to(device),
        mask=mask.to(device),
    )
    assert_renoised(found, D_x, 1, known=known, mask=mask)


def test_renoise_ignores_batch(device):
    D_x, seed, zero, sigma = (t.to(device) for t in (denoised((3, 6, 5)), SEED, ZERO, SIGMA))
    whole = kernels.renoise(D_x, seed, zero, sigma, step=1, sigma_min=0.002)
    for b in range(B):
        rows = slice(b, b + 1)
        assert torch.equal(kernels.renoise(D_x[rows], seed[rows], zero, sigma[rows], step=1, sigma_min=0.002)[0], whole[b])


def test_nan_stays_visible(device):
    D_x = denoised((3, 6, 5)).to(device)
    D_x[1, 2, 3, 4] = float("nan")
    found = kernels.renoise(D_x, SEED.to(device), ZERO.to(device), SIGMA.to(device), step=1, sigma_min=0.002)
    assert found.isnan().nonzero().tolist() == [[1, 2, 3, 4]]


def test_renoise_has_a_gradient_and_a_tangent():
    D_x = denoised((1, 4, 4)).requires_grad_()
    inside = (D_x.detach().abs() <= 1).float()
    with using("triton"):
        kernels.renoise(D_x, SEED, ZERO, SIGMA, step=1, sigma_min=0.002).sum().backward()
        tangent = torch.func.jvp(
            lambda v: kernels.renoise(v, SEED, ZERO, SIGMA, step=1, sigma_min=0.002), (D_x.detach(),), (torch.ones_like(D_x),)
        )[1]
    assert torch.equal(D_x.grad, inside) and torch.equal(tangent, inside)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_to_uint8_rounds_and_clamps(device, layout, shape, memory_format):
    D_x = denoised(shape)
    found = kernels.to_uint8(D_x.to(device).contiguous(memory_format=FORMATS[memory_format]), layout=layout).cpu()
    want = ((D_x + 1) * 127.5).double().clamp(0, 255).round().to(torch.uint8)
    want = want.permute(0, 2, 3, 1) if layout == "NHWC" else want
    assert found.dtype == torch.uint8 and found.is_contiguous() and torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_to_uint8_takes_half_precision(device, dtype):
    D_x = denoised((3, 5, 7), dtype)
    assert torch.equal(kernels.to_uint8(D_x.to(device)).cpu(), kernels.to_uint8(D_x.float().to(device)).cpu())


def test_to_uint8_inverts_the_bytes_and_rounds_half_to_even(device):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(kernels.to_uint8((pixels.float() / 127.5 - 1).to(device), layout="NCHW").cpu(), pixels)
    # (x + 1) 127.5 is exactly 0.5 n there only for n = 127.5 k: the middle grey and both ends.
    ends = torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0]).view(1, 1, 1, 5).to(device)
    assert kernels.to_uint8(ends).flatten().tolist() == [0, 128, 255, 0, 255]


@pytest.mark.slow
def test_registered_ops_keep_their_contract(device):
    D_x, seed, zero, sigma = (t.to(device) for t in (denoised((3, 6, 5)), SEED, ZERO, SIGMA))
    known, mask = torch.zeros(1, 3, 6, 5, device=device), torch.ones(1, 1, 6, 5, dtype=torch.bool, device=device)
    torch.library.opcheck(torch.ops.fastcm.renoise.default, (D_x, seed, zero, sigma, 1, 0.002, known, mask, True))
    torch.library.opcheck(torch.ops.fastcm.to_uint8.default, (D_x, "NHWC"))


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    D_x, seed, zero, sigma = (t.to(device) for t in (denoised((3, 6, 5)), SEED, ZERO, SIGMA))

    def step(D_x, seed, sigma):
        return kernels.to_uint8(kernels.renoise(D_x, seed, zero, sigma, step=1, sigma_min=0.002))

    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(D_x, seed, sigma), step(D_x, seed, sigma))


@pytest.mark.slow
def test_exports_by_the_reference_with_any_batch():
    class Step(torch.nn.Module):
        def forward(self, D_x, seed):
            return kernels.to_uint8(kernels.renoise(D_x, seed, ZERO, torch.ones(1), step=1, sigma_min=0.002))

    batch = torch.export.Dim("batch")
    with using("triton"):
        program = torch.export.export(Step(), (denoised((3, 5, 7)), SEED), dynamic_shapes=({0: batch}, {0: batch}))
    assert "fastcm" not in str(program.graph)
    D_x, seed = denoised((3, 5, 7))[:2], SEED[:2]
    assert torch.equal(program.module()(D_x, seed), Step()(D_x, seed))


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
