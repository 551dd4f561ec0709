"""The noise stream: words against Random123, draws against float64, statistics, and independence of the batch."""

import numpy as np
import pytest
import torch
from kernel_checks import NORMAL_TOLERANCE, each_implementation, exact_normals, using, words_by_numpy  # noqa: F401

from fastcm import kernels
from fastcm.kernels import launch

SEEDS = torch.tensor([0, -1, 2**63 - 1, 5])
POSITIONS = torch.tensor([0, 7, 2**40 + 1, -3])
ZERO = torch.zeros(1, dtype=torch.int64)
# The interpreter takes about 0.2 s for a program.
SAMPLES = 2 if launch.INTERPRETED else 8


def signed(value):
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_words_match_random123(key, counter, words):
    """The vectors `philox4x32 10` of Random123's kat_vectors file, for the reference and for the tests' own definition."""
    seed, position = signed(key[1] << 32 | key[0]), signed(counter[2] << 32 | counter[1])
    found = kernels.philox_words(torch.tensor([seed]), torch.tensor([position]), torch.tensor([counter[0]]), stream=counter[3])
    assert tuple(found[0, 0].tolist()) == words and found.is_contiguous()
    assert tuple(words_by_numpy(seed, position, np.array([counter[0]]), counter[3])[0].tolist()) == words


@pytest.mark.parametrize(
    ("shape", "stream"),
    [((1, 8, 8), 0), ((1, 8, 8), 1), ((3, 5, 7), 16), ((1, 1, 1), 17), ((63,), 2), ((1023,), 2**16 + 3), ((3, 28, 28), 2**32 - 1)],
    ids=str,
)
def test_normal_matches_float64(device, shape, stream):
    found = kernels.normal(SEEDS.to(device), POSITIONS.to(device), shape, stream=stream).cpu()
    assert found.shape == (4, *shape) and found.dtype == torch.float32 and found.is_contiguous()
    assert (found - exact_normals(SEEDS, POSITIONS, shape, stream)).abs().max() < NORMAL_TOLERANCE[device.type]


@pytest.mark.parametrize("elements", [64, 61, 2, 4100])
def test_uniforms_are_the_words_to_the_bit(device, elements):
    words = np.stack([words_by_numpy(seed, 7, np.arange(-(-elements // 4)), 2**16) for seed in SEEDS.tolist()])
    u = torch.from_numpy((words >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
    found = kernels.uniform_field(SEEDS.to(device), torch.tensor([7], device=device), (elements,), stream=2**16).cpu()
    assert torch.equal(found.double(), u.permute(0, 2, 1).reshape(4, -1)[:, :elements])


def test_scalar_uniform_is_word_zero(device):
    seeds = SEEDS.repeat(10)[:37]  # the kernel's programs have 32 samples each
    u = ((kernels.philox_words(seeds, ZERO, torch.arange(1), stream=3)[:, 0, 0] >> 9).double() + 0.5) * 2.0**-23
    found = kernels.uniform(seeds.to(device), ZERO.to(device), stream=3).cpu()
    assert found.shape == (37,) and torch.equal(found.double(), u)


@pytest.mark.parametrize(("batch", "shape"), [(19, (1, 8, 8)), (1, (1, 8, 8)), (5, (3, 7, 5)), (33, (3,))], ids=str)
def test_small_samples_share_a_program(device, batch, shape):
    """Up to the last one of the batch, which ends a program early."""
    position = torch.arange(batch) - 3
    found = kernels.normal(SEEDS[1:2].to(device), position.to(device), shape, stream=16).cpu()
    assert (found - exact_normals(SEEDS[1:2], position, shape, 16)).abs().max() < NORMAL_TOLERANCE[device.type]


def test_samples_do_not_depend_on_their_batch(device):
    """Bit for bit, across the blocks of a launch and of the reference's loop."""
    zero, positions = ZERO.to(device), torch.arange(SAMPLES, device=device)
    for shape in ((3, 64, 64), (3, 5, 7)):
        whole = kernels.normal(zero, positions, shape, stream=0)
        for i in (0, SAMPLES - 1):
            assert torch.equal(whole[i], kernels.normal(zero, positions[i : i + 1], shape, stream=0)[0])


def test_element_of_a_large_sample():
    large = kernels.normal(ZERO, ZERO, (3, 256, 256), stream=0)
    _, _, w2, w3 = words_by_numpy(0, 0, np.array([40000]), 0)[0].tolist()
    z = (-2 * np.log(((w2 >> 9) + 0.5) * 2.0**-23)) ** 0.5 * np.sin(2 * np.pi * (w3 >> 8) * 2.0**-24)
    assert abs(large.view(4, -1)[3, 40000] - z) < 2e-6


def assert_distributed(values, distribution):
    """Kolmogorov's test of one in a thousand for float64 values and their distribution function."""
    n, F = len(values), distribution(values.sort().values)
    below = torch.arange(n + 1, dtype=torch.float64) / n
    assert n**0.5 * torch.maximum(below[1:] - F, F - below[:-1]).max() < 1.95


def test_normals_are_normal_and_distinct(device):
    z = kernels.normal(torch.arange(SAMPLES, device=device), ZERO.to(device), (3, 64, 64), stream=16).double().cpu()
    assert_distributed(z.flatten(), torch.special.ndtr)
    # Draws out of about 2^46: values repeat only where fp32 itself is coarse.
    assert z.flatten().float().unique().numel() > 0.985 * z.numel()
    flat = z.view(SAMPLES, -1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 5 / 12288**0.5
    assert abs((flat[:, 1:] * flat[:, :-1]).mean()) < 5 / z.numel() ** 0.5


def test_uniforms_are_uniform_and_distinct(device):
    u = kernels.uniform_field(torch.arange(SAMPLES, device=device), ZERO.to(device), (4096,), stream=2**16).double().cpu().flatten()
    assert_distributed(u, lambda value: value)
    assert 0 < u.min() and u.max() < 1 and u.unique().numel() > 0.99 * u.numel()


def test_streams_positions_and_seeds_differ():
    keys = [(seed, position, stream) for seed in (0, 1, 2**32) for position in (0, 1, 2**32) for stream in (0, 16, 17)]
    draws = {tuple(kernels.normal(torch.tensor([s]), torch.tensor([p]), (16,), stream=t)[0].tolist()) for s, p, t in keys}
    assert len(draws) == len(keys)


@pytest.mark.slow
def test_registered_ops_keep_their_contract(device):
    for op in (torch.ops.fastcm.normal.default, torch.ops.fastcm.uniform_field.default):
        torch.library.opcheck(op, (SEEDS.to(device), ZERO.to(device), (3, 5, 7), 16))


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    def draw(seed, position):
        return kernels.normal(seed, position, (3, 4, 4), stream=16) + kernels.uniform_field(seed, position, (3, 4, 4), stream=17)

    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    for batch in (4, 3):
        seed, position = SEEDS[:batch].to(device), POSITIONS[:batch].to(device)
        torch.testing.assert_close(compiled(seed, position), draw(seed, position))


@pytest.mark.slow
def test_exports_by_the_reference_with_any_batch():
    class Draw(torch.nn.Module):
        def forward(self, seed):
            return kernels.normal(seed, torch.zeros_like(seed), (1, 5, 5), stream=16)

    with using("triton"):
        program = torch.export.export(Draw(), (SEEDS,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "fastcm" not in str(program.graph)
    seed = torch.arange(7)
    assert torch.equal(program.module()(seed), kernels.normal(seed, ZERO, (1, 5, 5), stream=16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1), ZERO, (4,), 0), r"normal\(seed\): float32\. Use int64"),
        ((ZERO, torch.zeros(1, dtype=torch.int32), (4,), 0), r"normal\(position\): int32\. Use int64"),
        ((torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), (4,), 0), r"normal\(position\): \[2\]\. Use \[3\]"),
        ((ZERO, ZERO.to("meta"), (4,), 0), r"wrong device in normal\(position\): meta\. Move it to cpu"),
        ((5, ZERO, (4,), 0), r"normal\(seed\): int"),
        ((ZERO, ZERO, (4,), -1), r"normal\(stream\): -1"),
    ],
)
def test_normal_names_the_bad_argument(arguments, message):
    seed, position, shape, stream = arguments
    with pytest.raises(ValueError, match=message):
        kernels.normal(seed, position, shape, stream=stream)


@pytest.mark.hardware("compares the GPU's fast mathematics, in inline assembly")
@pytest.mark.gpu
def test_every_value_of_u_on_a_gpu():
    """All 2^23 radii, at four angles, within 1e-5 of float64."""
    from fastcm.kernels.launch import tl, triton
    from fastcm.kernels.quarter_layout import box_muller

    @triton.jit
    def radii_kernel(p_out, angle, box_muller: tl.constexpr, BLOCK: tl.constexpr):
        o_k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        z0, z1 = box_muller((o_k << 9).to(tl.uint32), (o_k * 0 + angle).to(tl.uint32), 1)
        tl.store(p_out + o_k, z0)
        tl.store(p_out + 8388608 + o_k, z1)

    radius = torch.sqrt(-2 * torch.log((torch.arange(2**23, dtype=torch.float64, device="cuda") + 0.5) * 2.0**-23))
    for angle in (0, 1 << 29, 3 << 29, 0x7FFFFF00):
        out = torch.empty(2, 2**23, device="cuda")
        radii_kernel[(2**23 // 1024,)](out, angle, box_muller, BLOCK=1024)
        theta = 2 * np.pi * (angle >> 8) * 2.0**-24
        assert (out[0] - radius * np.cos(theta)).abs().max() < 1e-5
        assert (out[1] - radius * np.sin(theta)).abs().max() < 1e-5


@pytest.mark.hardware("needs gigabytes")
@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31_elements():
    batch, shape, zero = 2**31 // 12288 + 3, (3, 64, 64), ZERO.cuda()
    positions = torch.arange(batch, device="cuda")
    with using("triton"):
        noise = kernels.normal(zero, positions, shape, stream=0)
        assert torch.equal(noise[-1], kernels.normal(zero, positions[-1:], shape, stream=0)[0])
        assert torch.equal(noise[5], kernels.normal(zero, positions[5:6], shape, stream=0)[0])


@pytest.mark.gpu
def test_a_cuda_graph_draws_fresh_noise_at_each_replay():
    seed, position = torch.tensor([3], device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    with using("triton"):
        kernels.normal(seed, position, (3, 8, 8), stream=0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            noise = kernels.normal(seed, position, (3, 8, 8), stream=0)
    for first in (0, 4, 2**35):
        position.copy_(torch.arange(first, first + 4))
        graph.replay()
        assert (noise.cpu() - exact_normals(seed.cpu(), position.cpu(), (3, 8, 8), 0)).abs().max() < 1e-5


def test_auto_takes_the_reference_on_the_cpu():
    with using("auto"):
        assert launch.chosen("philox", ZERO) == "reference"
