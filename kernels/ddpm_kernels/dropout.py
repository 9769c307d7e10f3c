"""Dropout as a pure function of a sample's key and the element.

With an element's index e within its sample, counted in channels-last order whatever the layout,
e = pixel · C + channel, and its 16 random bits b(e),

    y = x / (1 − p)  where b ≥ p 2¹⁶,  else 0

with p to 2⁻¹⁶. There is neither a mask nor a generator: the backward pass, a recomputation and
another number of ranks find the same bits.

The bits are those of Philox4x32 with seven rounds, the fewest that pass BigCrush. Its key is the
sample's, which is drawn anew at every step (`draws`), one for each layer. Its counter is

    c0 = e // 8,   c1 = c2 = c3 = 0

and the four words' halves, low before high, belong to elements 8·c0 … 8·c0 + 7.

Sources: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
JMLR 2014; Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_kernels.cpu_dropout import keep_scale_in_blocks
from ddpm_kernels.philox import MASK, philox4x32, philox_words
from ddpm_kernels.tiling import check_per_sample
from ddpm_kernels.triton_shim import tl, triton

ROUNDS = 7
LEVELS = 2**16
"""Of an element's random bits."""


@dataclass(frozen=True)
class Dropout:
    """What decides which elements of a tensor are dropped.

    Raises:
        ValueError: a probability outside [0, 1).
    """

    probability: float
    """Of dropping an element, from 0 to below 1; rounded to 2⁻¹⁶."""
    key: Tensor
    """int64 `[N]`, the key of each sample."""

    def __post_init__(self) -> None:
        """Check the probability."""
        if not 0 <= self.probability < 1:
            raise ValueError(f"probability is {self.probability}; it must be in [0, 1)")

    @property
    def threshold(self) -> int:
        """The least random bits of an element that is kept, in [0, 2¹⁶)."""
        return min(round(self.probability * LEVELS), LEVELS - 1)

    @property
    def scale(self) -> float:
        """What elements that are kept are multiplied by: 1 / (1 − p) of the p in force."""
        return LEVELS / (LEVELS - self.threshold)


def dropout(x: Tensor, how: Dropout) -> Tensor:
    """Drop elements of each sample and scale the others, by torch's operations.

    Args:
        x: `[N, C, H, W]`, float.
        how: probability and keys.

    Returns:
        `[N, C, H, W]` in the dtype of `x`.

    Raises:
        ValueError: `how.key` does not have one value per sample.
    """
    return (x * keep_scale_of(x, how)).to(x.dtype)


def keep_scale_of(x: Tensor, how: Dropout) -> Tensor:
    """Return what each element is multiplied by, 0 or 1 / (1 − p).

    Args:
        x: `[N, C, H, W]`, of which the shape, the device and whether it is float64 matter.
        how: see `dropout`.

    Returns:
        `[N, C, H, W]`, float64 if `x` is, else float32.

    Raises:
        ValueError: `how.key` does not have one value per sample.
    """
    check_per_sample(len(x), key=how.key)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, channels, height, width = x.shape
    in_planes = x.device.type == "cpu" and x.is_contiguous() and channels % 8 == 0
    # Inductor fuses the plain form, and needs no blocks.
    if in_planes and dtype == torch.float32 and not torch.compiler.is_compiling():
        return keep_scale_in_blocks(how.key, x.shape, how.threshold, how.scale, ROUNDS)
    bits = random_bits(how.key, channels * height * width)
    kept = (bits >= how.threshold).view(batch, height, width, channels).permute(0, 3, 1, 2)
    return kept.to(dtype) * how.scale


def random_bits(key: Tensor, count: int) -> Tensor:
    """Draw 16 bits for each of `count` elements of every sample.

    Args:
        key: int64 `[N]`.
        count: elements of a sample.

    Returns:
        int64 `[N, count]`, entries in [0, 2¹⁶).
    """
    blocks = torch.arange((count + 7) // 8, device=key.device)
    zero = torch.zeros_like(blocks)
    counter = torch.stack([blocks, zero, zero, zero], dim=-1)
    words = philox4x32(counter, torch.stack([key & MASK, key >> 32 & MASK], -1)[:, None], ROUNDS)
    halves = torch.stack([words & LEVELS - 1, words >> 16], dim=-1)
    return halves.flatten(1)[:, :count]


# --- Triton


@triton.jit
def keep_scale(  # type: ignore[no-untyped-def]
    key,
    first_pixel,
    first_channel,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """What a tile of one sample is multiplied by: float32 `[ROWS, WIDTH]`.

    Args:
        key: int64 scalar, the sample's.
        first_pixel: scalar, of the tile's first row.
        first_channel: scalar, of its first column; a multiple of CHUNK.
        CHANNELS: of the whole sample.
        CHUNK: channels from one column of tiles to the next, or CHANNELS where there is one.
        ROWS: pixels of the tile.
        WIDTH: channels of the tile.
        THRESHOLD: `Dropout.threshold`.
    """
    pixel = first_pixel + tl.arange(0, ROWS)
    if CHANNELS % 8 == 0 and CHUNK % 8 == 0 and WIDTH % 8 == 0:
        kept = _kept_in_blocks(key, pixel, first_channel, CHANNELS, ROWS, WIDTH, THRESHOLD)
    else:
        channel = first_channel + tl.arange(0, WIDTH)
        element = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        kept = _kept_one_by_one(key, element, THRESHOLD)
    return tl.where(kept, 65536.0 / (65536 - THRESHOLD), 0.0)


@triton.jit
def _words_of(key, block):  # type: ignore[no-untyped-def]
    """The four words of each counter block."""
    zero = tl.full((), 0, tl.uint32)
    return philox_words(key, block.to(tl.uint32), zero, zero, zero, 7)


@triton.jit
def _kept_in_blocks(  # type: ignore[no-untyped-def]
    key,
    pixel,
    first_channel,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """Of rows that begin with a block: a word serves two elements, and eight share their rounds."""
    row = pixel * (CHANNELS // 8) + first_channel // 8
    w0, w1, w2, w3 = _words_of(key, row[:, None] + tl.arange(0, WIDTH // 8)[None, :])
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    # Shifted rather than masked: then both halves are compared with the same number.
    kept = tl.join(words << 16, words) >= (THRESHOLD << 16)
    return tl.reshape(kept, (ROWS, WIDTH))


@triton.jit
def _kept_one_by_one(key, element, THRESHOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of rows that begin anywhere in a block, each element takes its half of its own four words."""
    w0, w1, w2, w3 = _words_of(key, element >> 3)
    lane = (element & 7).to(tl.int32)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    word = tl.where(lane % 2 == 0, word << 16, word)
    return word >= (THRESHOLD << 16)
