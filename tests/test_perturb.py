"""perturb: noised inputs of one noise level or a pair, against float64."""

import pytest
import torch

from fastcm import kernels

B, POSITIONS = 3, torch.tensor([4, 5, 2**33])
SEED = torch.tensor([11])
HI, LO = torch.tensor([80.0, 1.5, 0.002]), torch.tensor([41.0, 0.7, 0.0])
C_HI, C_LO = torch.tensor([0.01, 0.6, 2.0]), torch.tensor([0.02, 1.2, 1.9])
FLIP = torch.tensor([True, False, True])


def images_of(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (B, *shape), dtype=dtype, generator=generator)
    return torch.rand((B, *shape), generator=generator) * 2 - 1


def expected(images, sigma, flip):
    """x in float64 from the published stream."""
    clean = images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
    if flip is not None:
        clean = torch.stack([image.flip(-1) if mirrored else image for image, mirrored in zip(clean, flip, strict=True)])
    z = kernels.normal(SEED, POSITIONS, images.shape[1:], stream=0).double()
    return clean + sigma.double().view(-1, 1, 1, 1) * z


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("flip", [None, FLIP], ids=["plain", "flip"])
def test_pair_matches_float64(shape, image_dtype, flip):
    images = images_of(shape, image_dtype)
    found = kernels.perturb(images, SEED, POSITIONS, HI, LO, c_in_hi=C_HI, c_in_lo=C_LO, flip=flip)
    for x, scaled, sigma, c_in in ((found.x_hi, found.scaled_hi, HI, C_HI), (found.x_lo, found.scaled_lo, LO, C_LO)):
        want = expected(images, sigma, flip)
        torch.testing.assert_close(x.double(), want, rtol=3e-7, atol=3e-7)
        torch.testing.assert_close(scaled.double(), want * c_in.double().view(-1, 1, 1, 1), rtol=4e-7, atol=4e-7)
        assert x.is_contiguous() and scaled.is_contiguous()


def test_only_what_was_asked_for():
    images = images_of((1, 8, 8), torch.uint8)
    found = kernels.perturb(images, SEED, POSITIONS, HI)
    assert found.x_lo is None and found.scaled_hi is None and found.scaled_lo is None
    both = kernels.perturb(images, SEED, POSITIONS, HI, LO, c_in_hi=C_HI, dtype=torch.bfloat16)
    assert torch.equal(both.x_hi, found.x_hi) and both.scaled_lo is None
    assert both.scaled_hi.dtype == torch.bfloat16
    assert torch.equal(both.scaled_hi, (C_HI.view(-1, 1, 1, 1) * both.x_hi).bfloat16())


def test_memory_format_and_batch_do_not_matter():
    images = images_of((3, 6, 10), torch.uint8)
    whole = kernels.perturb(images, SEED, POSITIONS, HI, flip=FLIP).x_hi
    last = kernels.perturb(images.contiguous(memory_format=torch.channels_last), SEED, POSITIONS, HI, flip=FLIP).x_hi
    assert torch.equal(whole, last) and last.is_contiguous()
    for b in range(B):
        one = kernels.perturb(images[b : b + 1], SEED, POSITIONS[b : b + 1], HI[b : b + 1], flip=FLIP[b : b + 1])
        assert torch.equal(one.x_hi[0], whole[b])


def test_gradient_and_tangent_reach_float_images():
    images = images_of((1, 4, 4), torch.float32).requires_grad_()
    x, tangent = torch.func.jvp(
        lambda v: kernels.perturb(v, SEED, POSITIONS, HI, flip=FLIP).x_hi, (images.detach(),), (torch.ones_like(images),)
    )
    assert torch.equal(tangent, torch.ones_like(x))
    kernels.perturb(images, SEED, POSITIONS, HI, c_in_hi=C_HI, flip=FLIP).scaled_hi.sum().backward()
    assert torch.equal(images.grad, C_HI.view(-1, 1, 1, 1).expand_as(images))


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
