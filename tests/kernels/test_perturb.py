"""perturb: noised inputs of one noise level or a pair, against float64."""

import numpy as np
import pytest
import torch
from kernel_checks import NORMAL_TOLERANCE, each_implementation, exact_normals, using  # noqa: F401

from fastcm import kernels
from fastcm.kernels import launch

B, POSITIONS = 3, torch.tensor([4, 5, 2**33])
SEED = torch.tensor([11])
HI, LO = torch.tensor([80.0, 1.5, 0.002]), torch.tensor([41.0, 0.7, 0.0])
C_HI, C_LO = torch.tensor([0.01, 0.6, 2.0]), torch.tensor([0.02, 1.2, 1.9])
FLIP = torch.tensor([True, False, True])
# An odd size, one of a single full program, one of several programs with a masked tail; rows that divide by 4 and a row that does not.
SHAPES = [(3, 5, 7), (1, 8, 8), (3, 28, 20), (3, 8, 6)]


def images_of(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (B, *shape), dtype=dtype, generator=generator)
    return torch.rand((B, *shape), generator=generator) * 2 - 1


def column(coefficient):
    return coefficient.double().view(-1, 1, 1, 1)


def exact(images, sigma, flip):
    """x in float64 from the published stream."""
    clean = images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
    if flip is not None:
        clean = torch.stack([image.flip(-1) if mirrored else image for image, mirrored in zip(clean, flip, strict=True)])
    return clean + column(sigma) * exact_normals(SEED, POSITIONS, tuple(images.shape[1:]), 0)


def to(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("flip", [None, FLIP], ids=["plain", "flip"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_pair_matches_float64(device, shape, image_dtype, flip, memory_format):
    images = images_of(shape, image_dtype)
    source = images.to(device).contiguous(memory_format=memory_format)
    seed, positions, hi, lo, c_hi, c_lo, mirrored = to(device, SEED, POSITIONS, HI, LO, C_HI, C_LO, flip)
    found = kernels.perturb(source, seed, positions, hi, lo, c_in_hi=c_hi, c_in_lo=c_lo, flip=mirrored)
    for x, scaled, sigma, c_in in ((found.x_hi, found.scaled_hi, HI, C_HI), (found.x_lo, found.scaled_lo, LO, C_LO)):
        want = exact(images, sigma, flip)
        # The noise's own error grows with sigma; everything else rounds a few times.
        allowed = column(sigma) * NORMAL_TOLERANCE[device.type] + 3e-7 * (1 + want.abs())
        assert ((x.cpu() - want).abs() <= allowed).all()
        assert ((scaled.cpu() - want * column(c_in)).abs() <= column(c_in) * 1.3 * allowed).all()
        assert x.is_contiguous() and scaled.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaled_copies_are_cast_once(device, dtype):
    seed, positions, hi, c_hi = to(device, SEED, POSITIONS, HI, C_HI)
    found = kernels.perturb(images_of((1, 8, 8), torch.uint8).to(device), seed, positions, hi, c_in_hi=c_hi, dtype=dtype)
    assert found.scaled_hi.dtype == dtype and found.x_hi.dtype == torch.float32
    scaled = c_hi.view(-1, 1, 1, 1) * found.x_hi
    if launch.INTERPRETED and dtype == torch.bfloat16:
        # The interpreter truncates where a GPU rounds (triton 3.7).
        assert ((found.scaled_hi.float() - scaled).abs() <= 2**-7 * scaled.abs()).all()
    else:
        assert torch.equal(found.scaled_hi, scaled.to(dtype))


def test_only_what_was_asked_for(device):
    images, seed, positions, hi, lo, c_hi = to(device, images_of((1, 8, 8), torch.uint8), SEED, POSITIONS, HI, LO, C_HI)
    found = kernels.perturb(images, seed, positions, hi)
    assert found.x_lo is None and found.scaled_hi is None and found.scaled_lo is None
    both = kernels.perturb(images, seed, positions, hi, lo, c_in_hi=c_hi)
    assert torch.equal(both.x_hi, found.x_hi) and both.x_lo is not None and both.scaled_lo is None


def test_batch_and_broadcast_do_not_matter(device):
    images, seed, positions, hi, flip = to(device, images_of((3, 6, 10), torch.uint8), SEED, POSITIONS, HI, FLIP)
    whole = kernels.perturb(images, seed, positions, hi, flip=flip).x_hi
    for b in range(B):
        one = kernels.perturb(images[b : b + 1], seed, positions[b : b + 1], hi[b : b + 1], flip=flip[b : b + 1])
        assert torch.equal(one.x_hi[0], whole[b])
    same = kernels.perturb(images, seed.expand(B), positions[:1], hi[:1]).x_hi
    assert torch.equal(same, kernels.perturb(images, seed, positions[:1].repeat(B), hi[:1].repeat(B)).x_hi)


def test_images_at_any_address(device):
    """Bytes are read by words, so a view that begins between two words is not read in place."""
    shape, (seed, positions, hi) = (1, 8, 8), to(device, SEED, POSITIONS, HI)
    storage = torch.randint(0, 256, (1 + B * 64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    view = storage[1:].view(B, *shape)
    assert view.data_ptr() % 4 and torch.equal(
        kernels.perturb(view, seed, positions, hi).x_hi, kernels.perturb(view.clone(), seed, positions, hi).x_hi
    )


@pytest.mark.skipif(not launch.HAS_TRITON, reason="constants of a kernel")
def test_bytes_become_floats_in_one_rounding():
    """2^23 + v, of which only one fused operation with these constants makes v 2 / 255 - 1: exact but for its last rounding."""
    from fractions import Fraction

    from fastcm.kernels.image_lanes import BYTE_OFFSET, BYTE_SCALE

    scale, offset = (Fraction(np.float32(constant.value).item()) for constant in (BYTE_SCALE, BYTE_OFFSET))
    assert scale == Fraction(BYTE_SCALE.value) == Fraction(np.float32(2 / 255).item()) and offset == Fraction(BYTE_OFFSET.value)
    for v in range(256):
        assert (2**23 + v) * scale + offset == v * scale - 1


def test_gradient_and_tangent_reach_float_images():
    images = images_of((1, 4, 4), torch.float32).requires_grad_()
    with using("triton"):
        x, tangent = torch.func.jvp(
            lambda v: kernels.perturb(v, SEED, POSITIONS, HI, flip=FLIP).x_hi, (images.detach(),), (torch.ones_like(images),)
        )
        assert torch.equal(tangent, torch.ones_like(x))
        kernels.perturb(images, SEED, POSITIONS, HI, c_in_hi=C_HI, flip=FLIP).scaled_hi.sum().backward()
    assert torch.equal(images.grad, C_HI.view(-1, 1, 1, 1).expand_as(images))


def test_tangent_of_sigma_is_the_noise():
    images = images_of((3, 5, 7), torch.uint8)
    with using("triton"):
        tangent = torch.func.jvp(lambda s: kernels.perturb(images, SEED, POSITIONS, s).x_hi, (HI,), (torch.ones(B),))[1]
    assert (tangent - exact_normals(SEED, POSITIONS, (3, 5, 7), 0)).abs().max() < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("lo", [None, LO], ids=["one", "pair"])
def test_registered_op_keeps_its_contract(device, lo):
    images, seed, positions, hi, lo, c_hi, flip = to(device, images_of((3, 5, 7), torch.uint8), SEED, POSITIONS, HI, lo, C_HI, FLIP)
    torch.library.opcheck(torch.ops.fastcm.perturb.default, (images, seed, positions, hi, lo, c_hi, None, flip, torch.float16))


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    images, seed, positions, hi, lo, c_hi = to(device, images_of((1, 8, 8), torch.uint8), SEED, POSITIONS, HI, LO, C_HI)

    def noised(images, hi, lo, c_hi):
        found = kernels.perturb(images, seed, positions, hi, lo, c_in_hi=c_hi)
        return found.x_hi + found.x_lo, found.scaled_hi

    compiled = torch.compile(noised, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, hi, lo, c_hi), noised(images, hi, lo, c_hi))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(B, 1, 4, 4, dtype=torch.int16)}, r"perturb\(images\): int16\. Use uint8 or float32"),
        ({"images": torch.zeros(B, 4, 4)}, r"perturb\(images\): \[3, 4, 4\]\. Use \[any, any, any, any\]"),
        ({"images": torch.zeros(B, 3, 4, 8)[..., ::2]}, r"unsupported layout in perturb\(images\)"),
        ({"sigma_hi": HI.double()}, r"perturb\(sigma_hi\): float64\. Use float32"),
        ({"sigma_lo": HI[:2]}, r"perturb\(sigma_lo\): \[2\]\. Use \[3\] or \[1\]"),
        ({"flip": FLIP.long()}, r"perturb\(flip\): int64\. Use bool"),
        ({"c_in_lo": C_LO}, r"perturb\(sigma_lo\): None"),
        ({"position": POSITIONS.int()}, r"perturb\(position\): int32"),
        ({"seed": SEED.to("meta")}, r"wrong device in perturb\(seed\): meta\. Move it to cpu"),
        ({"dtype": torch.float64}, r"perturb\(dtype\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_the_bad_argument(changes, message):
    arguments = {"images": torch.zeros(B, 1, 4, 4), "seed": SEED, "position": POSITIONS, "sigma_hi": HI} | changes
    with pytest.raises(ValueError, match=message):
        kernels.perturb(**arguments)
