"""Noise as a pure function: Philox4x32-10 and the counter map shared by every kernel.

Every random number of training and sampling is `f(seed, stream, sample id, step, element)`. There
is no generator state: a sample meets the same noise at any batch size, order or device count.

**Counter map.** The key is the 64-bit seed. The four 32-bit counter words are

    c0 = element // 4       elements of one sample, counted in channels-last order
    c1 = step
    c2 = sample id, low 32 bits
    c3 = stream | (sample id, high 24 bits) << 8

and the four output words belong to elements 4·c0 … 4·c0 + 3. Two normals come from each of the word
pairs (0, 1) and (2, 3) by Box–Muller:

    u = fl32(fl32(w0) · 2⁻³² + 2⁻³³) in (0, 1],   θ = 2π · w1 / 2³²,   r = sqrt(-2 ln u)
    n0 = r cos θ,   n1 = r sin θ

Everything after the rounding of u is computed here in float64 and rounded once, so the reference is
within half an ulp of the exact value. The smallest u is 2⁻³³: tails reach 6.76σ.

The noise is computed in three places: by `random_normals`, which specifies it; by
`cpu_noise.random_normals_in_blocks`, the same in less time and memory on a CPU; and by `normals4`
in kernels.

Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the
constants are those of Random123, whose published known answers the tests reproduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.tiling import as_scalar
from ddpm_kernels.triton_shim import tl, triton

ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
STREAM_BITS = 8

MAX_SAMPLE_ID = 2 ** (32 + 32 - STREAM_BITS) - 1


class Stream(IntEnum):
    """What a random number is for. Draws of different streams never share a counter."""

    TRAINING_TIMESTEP = 0
    TRAINING_NOISE = 1
    LABEL_DROPOUT = 2
    HORIZONTAL_FLIP = 3
    INITIAL_NOISE = 4
    SAMPLER_NOISE = 5
    SHARD_ORDER = 6
    SAMPLE_ORDER = 7
    SUBSTITUTE = 8
    DROPOUT = 9
    KNOWN_NOISE = 10
    RESAMPLING_NOISE = 11
    OFFSET_NOISE = 12
    LIKELIHOOD_NOISE = 13
    TRAINING_SIGMA = 14
    AUGMENTATION_LEVEL = 16
    AUGMENTATION_NOISE = 17
    EVALUATION_ORDER = 24
    CAPTION = 25
    LATENT = 26


def philox4x32(counter: Tensor, key: Tensor, rounds: int = 10) -> Tensor:
    """Apply the Philox4x32 bijection.

    Args:
        counter: int64 `[..., 4]`, each entry one unsigned 32-bit word.
        key: int64 `[..., 2]`, likewise; broadcasts against `counter`.
        rounds: 10 is the standard generator.

    Returns:
        int64 `[..., 4]`, entries in [0, 2³²).
    """
    words = _rounds(counter.unbind(-1), key.unbind(-1), rounds)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def _rounds(counter: Sequence[Any], key: Sequence[Any], rounds: int) -> tuple[Any, ...]:
    """The same of four words and two, each an int64 tensor or an integer."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2⁶⁴, which keeps exactly the 64 bits that are wanted.
        p0, p1 = c0 * ROUND_MULTIPLIERS[0], c2 * ROUND_MULTIPLIERS[1]
        c0 = (p1 >> 32 & MASK) ^ c1 ^ k0
        c1 = p1 & MASK
        c2 = (p0 >> 32 & MASK) ^ c3 ^ k1
        c3 = p0 & MASK
        k0 = k0 + KEY_INCREMENTS[0] & MASK
        k1 = k1 + KEY_INCREMENTS[1] & MASK
    return c0, c1, c2, c3


def random_words(
    seed: int | Tensor, sample_ids: Tensor, count: int, step: int | Tensor, stream: Stream
) -> Tensor:
    """Draw `count` uniform 32-bit words for each sample.

    Args:
        seed: any 64-bit integer, signed or not, or a 0-dim int64 tensor of its bits.
        sample_ids: int64 `[B]` in [0, 2⁵⁶).
        count: words a sample.
        step: in [0, 2³²), an integer or a 0-dim int64 tensor; the same for all samples.
        stream: what the words are for.

    Returns:
        int64 `[B, count]`, entries in [0, 2³²), on the device of `sample_ids`.
    """
    device = sample_ids.device
    seed, step = as_scalar(seed, device), as_scalar(step, device)
    blocks = torch.arange((count + 3) // 4, device=device)
    ids = sample_ids.to(torch.int64)[:, None]
    counter = torch.stack(
        torch.broadcast_tensors(
            blocks, step & MASK, ids & MASK, int(stream) | (ids >> 32) << STREAM_BITS
        ),
        dim=-1,
    )
    words = philox4x32(counter, torch.stack([seed & MASK, seed >> 32 & MASK]))
    return words.flatten(1)[:, :count]


def first_pairs(
    seed: Tensor, sample_ids: Tensor, step: int, streams: Sequence[Stream]
) -> tuple[Tensor, Tensor]:
    """Draw the first two words of each sample in several streams, as `random_words` one by one.

    The two halves of a counter block are rows of one tensor, and pass through a round together: a
    few numbers cost as many operations as a batch, and an operation more than what it computes.

    Args:
        seed: 0-dim int64.
        sample_ids: int64 `[B]` in [0, 2⁵⁶), on the device of `seed`.
        step: in [0, 2³²).
        streams: S of them, none twice.

    Returns:
        The first words, int64 `[S, B]` in [0, 2³²), and the second ones, likewise, with other bits
        above the low 32.
    """
    device = sample_ids.device
    # x is (c0, c2), which are multiplied, and y is (c1, c3): int64 [2, S, B].
    stream = torch.stack([torch.full_like(sample_ids, one) for one in streams])
    x = torch.stack([torch.zeros_like(stream), (sample_ids & MASK).expand_as(stream)])
    y = torch.stack([torch.full_like(stream, step), sample_ids >> 32 << STREAM_BITS | stream])
    half = torch.arange(2, device=device)
    factors = _from_pair(half, ROUND_MULTIPLIERS)[:, None, None]
    rounds = torch.arange(10, device=device)[:, None]
    keys = torch.stack([seed, seed >> 32]) + rounds * _from_pair(half, KEY_INCREMENTS)
    for key in keys[:, :, None, None].unbind():
        products = (x * factors).flip(0)
        x = (products >> 32).bitwise_xor_(y).bitwise_xor_(key).bitwise_and_(MASK)
        y = products  # whose high halves the mask removes in the next round
    return x[0], y[0]


def _from_pair(half: Tensor, pair: tuple[int, int]) -> Tensor:
    """The pair as a tensor, by arithmetic on (0, 1): constants would be copied from the host."""
    return half * (pair[1] - pair[0]) + pair[0]


def random_integers(
    seed: int | Tensor, sample_ids: Tensor, high: int, step: int | Tensor, stream: Stream
) -> Tensor:
    """Draw one integer in [0, high) for each sample, `high` ≤ 2³¹: int64 `[B]`.

    By multiplication and shift; the bias is below high · 2⁻³².
    """
    return random_words(seed, sample_ids, 1, step, stream)[:, 0] * high >> 32


def bernoulli(
    seed: int | Tensor, sample_ids: Tensor, probability: float, step: int | Tensor, stream: Stream
) -> Tensor:
    """Draw True with the given probability, to 2⁻³², for each sample: bool `[B]`."""
    threshold = round(probability * 2**32)
    return random_words(seed, sample_ids, 1, step, stream)[:, 0] < threshold


def random_normals(
    seed: Tensor, sample_ids: Tensor, count: int, step: Tensor, stream: Stream
) -> Tensor:
    """Draw `count` standard normals per sample, in the order of elements: float32 `[B, count]`."""
    words = random_words(seed, sample_ids, (count + 3) // 4 * 4, step, stream)
    return normals_of_words(words)[:, :count]


def normals_of_words(words: Tensor) -> Tensor:
    """Apply Box–Muller to pairs of words: int64 `[B, N]` to float32 `[B, N]`, N even."""
    u_words, angle_words = words.unflatten(1, (-1, 2)).unbind(-1)
    u = u_words.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = (-2.0 * u.to(torch.float64).log()).sqrt()
    # Reduced as integers to θ = quadrant · π/2 + rest, so that zeros of sine and cosine are exact.
    quadrant = angle_words + 2**29 >> 30 & 3
    rest = (angle_words + 2**29 & 2**30 - 1) - 2**29
    rest = rest.to(torch.float64) * (2.0 * math.pi / 2**32)
    sine, cosine = rest.sin(), rest.cos()
    odd = quadrant & 1 == 1
    x, y = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    x = torch.where(quadrant + 1 & 2 == 2, -x, x)
    y = torch.where(quadrant & 2 == 2, -y, y)
    return torch.stack([radius * x, radius * y], dim=-1).flatten(1).to(torch.float32)


@triton.jit
def normals4(seed, block, step, sample_id, stream: tl.constexpr):  # type: ignore[no-untyped-def]
    """The four normals of each counter block, in float32, on the device.

    Args:
        seed: int64 scalar.
        block: uint32 tensor: element // 4.
        step: int64 scalar; its low 32 bits count.
        sample_id: int64 scalar (or tensor that broadcasts against `block`).
        stream: a `Stream`, as an integer.

    Returns:
        Four float32 tensors shaped as `block`, for elements 4·block, … + 1, … + 2 and … + 3.
    """
    high = ((sample_id >> 32) << 8).to(tl.uint32) | stream
    w0, w1, w2, w3 = philox_words(seed, block, step.to(tl.uint32), sample_id.to(tl.uint32), high)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def first_pair(seed, sample_id, STEP: tl.constexpr, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first two words of a sample in a stream, uint32 shaped as `sample_id`, as `first_pairs`.

    Args:
        seed: int64 scalar.
        sample_id: int64 tensor.
        STEP: counter step.
        STREAM: a `Stream`, as an integer.
    """
    low = sample_id.to(tl.uint32)
    high = ((sample_id >> 32) << 8).to(tl.uint32) | STREAM
    w0, w1, _, _ = philox_words(seed, low * 0, low * 0 + STEP, low, high)
    return w0, w1


@triton.jit
def philox_words(seed, c0, c1, c2, c3, ROUNDS: tl.constexpr = 10):  # type: ignore[no-untyped-def]
    """`philox4x32` of uint32 counter words that broadcast against each other.

    tl.philox takes the two halves of each product by two instructions; a 64-bit product is one.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def interleave4(a, b, c, d):  # type: ignore[no-untyped-def]
    """Four tensors `[N]` to one `[4 N]`: a[0], b[0], c[0], d[0], a[1], …"""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(joined, (4 * a.shape[0],))


@triton.jit
def _box_muller(radius_word, angle_word):  # type: ignore[no-untyped-def]
    """Two normals from two uint32 words, as the module's formula, within 4 ulp of the reference.

    tl.log, tl.cos and tl.sin are not used: the first is inaccurate near one on NVIDIA, and the
    others reduce arguments of any size in software, which costs three times the rest together.
    """
    u = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(minus_two_log(u))

    # θ = quadrant · π/2 + rest, with the rest in [-π/4, π/4): the word's low 30 bits as a signed
    # integer, exact. Shifted to the top of the word, where the sign is in its place.
    r = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198167899e-10
    z = r * r
    # Minimax polynomials of (sin r / r − 1) / r² and (cos r − 1) / r², in r².
    sine = r + r * z * (-0.16666654611 + z * (0.00833216076 - z * 0.000195152959))
    cosine = 1.0 + z * (-0.5 + z * (0.0416666418 + z * (-0.00138873165 + z * 2.44331571e-05)))
    # The quadrant is in the two high bits: the first is the sign of y, their sum that of x.
    quadrant = angle_word + 0x20000000
    swap = (quadrant & 0x40000000) != 0
    x = _flip_sign(tl.where(swap, sine, cosine), quadrant + 0x40000000)
    y = _flip_sign(tl.where(swap, cosine, sine), quadrant)
    return radius * x, radius * y


@triton.jit
def _flip_sign(value, word):  # type: ignore[no-untyped-def]
    """−value where the highest bit of the uint32 word is set."""
    bits = value.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def minus_two_log(u):  # type: ignore[no-untyped-def]
    """−2 ln u of a positive normal float32, to 1 ulp, also near one."""
    bits = u.to(tl.int32, bitcast=True)
    # u = 2^e m with m in [sqrt(½), sqrt(2)): shift so that the exponent turns over at sqrt(½).
    # The exponent stays in its place, as 2²³ e.
    e = (bits - 0x3F3504F3) & -0x800000
    x = (bits - e).to(tl.float32, bitcast=True) - 1.0
    # Minimax polynomial of −2 (log(1 + x) − x) / x².
    p = 0.28614966 + x * -0.174695012
    p = -0.29835978 + x * p
    p = 0.33141028 + x * p
    p = -0.39924142 + x * p
    p = 0.5000351 + x * p
    p = -0.666679 + x * p
    p = 0.99999984 + x * p
    e = e.to(tl.float32)
    # −2⁻²² ln 2 in two parts, the first of few bits, so that its product is exact before the sum.
    return e * -1.6530975699424744e-07 + (x * -2.0 + (x * x * p + e * 5.059109687805176e-11))
