"""The noise stream: words against Random123, normals against float64, statistics, and independence of the batch."""

import numpy as np
import pytest
import torch
from scipy import stats

from fastcm import kernels

SEEDS = torch.tensor([0, -1, 2**63 - 1, 5])
ZERO = torch.zeros(1, dtype=torch.int64)


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
    """The vectors `philox4x32 10` of Random123's kat_vectors file."""
    seed = torch.tensor([signed(key[1] << 32 | key[0])])
    position = torch.tensor([signed(counter[2] << 32 | counter[1])])
    found = kernels.philox_words(seed, position, torch.tensor([counter[0]]), stream=counter[3])
    assert tuple(found[0, 0].tolist()) == words


def words_by_numpy(seed, position, counters, stream):
    """Philox4x32-10 as the paper writes it, in uint64 arithmetic of Python and numpy."""
    c0, c1 = counters.astype(np.uint64), np.full(len(counters), position & 0xFFFFFFFF, np.uint64)
    c2, c3 = np.full(len(counters), (position >> 32) & 0xFFFFFFFF, np.uint64), np.full(len(counters), stream, np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for r in range(10):
        k0 = np.uint64(((seed & 0xFFFFFFFF) + r * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((((seed >> 32) & 0xFFFFFFFF) + r * 0xBB67AE85) & 0xFFFFFFFF)
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
    return np.stack((c0, c1, c2, c3), -1)


def normals_in_float64(words, elements):
    """Box-Muller of the contract, [n, 4] words -> [elements] float64 in the quarter layout."""
    words = words.astype(np.float64) if words.dtype != np.uint64 else words
    u = ((words[:, 0::2] >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
    theta = 2 * np.pi * (words[:, 1::2] >> np.uint64(8)).astype(np.float64) * 2.0**-24
    radius = np.sqrt(-2 * np.log(u))
    z = np.stack((radius * np.cos(theta), radius * np.sin(theta)), -1)  # [Q, pair, cos/sin]
    return z.reshape(len(words), 4).T.reshape(-1)[:elements]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 1, 1), (1023,)], ids=str)
@pytest.mark.parametrize("stream", [0, 16, 2**16 + 3])
def test_normal_matches_float64(shape, stream):
    elements = int(np.prod(shape))
    position = torch.tensor([0, 7, 2**40 + 1, -3])
    found = kernels.normal(SEEDS, position, shape, stream=stream)
    assert found.shape == (4, *shape) and found.dtype == torch.float32 and found.is_contiguous()
    for b in range(4):
        words = words_by_numpy(int(SEEDS[b]), int(position[b]), np.arange(-(-elements // 4)), stream)
        assert np.abs(found[b].numpy().ravel() - normals_in_float64(words, elements)).max() < 3e-6


def test_uniforms_are_the_words():
    words = kernels.philox_words(SEEDS, ZERO, torch.arange(16), stream=3)
    u = ((words >> 9).double() + 0.5) * 2.0**-23
    assert torch.equal(kernels.uniform_field(SEEDS, ZERO, (61,), stream=3).double(), u.permute(0, 2, 1).reshape(4, 64)[:, :61])
    assert torch.equal(kernels.uniform(SEEDS, ZERO, stream=3).double(), u[:, 0, 0])


def test_samples_do_not_depend_on_their_batch():
    """Bit for bit, across the blocks that the CPU works in."""
    shape, positions = (3, 32, 32), torch.arange(24)
    whole = kernels.normal(ZERO, positions, shape, stream=0)
    assert torch.equal(
        whole[:, 0, 0, 0], torch.stack([kernels.normal(ZERO, positions[i : i + 1], shape, stream=0)[0, 0, 0, 0] for i in range(24)])
    )
    for i in (0, 7, 23):
        assert torch.equal(whole[i], kernels.normal(ZERO, positions[i : i + 1], shape, stream=0)[0])
    large = kernels.normal(ZERO, ZERO, (3, 256, 256), stream=0)
    words = kernels.philox_words(ZERO, ZERO, torch.tensor([40000]), stream=0)
    u, theta = ((words[0, 0, 2] >> 9).double() + 0.5) * 2.0**-23, (words[0, 0, 3] >> 8).double() * 2 * np.pi * 2.0**-24
    assert abs(large.view(4, -1)[3, 40000].double() - (-2 * u.log()).sqrt() * theta.sin()) < 3e-6


def test_normals_are_normal_and_distinct():
    z = kernels.normal(torch.arange(8), ZERO, (3, 64, 64), stream=16).double()
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    # 98,304 draws from about 2^46 pairs: the fp32 values repeat only where fp32 itself is coarse.
    assert z.flatten().float().unique().numel() > 0.985 * z.numel()
    flat = z.view(8, -1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 5 / 12288**0.5
    assert abs((flat[:, 1:] * flat[:, :-1]).mean()) < 0.015


def test_streams_positions_and_seeds_differ():
    draws = [
        kernels.normal(torch.tensor([s]), torch.tensor([p]), (16,), stream=stream)
        for s in (0, 1, 2**32)
        for p in (0, 1, 2**32)
        for stream in (0, 16, 17)
    ]
    assert len({tuple(draw[0].tolist()) for draw in draws}) == 27


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1), ZERO, (4,), 0), r"normal\(seed\): float32\. Use int64"),
        ((ZERO, torch.zeros(1, dtype=torch.int32), (4,), 0), r"normal\(position\): int32\. Use int64"),
        ((torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), (4,), 0), r"normal\(position\): \[2\]\. Use \[3\]"),
        ((5, ZERO, (4,), 0), r"normal\(seed\): int"),
        ((ZERO, ZERO, (4,), -1), r"normal\(stream\): -1"),
    ],
)
def test_normal_names_the_bad_argument(arguments, message):
    seed, position, shape, stream = arguments
    with pytest.raises(ValueError, match=message):
        kernels.normal(seed, position, shape, stream=stream)
