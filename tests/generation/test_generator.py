"""The generator: seeds in, images out, whatever the batch, the thread or the form of the request."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from analytic import gaussian_consistency, gaussian_teacher
from torch import nn

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError, RunError
from fastcm.generation import frozen
from fastcm.generation import generator as generator_module
from fastcm.generation.frozen import can_fold, freeze
from fastcm.generation.generator import Generator
from fastcm.networks import blocks

SMALL = {"resolution": 8, "in_channels": 1, "out_channels": 1, "channels": 16, "channel_mult": (1, 2), "blocks": 1}
SMALL |= {"attention_resolutions": (4,), "head_channels": 16}


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random: the zero-initialised last layers of a fresh network would hide any error behind zeros."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=1.5 / max(parameter[0].numel(), 9) ** 0.5)
    return network.eval()


def small_denoiser(classes: int | None = 10, seed: int = 0, **options) -> Denoiser:
    return Denoiser(randomised(networks.build("adm", {**SMALL, "num_classes": classes, **options}), seed), Preconditioning())


def small_generator(classes: int | None = 10, **options) -> Generator:
    return Generator(small_denoiser(classes, **options), {}, device="cpu")


def test_images_have_the_stated_form():
    generator = small_generator()
    images = generator(range(5))
    assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 1) and images.std() > 10
    floats = generator(range(5), output="float")
    assert floats.dtype == np.float32 and floats.shape == (5, 8, 8, 1) and abs(floats).max() <= 1
    assert np.array_equal(np.round((floats + 1) * 127.5).astype(np.uint8), images)
    pictures = generator(range(5), output="pil")
    assert [picture.size for picture in pictures] == [(8, 8)] * 5 and np.array_equal(np.array(pictures[3]), images[3, ..., 0])
    assert generator([]).shape == (0, 8, 8, 1) and generator(7).shape == (1, 8, 8, 1)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_seed_gives_its_image_in_any_batch(steps):
    generator = small_generator()
    seeds = [5, -1, 0, 2**63 - 1, 12, -(2**63), 7]
    together = generator(seeds, labels=3, steps=steps, output="float")
    alone = np.concatenate([generator([seed], labels=3, steps=steps, output="float") for seed in seeds])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    generator.batch_size = 2
    np.testing.assert_allclose(generator(seeds, labels=3, steps=steps, output="float"), together, atol=1e-5)
    assert min(np.abs(together[i] - together[j]).max() for i in range(7) for j in range(i)) > 0.05


@pytest.mark.parametrize("options", [{}, {"scale_shift_norm": False}, {"resblock_updown": False}])
@pytest.mark.parametrize("classes", [10, None])
def test_folding_changes_nothing(classes, options):
    denoiser = small_denoiser(classes, **options)
    level = freeze(denoiser, 80.0, classes=classes)
    x = 80 * torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6) if classes else None
    D_x = denoiser(x, torch.full((6,), 80.0), labels)
    torch.testing.assert_close(level(x, labels), D_x, rtol=1e-5, atol=1e-5)
    other = denoiser(x, torch.full((6,), 2.0), labels)
    assert (other - D_x).abs().max() > 1e-2  # the noise embedding matters, and it is folded for the right level
    assert level.network.input_blocks[0][0].weight is denoiser.network.input_blocks[0][0].weight  # no second copy of the weights


@pytest.mark.parametrize("limits", [{"EMBEDDED_ELEMENTS": 30}, {"TABLE_BYTES": 1000}])
def test_many_classes_take_neither_their_square_nor_a_table_without_bound(limits, monkeypatch):
    """Classes are embedded some at a time, and those whose table would be too large not ahead of a call."""
    seen, one_hot = [], blocks.one_hot
    monkeypatch.setattr(blocks, "one_hot", lambda labels, *more: seen.append(len(labels)) or one_hot(labels, *more))
    for name, limit in limits.items():
        monkeypatch.setattr(frozen, name, limit)
    denoiser = small_denoiser(10)
    level = freeze(denoiser, 80.0, classes=10)
    assert seen == ([3, 3, 3, 1] if "EMBEDDED_ELEMENTS" in limits else [])
    assert (level.table is None) is ("TABLE_BYTES" in limits)
    x, labels = 80 * torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(10)
    torch.testing.assert_close(level(x, labels), denoiser(x, torch.full((10,), 80.0), labels), rtol=1e-5, atol=1e-5)


def test_more_classes_than_are_supported():
    with pytest.raises(InputError, match=r"illegal value in network.num_classes: 100001. At most 100,000 are supported"):
        small_denoiser(100_001)


def test_a_network_that_cannot_be_folded_runs_unfolded():
    denoiser = gaussian_consistency(data_std=0.3)
    assert not can_fold(denoiser.network)
    generator = Generator(denoiser, {"resolution": 4, "channels": 3, "classes": None}, device="cpu")
    x = 80 * torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(generator.level(80.0)(x, None), denoiser(x, torch.full((2,), 80.0)), rtol=1e-5, atol=1e-5)


def test_the_denoiser_of_a_generator_is_unfolded_and_unclamped():
    denoiser = small_denoiser()
    generator = Generator(denoiser, {}, device="cpu", precision="bf16")
    x, sigma, labels = 5 * torch.randn(2, 1, 8, 8), torch.tensor([5.0, 0.1]), torch.tensor([1, 2])
    D_x = generator.denoiser(x, sigma, labels)
    assert D_x.dtype == torch.float32 and torch.equal(D_x, small_denoiser()(x, sigma, labels))
    half = generator([0, 1], output="float")
    full = small_generator()([0, 1], output="float")
    assert 0 < np.abs(half - full).max() < 0.1


def test_labels_rule():
    denoiser = gaussian_consistency(class_shift=0.05, data_std=0.001)
    generator = Generator(denoiser, {"resolution": 4, "channels": 1, "classes": ["ant", "bee", "cat"]}, device="cpu")
    shift = lambda seeds, labels=None: np.round(generator(seeds, labels, output="float").mean(axis=(1, 2, 3)) / 0.05).tolist()  # noqa: E731
    assert shift([4, 5, -1]) == [1, 2, 2]  # seed mod classes, Python's mod
    assert shift(range(4), 2) == [2] * 4 and shift(range(4), "bee") == [1] * 4
    assert shift(range(5), [0, 2]) == [0, 2, 0, 2, 0] and shift([9, 8], ["cat", 0]) == [2, 0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"seeds": [0], "labels": 10}, "class out of range in labels: 10"),
        ({"seeds": [0], "labels": -1}, "class out of range in labels: -1"),
        ({"seeds": [0], "labels": "cow"}, "unknown class in labels: cow"),
        ({"seeds": [0], "labels": []}, "no class in labels"),
        ({"seeds": [2**64]}, "seed out of range"),
        ({"seeds": [0.5]}, "not an integer in seeds"),
        ({"seeds": [0], "steps": 0}, "illegal value in steps: 0"),
        ({"seeds": [0], "steps": 2, "sigmas": (80.0, 1.0)}, "both steps and sigmas"),
        ({"seeds": [0], "sigmas": (1.0, 80.0)}, "out of order"),
        ({"seeds": [0], "sigmas": (81.0,)}, "noise level out of range in sigmas: 81"),
        ({"seeds": [0], "sigmas": (80.0, float("nan"))}, "out of range in sigmas: nan"),
        ({"seeds": [0], "sigmas": ()}, "no noise level"),
        ({"seeds": [0], "output": "unit8"}, "Did you mean 'uint8'"),
        ({"seeds": [0], "sampler": "henu"}, "unknown value in --sampler: henu"),
    ],
)
def test_bad_requests_are_named(call, words):
    with pytest.raises(InputError, match=words):
        small_generator()(**call)


def test_labels_for_an_unconditional_model_are_refused():
    with pytest.raises(InputError, match="model without classes"):
        small_generator(None)([0], labels=1)


def test_steps_take_the_models_own_levels():
    generator = Generator(small_denoiser(), {"sampling": {"2": [80.0, 0.8]}}, device="cpu")
    assert generator.sigmas(2) == (80.0, 0.8) and generator.sigmas() == (80.0,) and len(generator.sigmas(3)) == 3
    assert np.array_equal(generator([1], steps=2), generator([1], sigmas=(80.0, 0.8)))
    assert not np.array_equal(generator([1], steps=2), generator([1], sigmas=(80.0, 0.4)))


@pytest.mark.parametrize(
    ("timesteps", "grid", "sigma"),
    [
        ((0, 22, 39), 40, 1.382),
        ((0, 106, 200), 201, 1.913),
        ((0, 17, 39), 40, 4.366),
        ((0, 18, 39), 40, 3.520),
        ((0, 67, 150), 151, 3.991),
        ((0, 62, 150), 151, 5.249),
        ((0, 11, 17), 18, 0.585),
    ],
)
def test_timesteps_stand_for_the_published_levels(timesteps, grid, sigma):
    """The two-step levels that the papers' code visits on ImageNet 64, bedrooms, cats and CIFAR-10."""
    generator = small_generator()
    assert generator.timesteps(*timesteps, grid=grid) == pytest.approx((80.0, sigma), abs=5e-4)
    assert generator.timesteps(*timesteps[:2], grid=grid) == generator.timesteps(*timesteps, grid=grid)


def test_churn_from_the_generator():
    teacher = Generator(gaussian_teacher("edm", data_std=0.3), {"resolution": 4, "channels": 1, "classes": None}, device="cpu")
    calm, same, churned, ranged = (teacher(range(4), sampler="heun", steps=20, churn=c, output="float") for c in (None, 0, 20, (20, 90)))
    assert np.array_equal(calm, same) and np.array_equal(calm, ranged) and np.abs(churned - calm).max() > 0.05
    keys = {teacher._run(20, None, "heun", churn)[0] for churn in (None, 0, 20, 30, (20, 90))}  # of CUDA graphs
    assert len(keys) == 4
    again = teacher([2], sampler="heun", steps=20, churn=20.0, output="float")
    np.testing.assert_allclose(again[0], churned[2], atol=1e-5)


@pytest.mark.parametrize("churn", [-1, float("nan"), float("inf"), (), (1, 2, 3, 4, 5), ("a",)])
def test_bad_churn_is_named(churn):
    teacher = Generator(gaussian_teacher("edm"), {"resolution": 4, "channels": 1, "classes": None}, device="cpu")
    with pytest.raises(InputError, match="illegal value in churn"):
        teacher([0], sampler="heun", churn=churn)


def test_teacher_samplers_from_the_generator():
    info = {"resolution": 4, "channels": 1, "classes": None}
    teacher = Generator(gaussian_teacher("edm", data_std=0.3), info, device="cpu")
    exact = Generator(gaussian_consistency("edm", data_std=0.3), info, device="cpu")
    images = teacher(range(4), sampler="heun", steps=60, output="float")
    np.testing.assert_allclose(images, exact(range(4), sampler="consistency", output="float"), atol=0.02)
    assert np.abs(images).max() > 0.3
    with pytest.raises(InputError, match="sigmas with a solver"):
        teacher([0], sampler="heun", sigmas=(80.0,))


def test_non_finite_pixels_are_an_error():
    denoiser = small_denoiser()
    denoiser.network.out[2].bias.data.fill_(float("nan"))
    with pytest.raises(RunError, match="non-finite pixels in the image of seed 4"):
        Generator(denoiser, {}, device="cpu")([4, 5])


def test_out_of_memory_halves_the_batch(monkeypatch):
    generator = small_generator()
    expected = generator(range(6), output="float")
    draw = generator_module.multistep

    def limited(levels, noise, **arguments):
        if len(noise.seeds) > 2:
            raise torch.OutOfMemoryError("no room")
        return draw(levels, noise, **arguments)

    monkeypatch.setattr(generator_module, "multistep", limited)
    generator.batch_size = 4
    np.testing.assert_allclose(generator(range(6), output="float"), expected, atol=1e-5)
    assert generator.batch_size == 2


@pytest.mark.slow
def test_many_threads_share_a_generator():
    """Samples of one and two steps, edits and interpolations at once, on a generator that has yet to fold its levels."""
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8)
    jobs = {
        "one": lambda g, seed: g([seed, seed + 1], output="float"),
        "two": lambda g, seed: g([seed], steps=2, output="float"),
        "inpaint": lambda g, seed: g.inpaint(picture, mask, seeds=[seed], sigmas=(80.0, 2.0), output="float"),
        "between": lambda g, seed: g.interpolate([seed, seed + 1], frames=3, output="float"),
    }
    alone, shared, results = small_generator(), small_generator(), {}
    together = threading.Barrier(32)

    def work(name, seed):
        together.wait(60)
        results[name, seed] = jobs[name](shared, seed)

    threads = [threading.Thread(target=work, args=(name, seed)) for name in jobs for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 32 and len(shared._frozen) == 2
    for (name, seed), images in results.items():
        np.testing.assert_allclose(images, jobs[name](alone, seed), atol=1e-5, err_msg=f"{name} {seed}")


@pytest.mark.slow
def test_async_code_awaits_a_thread():
    """The event loop goes on turning while images are drawn."""
    generator = small_generator()

    async def serve():
        turns = 0
        jobs = asyncio.gather(*(asyncio.to_thread(generator, [seed], steps=8) for seed in range(6)))
        while not jobs.done():
            turns += 1
            await asyncio.sleep(0)
        return turns, await jobs

    turns, images = asyncio.run(serve())
    assert turns > 10 and all(np.array_equal(image, generator([seed], steps=8)) for seed, image in enumerate(images))


def test_the_batch_is_a_power_of_two_that_fits():
    assert small_generator().batch_size == 1024
    for resolution, size in ((24, 32), (32, 16), (512, 1)):
        info = {"resolution": resolution, "channels": 3, "classes": None}
        assert Generator(gaussian_consistency(), info, device="cpu").batch_size == size


def test_what_was_used_last_is_kept(monkeypatch):
    monkeypatch.setattr(generator_module, "LEVELS_KEPT", 3)
    generator = small_generator()
    for sigma in (80.0, 1.0, 2.0, 80.0, 3.0, 80.0, 4.0):
        generator([0], sigmas=(80.0, sigma) if sigma < 80 else None)
    assert list(generator._frozen) == [3.0, 80.0, 4.0]
    table = generator.level(80.0).table_bytes
    assert table == 4 * generator.level(80.0).table.rows.numel() > 0
    monkeypatch.setattr(generator_module, "LEVEL_BYTES_KEPT", 2 * table)
    generator.level(5.0)
    assert list(generator._frozen) == [80.0, 5.0]
    monkeypatch.setattr(generator_module, "LEVEL_BYTES_KEPT", 1)
    assert generator.level(6.0) is generator.level(6.0) and list(generator._frozen) == [6.0]


def test_convolutions_of_grey_images_are_channels_last():
    network = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 4, 3)).to(memory_format=torch.channels_last)
    weights = [parameter.clone() for parameter in network.parameters()]
    x = torch.randn(2, 1, 8, 8)
    expected = network(x)
    generator_module.order_grey_weights(network)
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
    assert network[0].weight.stride() == (9, 1, 3, 1)
    torch.testing.assert_close(network(x), expected)
    assert network[0](x).is_contiguous(memory_format=torch.channels_last) and not network[0](x).is_contiguous()


def test_precision_is_checked():
    with pytest.raises(InputError, match="Did you mean 'fp16'"):
        Generator(small_denoiser(), {}, device="cpu", precision="f16")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "levels"), [("fp32", 1), ("bf16", 4)])
def test_cuda_agrees_with_cpu(precision, levels):
    cpu, cuda = small_generator(), Generator(small_denoiser(), {}, device="cuda", precision=precision)
    for seeds in (range(1), range(5), range(33)):
        for steps in (1, 2):
            difference = np.abs(cpu(seeds, steps=steps).astype(int) - cuda(seeds, steps=steps).astype(int))
            assert difference.max() <= levels
