"""What dropout multiplies by, on a CPU: the values of `dropout`, in less time and memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_kernels.cpu_noise import COUNTERS_A_THREAD, mix
from ddpm_kernels.philox import KEY_INCREMENTS, MASK, ROUND_MULTIPLIERS

_TO_SIGNED = 0x80008000
"""Turns the order of unsigned halves of a word into that of signed ones."""


def keep_scale_in_blocks(
    key: Tensor, shape: torch.Size, threshold: int, scale: float, rounds: int
) -> Tensor:
    """Compute what `dropout.keep_scale_of` does, of float32 maps whose channels 8 divides.

    As `cpu_noise.random_normals_in_blocks`: in blocks that stay in a core's cache, and in place. A
    counter's eight elements are a pixel of eight channels, so that each half of a word goes to a
    plane as it lies in memory; and they are compared in float32, which takes less time than
    comparing integers.

    Args:
        key: int64 `[N]`.
        shape: `[N, C, H, W]`.
        threshold: the least bits of an element that is kept.
        scale: what such an element is multiplied by.
        rounds: of Philox, two or more.

    Returns:
        float32 `[N, C, H, W]`, contiguous.
    """
    batch, channels, height, width = shape
    eights, pixels = channels // 8, height * width
    scales = torch.empty(batch, eights, 8, pixels, device="cpu")
    pixel, eight = (torch.arange(count, device="cpu") for count in (pixels, eights))
    counters = pixel * eights + eight[:, None]
    block = COUNTERS_A_THREAD * torch.get_num_threads()
    columns = max(1, min(eights, block // pixels))
    rows = max(1, block // (columns * pixels))
    for keys, samples in zip(key.split(rows), scales.split(rows), strict=True):
        for c0, out in zip(counters.split(columns), samples.split(columns, dim=1), strict=True):
            for number, word in enumerate(_signed_words(keys, c0, rounds)):
                out[:, :, 2 * number].copy_(word.to(torch.int16))
                out[:, :, 2 * number + 1].copy_((word >> 16).to(torch.int16))
            # From one below the threshold on: 0 or less, and 1 or more.
            out.sub_(threshold - 2**15 - 1).clamp_(0, 1).mul_(scale)
    return scales.view(shape)


def _signed_words(key: Tensor, c0: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of the counters (c0, 0, 0, 0): int64 `[len(key), *c0.shape]`, ^ `_TO_SIGNED`.

    The low 32 bits are the word.
    """
    k0, k1 = (half.view(-1, *(1,) * c0.ndim) for half in (key & MASK, key >> 32 & MASK))
    # The first round, of which one product is zero.
    p0 = c0 * ROUND_MULTIPLIERS[0]
    w0, w1, w2, w3 = k0, torch.zeros_like(k0), p0 >> 32 ^ k1, p0
    for _ in range(rounds - 1):
        k0, k1 = k0 + KEY_INCREMENTS[0] & MASK, k1 + KEY_INCREMENTS[1] & MASK
        p0, p1 = w0 * ROUND_MULTIPLIERS[0], w2 * ROUND_MULTIPLIERS[1]
        w0, w1, w2, w3 = mix(p1, w1, k0), p1, mix(p0, w3, k1), p0
    w0, w1, w2, w3 = (word.bitwise_xor_(_TO_SIGNED) for word in (w0, w1, w2, w3))
    return w0, w1, w2, w3
