"""The counter map: known answers, what each counter word holds, and the statistics of the noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.kernels.conftest import Backend
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ddpm_kernels import Stream, bernoulli, cpu_noise, gaussian_noise, random_integers
from ddpm_kernels.cpu_noise import random_normals_in_blocks, write_normals
from ddpm_kernels.philox import (
    MAX_SAMPLE_ID,
    normals_of_words,
    philox4x32,
    random_normals,
    random_words,
)

MASK = 2**32 - 1
NOISE = Stream.TRAINING_NOISE


def words_at(seed: int, sample_id: int, block: int, step: int, stream: Stream) -> list[int]:
    """The four words of one counter, assembled here with Python's integers."""
    counter = [block, step, sample_id % 2**32, int(stream) + 256 * (sample_id // 2**32)]
    key = [seed % 2**32, (seed % 2**64) // 2**32]
    words: list[int] = philox4x32(torch.tensor(counter), torch.tensor(key)).tolist()
    return words


def sample_words(seed: int, sample_id: int, count: int, step: int, stream: Stream) -> list[int]:
    blocks = (words_at(seed, sample_id, b, step, stream) for b in range(-(-count // 4)))
    return [word for block in blocks for word in block][:count]


def normal_pair(u_word: int, angle_word: int) -> tuple[float, float]:
    """Box–Muller in float64, with the one documented rounding of u to float32."""
    u = np.float32(np.float32(u_word) * np.float32(2.0**-32) + np.float32(2.0**-33))
    radius = math.sqrt(-2 * math.log(float(u)))
    angle = 2 * math.pi * (angle_word / 2**32)
    return radius * math.cos(angle), radius * math.sin(angle)


def flat_noise(
    ids: Tensor, count: int, seed: int = 7, step: int = 0, stream: Stream = Stream.TRAINING_NOISE
) -> np.ndarray:
    """`count` normals for each id, in counter order: float64 `[B, count]`."""
    noise = gaussian_noise(seed, ids, (1, 1, count), step, stream)
    return noise.reshape(len(ids), count).double().numpy()


# --- Known answers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(
    counter: list[int], key: list[int], expected: list[int]
) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == expected


# --- The counter map


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), -(2**40) + 3])
def test_key_is_the_seed(seed: int) -> None:
    words = random_words(seed, torch.tensor([3]), 8, 2, Stream.DROPOUT)
    assert words[0].tolist() == sample_words(seed, 3, 8, 2, Stream.DROPOUT)
    as_tensor = random_words(torch.tensor(seed), torch.tensor([3]), 8, 2, Stream.DROPOUT)
    assert torch.equal(words, as_tensor)


def test_counter_words(backend: Backend) -> None:
    ids = [0, 1, 2**31, MASK, 2**32, 2**40 + 17, MAX_SAMPLE_ID]
    for i, stream in enumerate(Stream):
        step = (0, 999, 2**31, MASK)[i % 4]
        words = random_words(11, torch.tensor(ids, device=backend.device), 9, step, stream)
        assert words.tolist() == [sample_words(11, sample_id, 9, step, stream) for sample_id in ids]
        as_tensor = torch.tensor(step, device=backend.device)
        fewer = random_words(
            11, torch.tensor(ids, device=backend.device), 1 + i % 8, as_tensor, stream
        )
        assert torch.equal(fewer, words[:, : 1 + i % 8])


# --- From words to normals


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (1, 13, 1)])
@pytest.mark.parametrize("sample_id", [6, 2**32 + 6])
def test_elements_are_numbered_channels_last(shape: tuple[int, int, int], sample_id: int) -> None:
    channels, _, width = shape
    noise = gaussian_noise(-9, torch.tensor([1, sample_id]), shape, 31, Stream.SAMPLER_NOISE)
    assert noise.shape == (2, *shape)
    assert noise.dtype == torch.float32
    assert noise.is_contiguous(memory_format=torch.channels_last)
    for c, row, column in np.ndindex(*shape):
        element = (row * width + column) * channels + c
        words = words_at(-9, sample_id, element // 4, 31, Stream.SAMPLER_NOISE)
        pair = element % 4 // 2 * 2
        exact = normal_pair(words[pair], words[pair + 1])[element % 2]
        half_an_ulp = float(np.spacing(np.float32(abs(exact)))) / 2
        assert abs(noise[1, c, row, column].item() - exact) <= 1.001 * half_an_ulp + 1e-15


def test_box_muller_is_correctly_rounded() -> None:
    ids = torch.arange(8)
    noise = flat_noise(ids, 500)
    words = random_words(7, ids, 500, 0, Stream.TRAINING_NOISE).reshape(-1, 2).tolist()
    exact = np.array([normal_pair(a, b) for a, b in words]).reshape(8, 500)
    half_an_ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2
    assert bool((np.abs(noise - exact) <= 1.001 * half_an_ulp + 1e-15).all())


def in_blocks(words: Tensor) -> Tensor:
    """Box–Muller as it is done on a CPU."""
    normals = torch.empty(words.shape)
    write_normals(words[:, ::2], words[:, 1::2], normals[:, ::2], normals[:, 1::2])
    return normals


WAYS = pytest.mark.parametrize("normals", [normals_of_words, in_blocks])
Normals = Callable[[Tensor], Tensor]


@WAYS
def test_extreme_words(normals: Normals) -> None:
    for u_word, radius in (
        (0, math.sqrt(2 * 33 * math.log(2))),  # 6.76: u from 24 bits does not go beyond 5.77
        (1, math.sqrt(-2 * math.log(1.5 * 2.0**-32))),
        (2**7, math.sqrt(-2 * math.log((2**7 + 0.5) * 2.0**-32))),
        (2**31, math.sqrt(2 * math.log(2))),
        (MASK, 0.0),
    ):
        quarters = [u_word, 0, u_word, 2**30, u_word, 2**31, u_word, 3 * 2**30]
        directions = np.array([[1, 0, 0, 1, -1, 0, 0, -1]])
        noise = normals(torch.tensor([quarters])).double().numpy()
        np.testing.assert_allclose(noise, radius * directions, rtol=1e-6, atol=0)


@WAYS
def test_angles_beside_every_eighth_of_a_turn(normals: Normals) -> None:
    """Where a sine or cosine is near zero, or reduction changes over."""
    angles = [(eighth * 2**29 + d) % 2**32 for eighth in range(8) for d in (-2, -1, 0, 1, 2, 77)]
    words = [word for angle in angles for word in (12345, angle)]
    noise = normals(torch.tensor([words]))[0].double().numpy()
    radius = math.hypot(*normal_pair(12345, 0))
    for n, angle in enumerate(angles):
        # Of an angle that is exactly a small multiple of 2⁻³², so that float64 does not round it.
        quarter, rest = divmod(angle + 2**29, 2**30)
        theta = 2 * math.pi * ((rest - 2**29) / 2**32)
        turned = complex(math.cos(theta), math.sin(theta)) * [1, 1j, -1, -1j][quarter % 4]
        exact = radius * np.array([turned.real, turned.imag])
        np.testing.assert_allclose(noise[2 * n : 2 * n + 2], exact, rtol=6e-8, atol=0)


# --- In blocks, as on a CPU: the reference's values


IDS_NEAR_EDGES = st.one_of(
    st.integers(0, MAX_SAMPLE_ID),
    st.integers(2**32 - 3, 2**32 + 3),
    st.integers(MAX_SAMPLE_ID - 3, MAX_SAMPLE_ID),
)


@settings(max_examples=100)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    ids=st.lists(IDS_NEAR_EDGES, max_size=9),
    count=st.integers(0, 150),
    step=st.integers(0, MASK),
    stream=st.sampled_from(Stream),
    block=st.integers(1, 64),
)
def test_blocks_equal_the_reference(
    seed: int, ids: list[int], count: int, step: int, stream: Stream, block: int
) -> None:
    place = torch.tensor(seed), torch.tensor(ids, dtype=torch.int64), count
    time = torch.tensor(step), stream
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_noise, "COUNTERS_A_THREAD", block)
        noise = random_normals_in_blocks(*place, *time)
    assert noise.is_contiguous()
    # Equal, with no tolerance, though one in 10⁸ is free to differ: the examples are always these.
    torch.testing.assert_close(noise, random_normals(*place, *time), rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_of_full_size_equal_the_reference(threads: int) -> None:
    count = 4 * cpu_noise.COUNTERS_A_THREAD + 1001  # two blocks a sample, or many samples one
    zero = torch.tensor(0)
    given_ = torch.tensor(7), torch.tensor([5, 2**40]), count, zero, NOISE
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        noise = random_normals_in_blocks(*given_)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(noise, random_normals(*given_), rtol=0, atol=0)


def test_eager_cpu_takes_blocks_and_compiled_code_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_ = 3, torch.arange(5), (3, 4, 5), 2, NOISE
    eager = gaussian_noise(*given_)
    torch._dynamo.reset()
    monkeypatch.setattr(cpu_noise, "random_normals_in_blocks", None)
    compiled = torch.compile(gaussian_noise, fullgraph=True, backend="aot_eager")(*given_)
    assert torch.equal(compiled, eager)
    with pytest.raises(TypeError):
        gaussian_noise(*given_)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shape_without_values(kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        noise = gaussian_noise(3, torch.arange(2), (3, 4, 5), 0, NOISE)
    assert noise.shape == (2, 3, 4, 5)
    assert noise.dtype == torch.float32
    assert noise.is_contiguous(memory_format=torch.channels_last)


# --- Statistics


def test_noise_is_normal() -> None:
    """Moments, distribution and tails of a million values."""
    million = flat_noise(torch.arange(250), 4000).ravel()
    n = len(million)
    assert abs(million.mean()) < 4 / math.sqrt(n)
    assert abs(million.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(million)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(million)) < 4 * math.sqrt(24 / n)
    for values in (million, million[::2], million[1::2]):  # all, cosines, sines
        assert stats.kstest(values, "norm").pvalue > 1e-3
    for sigmas in (1, 2, 3, 4):
        for side in (-1, 1):
            expected = n * stats.norm.sf(sigmas)
            beyond = int((side * million > sigmas).sum())
            assert abs(beyond - expected) < 4 * math.sqrt(expected)


def uncorrelated(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether neither the values nor their squares correlate, within four standard errors."""
    bound = 4 / math.sqrt(a.size)
    first, second = a.ravel(), b.ravel()
    return all(
        abs(np.corrcoef(f(first), g(second))[0, 1]) < bound
        for f in (np.asarray, np.square)
        for g in (np.asarray, np.square)
    )


IDS = torch.arange(50)


@pytest.mark.parametrize(
    "other",
    [
        lambda: flat_noise(IDS + 1, 4000),
        lambda: flat_noise(IDS + 2**32, 4000),
        lambda: flat_noise(IDS, 4000, seed=8),
        lambda: flat_noise(IDS, 4000, seed=7 + 2**32),
        lambda: flat_noise(IDS, 4000, step=1),
        lambda: flat_noise(IDS, 4000, stream=Stream.SAMPLER_NOISE),
        lambda: flat_noise(IDS, 4000, stream=Stream.INITIAL_NOISE),
    ],
    ids=["id", "high_id", "seed", "high_seed", "step", "sampler_noise", "initial_noise"],
)
def test_streams_do_not_correlate(other: Callable[[], np.ndarray]) -> None:
    assert uncorrelated(flat_noise(IDS, 4000), other())


def test_neighbouring_elements_do_not_correlate() -> None:
    noise = flat_noise(IDS, 4000)
    for lag in (1, 2, 3, 4, 5, 8):
        assert uncorrelated(noise[:, lag:], noise[:, :-lag])
    # The two of one Box–Muller pair, which share a radius.
    assert uncorrelated(noise[:, ::2], noise[:, 1::2])


# --- Independence of the batch, bit for bit


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7)])
def test_batch_and_order_do_not_matter(shape: tuple[int, int, int]) -> None:
    ids = torch.arange(64) * 2**27 + 5
    whole = gaussian_noise(3, ids, shape, 17, Stream.SAMPLER_NOISE)
    for size in (1, 3):
        parts = [
            gaussian_noise(3, part, shape, 17, Stream.SAMPLER_NOISE) for part in ids.split(size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    permuted = gaussian_noise(3, ids[order], shape, 17, Stream.SAMPLER_NOISE)
    assert torch.equal(permuted, whole[order])
    repeated = gaussian_noise(3, ids[[9, 9]], shape, 17, Stream.SAMPLER_NOISE)
    assert torch.equal(repeated, whole[[9, 9]])


# --- Integers and coins


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 2**31])
def test_random_integers_scale_the_first_word(high: int) -> None:
    ids = torch.arange(200) + 2**32
    drawn = random_integers(5, ids, high, 3, Stream.TRAINING_TIMESTEP)
    first = random_words(5, ids, 1, 3, Stream.TRAINING_TIMESTEP)[:, 0]
    assert drawn.dtype == torch.int64
    assert drawn.tolist() == [word * high // 2**32 for word in first.tolist()]
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < high


def test_bernoulli_rate() -> None:
    n = 100_000
    for probability in (0.0, 1e-3, 0.1, 1.0):
        drawn = bernoulli(5, torch.arange(n), probability, 0, Stream.LABEL_DROPOUT)
        assert drawn.dtype == torch.bool
        bound = 4 * math.sqrt(n * probability * (1 - probability))
        assert abs(int(drawn.sum()) - n * probability) <= bound


def test_a_higher_probability_only_adds() -> None:
    ids = torch.arange(10_000)
    rare, common = (bernoulli(5, ids, p, 0, Stream.HORIZONTAL_FLIP) for p in (0.2, 0.6))
    assert bool((common | ~rare).all())
    assert int(common.sum()) > int(rare.sum()) > 0
