"""Noise as a pure function: Philox4x32-10 and the counter map shared by every kernel.

Every random number of training and sampling is `f(seed, stream, sample id, step, element)`. There
is no generator state: a picture meets the same noise at any batch size, order or device count.

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

Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the
constants are those of Random123, whose published known answers the tests reproduce.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_STREAM_BITS = 8

MAX_SAMPLE_ID = 2 ** (32 + 32 - _STREAM_BITS) - 1


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


def philox4x32(counter: Tensor, key: Tensor, rounds: int = 10) -> Tensor:
    """Apply the Philox4x32 bijection.

    Args:
        counter: int64 `[..., 4]`, each entry one unsigned 32-bit word.
        key: int64 `[..., 2]`, likewise; broadcasts against `counter`.
        rounds: 10 is the standard generator.

    Returns:
        int64 `[..., 4]`, entries in [0, 2³²).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(rounds):
        # int64 products wrap modulo 2⁶⁴, which keeps exactly the 64 bits that are wanted.
        p0, p1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0 = (p1 >> 32 & _MASK) ^ c1 ^ k0
        c1 = p1 & _MASK
        c2 = (p0 >> 32 & _MASK) ^ c3 ^ k1
        c3 = p0 & _MASK
        k0 = k0 + _KEY_INCREMENTS[0] & _MASK
        k1 = k1 + _KEY_INCREMENTS[1] & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def random_words(
    seed: int | Tensor, sample_ids: Tensor, count: int, step: int | Tensor, stream: Stream
) -> Tensor:
    """Draw `count` uniform 32-bit words for each sample.

    Args:
        seed: any signed 64-bit integer, or a 0-dim int64 tensor of it.
        sample_ids: int64 `[B]` in [0, 2⁵⁶).
        count: words a sample.
        step: in [0, 2³²); the same for all samples.
        stream: what the words are for.

    Returns:
        int64 `[B, count]`, entries in [0, 2³²), on the device of `sample_ids`.
    """
    device = sample_ids.device
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    step = torch.as_tensor(step, dtype=torch.int64, device=device)
    blocks = torch.arange((count + 3) // 4, device=device)
    ids = sample_ids.to(torch.int64)[:, None]
    counter = torch.stack(
        torch.broadcast_tensors(
            blocks, step & _MASK, ids & _MASK, int(stream) | (ids >> 32) << _STREAM_BITS
        ),
        dim=-1,
    )
    words = philox4x32(counter, torch.stack([seed & _MASK, seed >> 32 & _MASK]))
    return words.flatten(1)[:, :count]


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


def gaussian_noise(
    seed: int | Tensor,
    sample_ids: Tensor,
    shape: tuple[int, int, int],
    step: int | Tensor,
    stream: Stream,
) -> Tensor:
    """Draw standard normal noise for a batch of images.

    Args:
        seed: any signed 64-bit integer, or a 0-dim int64 tensor of it.
        sample_ids: int64 `[B]` in [0, 2⁵⁶).
        shape: `(channels, height, width)` of one sample.
        step: the sampler's step, or 0 in training, where the id is the sample's position.
        stream: what the noise is for.

    Returns:
        float32 `[B, C, H, W]` in channels-last memory format. Each value depends only on the seed,
        stream, step, its sample's id and its place (channel, row, column, and C and W).
    """
    channels, height, width = shape
    count = channels * height * width
    words = random_words(seed, sample_ids, (count + 3) // 4 * 4, step, stream)
    u_words, angle_words = words.unflatten(1, (-1, 2)).unbind(-1)
    u = u_words.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = (-2.0 * u.to(torch.float64).log()).sqrt()
    angle = angle_words.to(torch.float64) * (2.0 * math.pi / 2**32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    noise = pairs.flatten(1)[:, :count].to(torch.float32)
    return noise.view(len(sample_ids), height, width, channels).permute(0, 3, 1, 2)
