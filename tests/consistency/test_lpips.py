"""LPIPS against a float64 restatement in numpy, its gradient, where its weights are found, and the errors where they are not."""

import hashlib
import importlib.util
import re
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastcm.consistency.lpips import LPIPS
from fastcm.errors import InputError
from fastcm.weights.lpips_weights import load_lpips

PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
SMALL = (4, 5, 6, 5, 7, 6, 5, 6, 8, 7, 6, 5, 9)
TAPS = (1, 3, 6, 9, 12)  # the last convolution of each stage


def random_trunk(widths, *, prefix="features."):
    """He-scaled, so that features neither vanish nor explode; biases that switch some features off."""
    trunk, width_in = {}, 3
    for place, width in zip(PLACES, widths, strict=True):
        trunk[f"{prefix}{place}.weight"] = torch.randn(width, width_in, 3, 3) * (2 / (9 * width_in)) ** 0.5
        trunk[f"{prefix}{place}.bias"] = torch.randn(width) * 0.1
        width_in = width
    return trunk


def random_linear(widths):
    return [torch.rand(1, widths[tap], 1, 1) for tap in TAPS]


@pytest.fixture
def small():
    return random_trunk(SMALL), random_linear(SMALL)


def pictures(*shape):
    return torch.rand(shape) * 2 - 1


# The restatement: numpy, float64, one image, loops over taps of the kernel.


def convolved(x, weight, bias):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), *x.shape[1:])) + bias[:, None, None]
    for i in range(3):
        for j in range(3):
            out += np.tensordot(weight[:, :, i, j], padded[:, i : i + x.shape[1], j : j + x.shape[2]], 1)
    return out


def pooled(x, pooling):
    height, width = x.shape[1] // 2, x.shape[2] // 2
    blocks = x[:, : 2 * height, : 2 * width].reshape(len(x), height, 2, width, 2)
    return blocks.mean((2, 4)) if pooling == "average" else blocks.max((2, 4))


def resized(x, side):
    """Bilinear, half-pixel centres, edges repeated."""

    def along(x, axis):
        n = x.shape[axis]
        place = np.clip((np.arange(side) + 0.5) * n / side - 0.5, 0, n - 1)
        low = np.floor(place).astype(int)
        share = (place - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        return np.take(x, low, axis) * (1 - share) + np.take(x, np.minimum(low + 1, n - 1), axis) * share

    return along(along(x, 1), 2)


def restated_taps(x, trunk, *, pooling, side):
    x = np.repeat(x, 3 // len(x), 0)
    if side is not None:
        x = resized(x, side)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x, taps = ((x + 1) / 2 - mean[:, None, None]) / deviation[:, None, None], []
    for number, place in enumerate(PLACES):
        if number - 1 in TAPS:
            x = pooled(x, pooling)
        weight, bias = (trunk[f"features.{place}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        x = np.maximum(convolved(x, weight, bias), 0)
        if number in TAPS:
            taps.append(x / (np.sqrt((x**2).sum(0)) + 1e-10))
    return taps


def restated(x, y, trunk, linear, *, pooling, side):
    distances = []
    for one, other in zip(x.double().numpy(), y.double().numpy(), strict=True):
        pairs = zip(*(restated_taps(image, trunk, pooling=pooling, side=side) for image in (one, other)), linear, strict=True)
        distances.append(sum(((a - b) ** 2 * w.double().numpy().reshape(-1, 1, 1)).sum(0).mean() for a, b, w in pairs))
    return torch.tensor(distances)


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize(
    ("shape", "side"),
    [((2, 3, 32, 32), 224), ((1, 1, 28, 28), 224), ((1, 3, 40, 255), 224), ((1, 3, 20, 256), None)],
    ids=["32", "grey-28", "width-255", "width-256"],
)
def test_value_is_the_definition(small, pooling, shape, side):
    """Bilinear to 224x224 below a width of 256, whatever the height, and untouched at 256."""
    x, y = pictures(*shape), pictures(*shape)
    expected = restated(x, y, *small, pooling=pooling, side=side)
    assert expected.min() > 0.1
    distance = LPIPS(*small, pooling=pooling)
    torch.testing.assert_close(distance.double()(x.double(), y.double()), expected, rtol=1e-5, atol=0)  # the constants have 3 digits
    torch.testing.assert_close(LPIPS(*small, pooling=pooling)(x, y), expected.float(), rtol=1e-4, atol=0)


def test_poolings_and_resizing_differ_and_the_published_ones_are_the_default(small):
    x, y = pictures(2, 3, 32, 32), pictures(2, 3, 32, 32)
    default = LPIPS(*small)(x, y)
    assert torch.equal(default, LPIPS(*small, pooling="average", resize=True)(x, y))
    for other in (LPIPS(*small, pooling="max"), LPIPS(*small, resize=False)):
        assert ((other(x, y) - default).abs() > 0.01 * default).all()
    plain = LPIPS(*small, resize=False)(x, y)
    torch.testing.assert_close(plain, restated(x, y, *small, pooling="average", side=None).float(), rtol=1e-4, atol=0)


def test_zero_for_equal_images_symmetric_and_by_sample(small):
    x, y = pictures(3, 3, 16, 16), pictures(3, 3, 16, 16)
    distance = LPIPS(*small, resize=False)
    assert torch.equal(distance(x, x), torch.zeros(3))
    forth = distance(x, y)
    assert forth.shape == (3,) and forth.dtype == torch.float32 and forth.min() > 0
    torch.testing.assert_close(forth, distance(y, x), rtol=1e-6, atol=0)
    for i in range(3):
        torch.testing.assert_close(forth[i : i + 1], distance(x[i : i + 1], y[i : i + 1]), rtol=1e-5, atol=0)
    nearer = distance(x, x + 0.1 * (y - x))
    assert (nearer < 0.5 * forth).all() and (nearer > 0).all()


def test_grey_is_three_equal_channels(small):
    x, y = pictures(2, 1, 16, 16), pictures(2, 1, 16, 16)
    distance = LPIPS(*small, resize=False)
    torch.testing.assert_close(distance(x, y), distance(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_gradients_of_both_images(small, pooling):
    distance = LPIPS(*small, pooling=pooling, resize=False).double()
    x, y = (pictures(1, 3, 16, 16).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(distance, (x, y), eps=1e-7, atol=1e-6, rtol=1e-4, fast_mode=True)
    gradient = torch.autograd.grad(distance(x, y).sum(), x)[0]
    direction = torch.randn_like(x)
    step = 1e-6
    with torch.no_grad():
        difference = (distance(x + step * direction, y) - distance(x - step * direction, y)) / (2 * step)
    assert difference.abs() > 1e-4
    torch.testing.assert_close((gradient * direction).sum().view(1), difference, rtol=1e-4, atol=0)


def test_gradient_through_the_resize(small):
    distance = LPIPS(*small).double()
    x, y = pictures(1, 1, 12, 12).double().requires_grad_(), pictures(1, 1, 12, 12).double()
    gradient, direction, step = torch.autograd.grad(distance(x, y).sum(), x)[0], torch.randn(1, 1, 12, 12, dtype=torch.float64), 1e-6
    with torch.no_grad():
        difference = (distance(x + step * direction, y) - distance(x - step * direction, y)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum().view(1), difference, rtol=1e-4, atol=0)


def test_gradients_are_finite_where_no_feature_fires(small):
    """A dead pixel has a norm of zero, where the root's derivative is infinite."""
    trunk, linear = small
    trunk["features.28.bias"] = torch.full((SMALL[-1],), -100.0)
    x, y = pictures(1, 3, 16, 16).requires_grad_(), pictures(1, 3, 16, 16)
    distance = LPIPS(trunk, linear, resize=False)
    assert (distance.taps(x)[-1] == 0).all()
    value = distance(x, y)
    value.sum().backward()
    assert value > 0 and x.grad.isfinite().all() and x.grad.abs().max() > 0
    tangent = torch.func.jvp(lambda x: distance(x, y), (x.detach(),), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, x.grad.sum().view(1), rtol=1e-3, atol=1e-7)
    same = x.detach().requires_grad_()
    LPIPS(trunk, linear, resize=False)(same, x.detach()).sum().backward()
    assert torch.equal(same.grad, torch.zeros_like(same))


def test_weights_are_frozen_and_only_images_get_a_gradient(small):
    distance = LPIPS(*small, resize=False)
    assert not distance.training and len(list(distance.parameters())) == 26
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert not distance(pictures(1, 3, 16, 16), pictures(1, 3, 16, 16)).requires_grad
    before = [weight.clone() for weight in small[1]]
    distance.linear_0.mul_(2)
    assert all(map(torch.equal, before, small[1]))  # its own copies


def test_layouts_of_the_trunk(small):
    trunk, linear = small
    x, y = pictures(1, 3, 16, 16), pictures(1, 3, 16, 16)
    expected = LPIPS(trunk, linear, resize=False)(x, y)
    whole = {**trunk, "classifier.0.weight": torch.zeros(3, 3), "classifier.0.bias": torch.zeros(3)}
    bare = {name.removeprefix("features."): tensor for name, tensor in trunk.items()}
    half = {name: tensor.half() for name, tensor in trunk.items()}
    for layout in (whole, bare):
        assert torch.equal(LPIPS(layout, linear, resize=False)(x, y), expected)
    assert torch.equal(LPIPS(trunk, [w.flatten() for w in linear], resize=False)(x, y), expected)
    torch.testing.assert_close(LPIPS(half, linear, resize=False)(x, y), expected, rtol=0.02, atol=0)


def test_arguments_that_cannot_be_meant(small):
    with pytest.raises(ValueError, match="pooling: mean. Use one of average, max"):
        LPIPS(*small, pooling="mean")
    with pytest.raises(ValueError, match="linear: 4 tensors. Give one for each of the 5 taps"):
        LPIPS(small[0], small[1][:4])
    distance = LPIPS(*small)
    with pytest.raises(ValueError, match="images: 4 channels"):
        distance(pictures(1, 4, 16, 16), pictures(1, 4, 16, 16))
    with pytest.raises(ValueError, match=re.escape("(1, 3, 16, 16) and (2, 3, 16, 16)")):
        distance(pictures(1, 3, 16, 16), pictures(2, 3, 16, 16))


# Files.


@pytest.fixture(scope="module")
def vgg16():
    """Weights of the real size; half precision, so that the files stay small."""
    torch.manual_seed(0)
    trunk = {name: tensor.half() for name, tensor in random_trunk(VGG16).items()}
    linear = {f"lin{tap}.model.1.weight": weight for tap, weight in enumerate(random_linear(VGG16))}
    return trunk, linear


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub of this test's own, and no lpips package."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def named_by_sha256(path):
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f"vgg16-{digits}.pth"))


def test_a_trunk_as_torchvision_saves_it_and_the_taps_beside_it(vgg16, hub, tmp_path):
    """The old format, the digits of the sha256 in the name, vgg.pth in the same folder; the numbers are those of the tensors."""
    trunk, linear = vgg16
    torch.save({**trunk, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "trunk.pth", _use_new_zipfile_serialization=False)
    path = named_by_sha256(tmp_path / "trunk.pth")
    torch.save(linear, tmp_path / "vgg.pth", _use_new_zipfile_serialization=False)
    x, y = pictures(1, 3, 16, 16), pictures(1, 3, 16, 16)
    expected = LPIPS(trunk, list(linear.values()), pooling="max", resize=False)(x, y)
    assert expected.isfinite() and expected > 0
    loaded = load_lpips(path, pooling="max", resize=False)
    assert torch.equal(loaded(x, y), expected) and loaded.features["28"].weight.dtype == torch.float32
    assert (load_lpips(path).pooling, load_lpips(str(path)).resize) == ("average", True)

    with open(path, "r+b") as file:  # one byte within the weights
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match=f"damaged weights in .*{path.name}: its sha256 begins with .*Download the file again"):
        load_lpips(path)


def test_one_safetensors_file_with_both(vgg16, hub, tmp_path):
    trunk, linear = vgg16
    bare = {name.removeprefix("features."): tensor for name, tensor in trunk.items()}
    save_file({**bare, **linear}, tmp_path / "lpips.safetensors")
    x, y = pictures(1, 1, 16, 16), pictures(1, 1, 16, 16)
    expected = LPIPS(trunk, list(linear.values()), resize=False)(x, y)
    assert torch.equal(load_lpips(tmp_path / "lpips.safetensors", resize=False)(x, y), expected)


def test_taps_out_of_the_lpips_package_without_importing_it(vgg16, tmp_path, monkeypatch):
    trunk, linear = vgg16
    weights = tmp_path / "site" / "lpips" / "weights" / "v0.1"
    weights.mkdir(parents=True)
    (tmp_path / "site" / "lpips" / "__init__.py").write_text("raise ImportError('lpips was imported')")
    torch.save(linear, weights / "vgg.pth")
    save_file(trunk, tmp_path / "trunk.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    loaded = load_lpips(tmp_path / "trunk.safetensors")
    assert torch.equal(loaded.linear_4, linear["lin4.model.1.weight"].flatten())
    assert not {"lpips", "torchvision"} & set(sys.modules)


def test_absent_weights_are_named_at_once(hub, tmp_path):
    started = time.perf_counter()
    with pytest.raises(InputError) as error:
        load_lpips()
    with pytest.raises(InputError) as other:
        load_lpips(tmp_path / "my-vgg.pth")
    assert time.perf_counter() - started < 1  # and no network: the tests' sockets refuse
    for text in ("--lpips-weights", "vgg16-397923af.pth", "397923af", "objective.distance=pseudo_huber"):
        assert text in str(error.value) and text in str(other.value)
    assert str(hub) in str(error.value) and "my-vgg.pth is not a file" in str(other.value)
    assert "\n" not in str(error.value) + str(other.value)
    assert list(hub.iterdir()) == []


def test_the_hub_s_file_is_taken_and_absent_taps_are_named(vgg16, hub, tmp_path, monkeypatch):
    trunk, linear = vgg16
    torch.save(trunk, hub / "vgg16-397923af.pth")
    with pytest.raises(InputError, match="damaged weights in .*vgg16-397923af.pth: its sha256 begins with"):
        load_lpips()
    monkeypatch.setattr("fastcm.weights.lpips_weights.TRUNK_NAME", "vgg16.pth")  # a name without digits: not checked
    (hub / "vgg16-397923af.pth").rename(hub / "vgg16.pth")
    with pytest.raises(InputError) as error:
        load_lpips()
    for text in ("--lpips-weights", str(hub / "vgg.pth"), "pip install lpips", "objective.distance=pseudo_huber"):
        assert text in str(error.value)
    torch.save(linear, hub / "vgg.pth")
    assert torch.equal(load_lpips().linear_0, linear["lin0.model.1.weight"].flatten())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda trunk: trunk.pop("features.28.bias"), "no features.28.bias in it"),
        (lambda trunk: trunk.update({"features.5.weight": torch.zeros(64, 64, 3, 3)}), r"5.weight is \[64, 64, 3, 3\], VGG16's is \[128"),
        (lambda trunk: trunk.update({"lin0.model.1.weight": torch.zeros(1, 32, 1, 1)}), r"lin0.model.1.weight is \[1, 32, 1, 1\]"),
        (lambda trunk: trunk.update({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}), r"lin1.model.1.weight is absent"),
    ],
    ids=["missing", "shape", "taps", "taps-missing"],
)
def test_files_of_another_network(vgg16, hub, tmp_path, change, reason):
    trunk = dict(vgg16[0])
    change(trunk)
    save_file(trunk, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"in .*other.safetensors: .*{reason}"):
        load_lpips(tmp_path / "other.safetensors")


class Hostile:
    def __reduce__(self):
        return print, ("code ran",)


def test_files_that_are_no_weights(hub, tmp_path, capsys):
    torch.save(Hostile(), tmp_path / "hostile.pth")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>")
    (tmp_path / "short.pth").write_bytes(b"PK\x03\x04 and no more")
    for name, reason in (("hostile", "was not run"), ("page", "a web page"), ("short", "damaged or cut short")):
        with pytest.raises(InputError, match=f"not a VGG16 trunk .* in .*{name}.pth: .*{reason}"):
            load_lpips(tmp_path / f"{name}.pth")
    assert "code ran" not in capsys.readouterr().out


def test_the_lpips_package_gives_the_same_numbers():
    try:
        import lpips
    except Exception as error:  # torchvision raises RuntimeError beside a torch of another build
        pytest.skip(f"lpips does not import here: {str(error).splitlines()[0]}")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = theirs.state_dict()
    trunk = {f"features.{name.split('.', 2)[2]}": tensor for name, tensor in state.items() if name.startswith("net.slice")}
    linear = [state[f"lin{tap}.model.1.weight"] for tap in range(5)]
    x, y = pictures(2, 3, 64, 48), pictures(2, 3, 64, 48)
    ours = LPIPS(trunk, linear, pooling="max", resize=False)(x, y)
    torch.testing.assert_close(ours, theirs(x, y).flatten(), rtol=1e-5, atol=0)
    large, other = pictures(1, 3, 256, 256), pictures(1, 3, 256, 256)
    torch.testing.assert_close(LPIPS(trunk, linear, pooling="max")(large, other), theirs(large, other).flatten(), rtol=1e-5, atol=0)
