"""GroupNorm, affine, optional per-sample scale and shift, optional SiLU: one operation.

With x̂ = (x − mean) · rstd over each (sample, group), γ, β the affine parameters and s, t the
per-sample scale and shift,

    z = (x̂ γ + β)(1 + s) + t        y = z σ(z)   (or z, without activation)

Backward, with dz = dy · σ(z)(1 + z(1 − σ(z))), A = Σ dz x̂ and B = Σ dz over space per (sample,
channel):

    dt = B        ds = γA + βB        dγ = Σₙ (1 + s) A        dβ = Σₙ (1 + s) B
    dx = rstd (γ(1 + s) dz − c₂ − x̂ c₁)

where c₁, c₂ are the means over the group's elements of γ(1 + s) dz x̂ and γ(1 + s) dz.

Statistics are taken in float32 (float64 for float64 inputs) whatever the data's precision. The
mean is kept as an unevaluated sum of two: rounded to one number it is off by up to 6·10⁻⁵
deviations where it is 1000 of them, and every gradient with it.

The Triton kernels read channels-last memory, `[N, pixels, C]`. A program takes one sample, one slab
of consecutive pixels and one chunk of whole groups, so that its rows are contiguous and it alone
writes its partial sums. Forward: moments of each slab, then a launch that combines them and writes
y (a single launch where one slab covers the sample). Backward: partial sums of each slab, a small
launch that makes A, B, c₁ and c₂ of them, and one that writes dx.

Source: Wu & He, "Group Normalization", ECCV 2018; the scale and shift are those of Dhariwal &
Nichol, "Diffusion Models Beat GANs", 2021 (adaptive group normalization).
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_kernels.dispatch import runs_triton, takes_op
from ddpm_kernels.tiles import Tile, tile_for
from ddpm_kernels.triton_shim import tl, triton

WIDTHS = (64, 128, 256, 512)
"""Channels of a tile: a row of 64 in half precision is one cache line."""
PROGRAMS = 512
"""At most so many where one a sample and chunk would be fewer: a wave of four a multiprocessor on
132, which keeps enough loads in flight; more would only repeat a program's fixed work."""
MAX_SLABS = 64
"""Each program of the forward's second launch reads the moments of all of its sample's slabs."""


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """Normalise, scale, shift and activate.

    Args:
        x: `[N, C, H, W]`, float32, float16, bfloat16 (or float64, for checking).
        groups: divides C.
        weight: `[C]`; `bias` likewise.
        bias: `[C]`.
        scale: `[N, C]` or None; enters as 1 + scale.
        shift: `[N, C]` or None; given exactly when `scale` is.
        eps: added to the variance.
        activation: `"silu"` or `"none"`.

    Returns:
        `[N, C, H, W]` in the dtype of `x`, channels-last if `x` is.

    Raises:
        ValueError: an unknown activation, groups that do not divide C, or scale without shift.
    """
    if activation not in ("silu", "none"):
        raise ValueError(f"activation is {activation!r}; it must be 'silu' or 'none'")
    if x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels cannot be normalised in {groups} groups")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together")
    arguments = x, groups, weight, bias, scale, shift, eps, activation
    if takes_op(x):
        y, _ = torch.ops.ddpm.group_norm_silu(*arguments)
        return y
    if _suits_torch(x, weight, bias) and (fast := _by_torch(*arguments)) is not None:
        return fast
    y, _ = group_norm_silu_reference(*arguments)
    return y


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_pixel(per_channel: Tensor) -> Tensor:
    return per_channel[..., None, None]


def _group_mean(sums: Tensor, groups: int, pixels: int) -> Tensor:
    """From sums over each channel's pixels, `[N, C]`, to means over each group, `[N, groups]`."""
    per_group = sums.unflatten(1, (groups, -1))
    return per_group.sum(-1) / (per_group.shape[-1] * pixels)


def group_norm_silu_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """What `group_norm_silu` computes; returns y, and mean, its rest and rstd, `[N, 3, groups]`.

    Not `F.group_norm`: on channels-last CPU tensors torch takes the variance as E[x²] − E[x]²,
    which loses every digit once the mean is 1000 times the deviation, and one at 256×256 pixels.
    """
    dtype = _compute_dtype(x)
    channels, pixels = x.shape[1] // groups, x.shape[2] * x.shape[3]
    wide = x.to(dtype)
    mean = _group_mean(wide.sum((2, 3)), groups, pixels)
    centred = wide - _per_pixel(mean.repeat_interleave(channels, dim=1))
    # The sum's rounding is large beside a small deviation: take what it left off the mean too.
    rest = _group_mean(centred.sum((2, 3)), groups, pixels)
    variance = _group_mean(centred.square().sum((2, 3)), groups, pixels) - rest.square()
    rstd = (variance.clamp(min=0) + eps).rsqrt()
    gain, offset = _affine(weight, bias, scale, shift, dtype)
    gain = gain * rstd.repeat_interleave(channels, dim=1)
    offset = offset - gain * rest.repeat_interleave(channels, dim=1)
    z = torch.addcmul(_per_pixel(offset), centred, _per_pixel(gain))
    if activation == "silu":
        z = F.silu(z)
    return z.to(x.dtype), torch.stack([mean, rest, rstd], dim=1)


NEAR = 8.0
"""Deviations: a mean no farther than this from zero costs torch's group norm a digit at most."""


def _suits_torch(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether torch's own group norm is careful here: on a CPU, in float32, laid out NCHW."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype == torch.float32
        and x.is_contiguous()
        and x.numel() > 0
        # Which of two ways is taken depends on values, of which a compiler's trace has none.
        and not torch.compiler.is_compiling()
    )


def _by_torch(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor | None:
    """`group_norm_silu` with torch's kernel, two to five times as fast as one op after the other.

    Returns:
        y, or None where a group's mean is too far from zero: torch does not take it off first, so
        that its error is that many times as large.
    """
    batch, channels, height, width = x.shape
    z, mean, rstd = torch.native_group_norm(
        x, weight, bias, batch, channels, height * width, groups, eps
    )
    if (mean.detach() * rstd.detach()).abs().amax() > NEAR:
        return None
    if scale is not None and shift is not None:
        z = torch.addcmul(_per_pixel(shift), z, _per_pixel(1 + scale))
    return F.silu(z) if activation == "silu" else z


def _affine(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The multiplier and offset per (sample, channel) that affine, scale and shift amount to."""
    gain, offset = weight.to(dtype)[None], bias.to(dtype)[None]
    if scale is not None and shift is not None:
        factor = 1 + scale.to(dtype)
        gain, offset = gain * factor, offset * factor + shift.to(dtype)
    return gain, offset


def _channels_last_if(like: Tensor) -> torch.memory_format:
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


# --- Triton


class _Plan(NamedTuple):
    """How a `[N, pixels, C]` tensor is divided among programs."""

    rows: int
    """Pixels of a tile, a power of two."""
    width: int
    """Channels of a tile, a power of two."""
    chunk_groups: int
    """Groups in a program's chunk of channels; they need not fill the tile."""
    chunks: int
    slab_pixels: int
    slabs: int


@lru_cache(maxsize=1024)
def _plan(batch: int, channels: int, pixels: int, groups: int, tile: int) -> _Plan:
    per_group = channels // groups
    # Chunks start at multiples of 8 channels where they can, for 16-byte accesses.
    step = 8 // gcd(8, per_group)
    candidates = []
    for width in (*WIDTHS, _power_of_two(per_group)):
        chunk_groups = min(width // per_group, groups)
        if chunk_groups == 0:
            continue
        if chunk_groups < groups and chunk_groups >= step:
            chunk_groups -= chunk_groups % step
        width = _power_of_two(chunk_groups * per_group)
        chunks = -(-groups // chunk_groups)
        aligned = chunks == 1 or chunk_groups * per_group % 8 == 0
        # Least idle lanes; among equals 128 channels or the nearest to it.
        candidates.append((not aligned, chunks * width, abs(width - 128), width, chunk_groups))
    *_, width, chunk_groups = min(candidates)
    chunks = -(-groups // chunk_groups)

    rows = min(max(1, tile // width), _power_of_two(pixels))
    tiles = -(-pixels // rows)
    # At least two tiles a slab: fewer are not worth a program's fixed work.
    slabs = max(1, min(MAX_SLABS, PROGRAMS // (batch * chunks), tiles // 2))
    slab_pixels = -(-tiles // slabs) * rows
    return _Plan(rows, width, chunk_groups, chunks, slab_pixels, -(-pixels // slab_pixels))


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    pixels,
    slabs,
    slab_pixels,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """This program's sample, slab, first pixel, last pixel + 1, chunk, channels and their mask.

    The slab is counted through all samples: of the program's index alone, so that what is written
    after a loop keeps nothing else in registers meanwhile.
    """
    CHUNKS: tl.constexpr = tl.cdiv(CHANNELS, CHUNK_GROUPS * PER_GROUP)
    program = tl.program_id(0)
    chunk = program % CHUNKS
    slab = program // CHUNKS
    sample = (slab // slabs).to(tl.int64)
    start = slab % slabs * slab_pixels
    stop = tl.minimum(start + slab_pixels, pixels)
    lane = tl.arange(0, WIDTH)
    channel = chunk * (CHUNK_GROUPS * PER_GROUP) + lane
    real = (lane < CHUNK_GROUPS * PER_GROUP) & (channel < CHANNELS)
    return sample, slab.to(tl.int64), start, stop, chunk, channel, real


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    first,
    stop,
    channel,
    real,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Offsets within the sample of ROWS pixels' channels, and which of them exist."""
    pixel = first + tl.arange(0, ROWS)
    inside = (pixel < stop)[:, None] & real[None, :]
    if WIDE:
        pixel = pixel.to(tl.int64)
    return pixel[:, None] * CHANNELS + channel[None, :], inside


@triton.jit
def _sum_groups(values, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """From channels `[WIDTH]`, zero where there is none, to groups `[GROUPS]`."""
    if GROUPS * PER_GROUP == WIDTH:
        sums = tl.sum(tl.reshape(values, (GROUPS, PER_GROUP)), 1)
    else:
        group = tl.arange(0, WIDTH) // PER_GROUP
        member = group[:, None] == tl.arange(0, GROUPS)[None, :]
        sums = tl.sum(tl.where(member, values[:, None], 0.0), 0)
    return sums


@triton.jit
def _spread_groups(values, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """From groups `[GROUPS]` to their channels `[WIDTH]`."""
    if GROUPS * PER_GROUP == WIDTH:
        spread = tl.reshape(tl.broadcast_to(values[:, None], (GROUPS, PER_GROUP)), (WIDTH,))
    else:
        group = tl.arange(0, WIDTH) // PER_GROUP
        member = group[:, None] == tl.arange(0, GROUPS)[None, :]
        spread = tl.sum(tl.where(member, values[None, :], 0.0), 1)
    return spread


@triton.jit
def _affine_of(  # type: ignore[no-untyped-def]
    weight,
    bias,
    scale,
    shift,
    sample,
    channel,
    real,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    FILM: tl.constexpr,
):
    """`_affine`, for one sample's channels."""
    gain = tl.load(weight + channel, real, 0.0).to(tl.float32)
    offset = tl.load(bias + channel, real, 0.0).to(tl.float32)
    if FILM:
        s = tl.load(scale + sample * scale_row + channel * scale_column, real, 0.0)
        t = tl.load(shift + sample * shift_row + channel * shift_column, real, 0.0)
        factor = 1.0 + s.to(tl.float32)
        gain, offset = gain * factor, offset * factor + t.to(tl.float32)
    return gain, offset


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    x,
    start,
    stop,
    channel,
    real,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean, as an unevaluated sum of two, and sum of squared deviations of each group in a slab.

    Everything is summed relative to the channel's mean over the first tile, and those differences
    relative to the group's: no sum has a large part that cancels.
    """
    offsets, inside = _tile(start, stop, channel, real, CHANNELS, ROWS, WIDE)
    tile = tl.load(x + offsets, inside, 0.0).to(tl.float32)
    anchor = tl.sum(tile, 0) / tl.minimum(stop - start, ROWS).to(tl.float32)
    deviation = tl.where(inside, tile - anchor[None, :], 0.0)
    first = deviation
    second = deviation * deviation
    for pixel in range(start + ROWS, stop, ROWS):
        offsets, inside = _tile(pixel, stop, channel, real, CHANNELS, ROWS, WIDE)
        tile = tl.load(x + offsets, inside, 0.0).to(tl.float32)
        deviation = tl.where(inside, tile - anchor[None, :], 0.0)
        first += deviation
        second += deviation * deviation
    count = (stop - start).to(tl.float32)
    sums = tl.sum(first, 0)
    rest = sums / count
    squares = tl.sum(second, 0) - sums * rest

    mean = _sum_groups(anchor, PER_GROUP, WIDTH, GROUPS) / PER_GROUP
    apart = (anchor - _spread_groups(mean, PER_GROUP, WIDTH, GROUPS)) + rest
    apart = tl.where(real, apart, 0.0)
    mean_rest = _sum_groups(apart, PER_GROUP, WIDTH, GROUPS) / PER_GROUP
    apart = apart - _spread_groups(mean_rest, PER_GROUP, WIDTH, GROUPS)
    apart = tl.where(real, apart, 0.0)
    squares = _sum_groups(squares + count * apart * apart, PER_GROUP, WIDTH, GROUPS)
    return mean, mean_rest, squares


@triton.jit(do_not_specialize=["pixels", "slabs", "slab_pixels"])
def _moments_kernel(  # type: ignore[no-untyped-def]
    x,
    moments,
    pixels,
    slabs,
    slab_pixels,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`_moments` of every slab: float32 `[N, slabs, 3, groups]`."""
    sample, slab, start, stop, chunk, channel, real = _place(
        pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    mean, rest, squares = _moments(
        x + sample * pixels * CHANNELS,
        start, stop, channel, real, CHANNELS, PER_GROUP, ROWS, WIDTH, GROUPS, WIDE,
    )  # fmt: skip
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    lane = tl.arange(0, GROUPS)
    group = chunk * CHUNK_GROUPS + lane
    exists = (lane < CHUNK_GROUPS) & (group < ALL_GROUPS)
    out = moments + slab * (3 * ALL_GROUPS) + group
    tl.store(out, mean, exists)
    tl.store(out + ALL_GROUPS, rest, exists)
    tl.store(out + 2 * ALL_GROUPS, squares, exists)


@triton.jit(do_not_specialize=["pixels", "slabs", "slab_pixels", "scale_row", "shift_row"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,
    moments,
    weight,
    bias,
    scale,
    shift,
    y,
    statistics,
    pixels,
    slabs,
    slab_pixels,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    eps,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    SLABS: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
):
    """From the slabs' moments to y. With SLABS = 1 it takes the moments itself."""
    sample, _, start, stop, chunk, channel, real = _place(
        pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    x += sample * pixels * CHANNELS
    y += sample * pixels * CHANNELS
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    lane = tl.arange(0, GROUPS)
    group = chunk * CHUNK_GROUPS + lane
    exists = (lane < CHUNK_GROUPS) & (group < ALL_GROUPS)

    if SLABS == 1:
        mean, rest, squares = _moments(
            x, start, stop, channel, real, CHANNELS, PER_GROUP, ROWS, WIDTH, GROUPS, WIDE
        )
    else:
        partial = moments + sample * slabs * (3 * ALL_GROUPS) + group
        mean = tl.load(partial, exists, 0.0)
        index = tl.arange(0, SLABS)
        count = tl.minimum(pixels - index * slab_pixels, slab_pixels).to(tl.float32)[:, None]
        present = (index < slabs)[:, None] & exists[None, :]
        partial = partial[None, :] + index[:, None] * (3 * ALL_GROUPS)
        apart = tl.load(partial, present, 0.0) - mean[None, :]
        apart = apart + tl.load(partial + ALL_GROUPS, present, 0.0)
        count = tl.where(present, count, 0.0)
        rest = tl.sum(count * apart, 0) / pixels.to(tl.float32)
        apart = apart - rest[None, :]
        squares = tl.load(partial + 2 * ALL_GROUPS, present, 0.0)
        squares = tl.sum(squares + PER_GROUP * count * apart * apart, 0)
    variance = tl.maximum(squares / (pixels.to(tl.float32) * PER_GROUP), 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32)))
    # So far the mean is that of the first pixels, and the rest may be several deviations.
    anchor = mean
    mean = anchor + rest
    rest = (anchor - mean) + rest
    if start == 0:
        out = statistics + sample * (3 * ALL_GROUPS) + group
        tl.store(out, mean, exists)
        tl.store(out + ALL_GROUPS, rest, exists)
        tl.store(out + 2 * ALL_GROUPS, rstd, exists)

    gain, offset = _affine_of(
        weight, bias, scale, shift, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, FILM,
    )  # fmt: skip
    gain = gain * _spread_groups(rstd, PER_GROUP, WIDTH, GROUPS)
    offset = offset - gain * _spread_groups(rest, PER_GROUP, WIDTH, GROUPS)
    mean_c = _spread_groups(mean, PER_GROUP, WIDTH, GROUPS)
    for pixel in range(start, stop, ROWS):
        offsets, inside = _tile(pixel, stop, channel, real, CHANNELS, ROWS, WIDE)
        tile = tl.load(x + offsets, inside, 0.0).to(tl.float32)
        z = (tile - mean_c[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + offsets, z.to(y.dtype.element_ty), inside)


@triton.jit
def _statistics_of(statistics, sample, group, exists, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean, its rest and rstd of `group`, of one sample; GROUPS is the number of all groups."""
    statistics += sample * (3 * GROUPS) + group
    mean = tl.load(statistics, exists, 0.0)
    rest = tl.load(statistics + GROUPS, exists, 0.0)
    rstd = tl.load(statistics + 2 * GROUPS, exists, 0.0)
    return mean, rest, rstd


@triton.jit
def _normaliser(  # type: ignore[no-untyped-def]
    statistics,
    weight,
    bias,
    scale,
    shift,
    sample,
    channel,
    real,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    FILM: tl.constexpr,
):
    """Of each channel mean, its rest and rstd; gain and offset: z = (x − mean) gain + offset."""
    mean, rest, rstd = _statistics_of(
        statistics, sample, channel // PER_GROUP, real, CHANNELS // PER_GROUP
    )
    gain, offset = _affine_of(
        weight, bias, scale, shift, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, FILM,
    )  # fmt: skip
    gain = gain * rstd
    return mean, rest, rstd, gain, offset - gain * rest


@triton.jit
def _centred_and_dz(x, dy, mean, gain, offset, offsets, inside, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of x − mean and dz. Where there is no element, dz is zero."""
    centred = tl.load(x + offsets, inside, 0.0).to(tl.float32) - mean[None, :]
    dz = tl.load(dy + offsets, inside, 0.0).to(tl.float32)
    if SILU:
        z = centred * gain[None, :] + offset[None, :]
        sigmoid = tl.sigmoid(z)
        dz = dz * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    return centred, dz


@triton.jit(do_not_specialize=["pixels", "slabs", "slab_pixels", "scale_row", "shift_row"])
def _sums_kernel(  # type: ignore[no-untyped-def]
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    statistics,
    sums,
    pixels,
    slabs,
    slab_pixels,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
):
    """Σ dz (x − mean) and Σ dz of every slab: float32 `[N, slabs, 2, C]`."""
    sample, slab, start, stop, _, channel, real = _place(
        pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    x += sample * pixels * CHANNELS
    dy += sample * pixels * CHANNELS
    mean, _, _, gain, offset = _normaliser(
        statistics, weight, bias, scale, shift, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, CHANNELS, PER_GROUP, FILM,
    )  # fmt: skip
    a = tl.zeros((ROWS, WIDTH), tl.float32)
    b = tl.zeros((ROWS, WIDTH), tl.float32)
    for pixel in range(start, stop, ROWS):
        offsets, inside = _tile(pixel, stop, channel, real, CHANNELS, ROWS, WIDE)
        centred, dz = _centred_and_dz(x, dy, mean, gain, offset, offsets, inside, SILU)
        a += dz * centred
        b += dz
    out = sums + slab * (2 * CHANNELS) + channel
    tl.store(out, tl.sum(a, 0), real)
    tl.store(out + CHANNELS, tl.sum(b, 0), real)


@triton.jit(do_not_specialize=["pixels", "slabs", "scale_row", "d_scale_row"])
def _combine_kernel(  # type: ignore[no-untyped-def]
    sums,
    weight,
    bias,
    scale,
    statistics,
    affine,
    c,
    d_scale,
    d_shift,
    pixels,
    slabs,
    scale_row,
    scale_column,
    d_scale_row,
    d_scale_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SLABS: tl.constexpr,
    FILM: tl.constexpr,
):
    """Each sample's terms of dγ and dβ `[N, 2, C]`, rstd times its c₁ and c₂, ds and dt.

    d_scale and d_shift have the same strides.
    """
    sample, _, _, _, chunk, channel, real = _place(
        pixels, 1, pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    a = tl.zeros((WIDTH,), tl.float32)
    b = tl.zeros((WIDTH,), tl.float32)
    STEP: tl.constexpr = min(SLABS, 8)
    for slab in range(0, slabs, STEP):
        index = slab + tl.arange(0, STEP)
        present = (index < slabs)[:, None] & real[None, :]
        partial = sums + (sample * slabs + index)[:, None] * (2 * CHANNELS) + channel[None, :]
        a += tl.sum(tl.load(partial, present, 0.0), 0)
        b += tl.sum(tl.load(partial + CHANNELS, present, 0.0), 0)
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    _, rest, rstd = _statistics_of(statistics, sample, channel // PER_GROUP, real, ALL_GROUPS)
    a = rstd * (a - rest * b)

    gain = tl.load(weight + channel, real, 0.0).to(tl.float32)
    factor = tl.full((WIDTH,), 1.0, tl.float32)
    if FILM:
        s = tl.load(scale + sample * scale_row + channel * scale_column, real, 0.0)
        factor += s.to(tl.float32)
        offset = tl.load(bias + channel, real, 0.0).to(tl.float32)
        out = sample * d_scale_row + channel * d_scale_column
        ds = gain * a + offset * b
        tl.store(d_scale + out, ds.to(d_scale.dtype.element_ty), real)
        tl.store(d_shift + out, b.to(d_shift.dtype.element_ty), real)
        gain = gain * factor
    out = affine + sample * (2 * CHANNELS) + channel
    tl.store(out, factor * a, real)
    tl.store(out + CHANNELS, factor * b, real)

    lane = tl.arange(0, GROUPS)
    group = chunk * CHUNK_GROUPS + lane
    exists = (lane < CHUNK_GROUPS) & (group < ALL_GROUPS)
    # Multiplied in the order of `_dx_kernel`, so that of a group of one element nothing is left.
    gain = gain * rstd
    size = pixels.to(tl.float32) * PER_GROUP
    out = c + sample * (2 * ALL_GROUPS) + group
    tl.store(out, _sum_groups(gain * a, PER_GROUP, WIDTH, GROUPS) / size, exists)
    tl.store(out + ALL_GROUPS, _sum_groups(gain * b, PER_GROUP, WIDTH, GROUPS) / size, exists)


@triton.jit(do_not_specialize=["pixels", "slabs", "slab_pixels", "scale_row", "shift_row"])
def _dx_kernel(  # type: ignore[no-untyped-def]
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    statistics,
    c,
    dx,
    pixels,
    slabs,
    slab_pixels,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
):
    """From rstd c₁ and rstd c₂, `[N, 2, groups]`, to dx."""
    sample, _, start, stop, _, channel, real = _place(
        pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    x += sample * pixels * CHANNELS
    dy += sample * pixels * CHANNELS
    dx += sample * pixels * CHANNELS
    mean, rest, rstd, gain, offset = _normaliser(
        statistics, weight, bias, scale, shift, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, CHANNELS, PER_GROUP, FILM,
    )  # fmt: skip
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    c += sample * (2 * ALL_GROUPS) + channel // PER_GROUP
    # rstd (c₂ + x̂ c₁) is a line in x − mean.
    slope = rstd * tl.load(c, real, 0.0)
    intercept = tl.load(c + ALL_GROUPS, real, 0.0) - slope * rest
    for pixel in range(start, stop, ROWS):
        offsets, inside = _tile(pixel, stop, channel, real, CHANNELS, ROWS, WIDE)
        centred, dz = _centred_and_dz(x, dy, mean, gain, offset, offsets, inside, SILU)
        result = gain[None, :] * dz - (slope[None, :] * centred + intercept[None, :])
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), inside)


def _shape_arguments(x: Tensor, groups: int, plan: _Plan, tile: Tile) -> dict[str, int | bool]:
    """What all kernels over tiles of x take."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    return {
        "pixels": pixels,
        "slabs": plan.slabs,
        "slab_pixels": plan.slab_pixels,
        "CHANNELS": channels,
        "PER_GROUP": channels // groups,
        "CHUNK_GROUPS": plan.chunk_groups,
        "ROWS": plan.rows,
        "WIDTH": plan.width,
        # The last tile's offsets pass the sample's end before they are masked.
        "WIDE": (pixels + plan.rows) * channels + plan.width >= 2**31,
        **tile.options(),
    }


def _film_arguments(like: Tensor, scale: Tensor | None, shift: Tensor | None) -> dict[str, Any]:
    """Pointers and strides of scale and shift; `like` stands in for pointers that are not read."""
    if scale is None or shift is None:
        names = ("scale_row", "scale_column", "shift_row", "shift_column")
        return {"scale": like, "shift": like, **dict.fromkeys(names, 0)}
    return {
        "scale": scale,
        "shift": shift,
        "scale_row": scale.stride(0),
        "scale_column": scale.stride(1),
        "shift_row": shift.stride(0),
        "shift_column": shift.stride(1),
    }


def _groups_of_tile(channels: int, groups: int, plan: _Plan) -> int:
    """The power of two that a tile's groups are padded to; fills the tile exactly if it can."""
    return _power_of_two(max(plan.chunk_groups, plan.width // (channels // groups)))


def _launch_forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    tile = tile_for("group_norm_silu", x)
    plan = _plan(batch, channels, height * width, groups, tile.elements)
    shapes = _shape_arguments(x, groups, plan, tile)
    shapes["GROUPS"] = _groups_of_tile(channels, groups, plan)
    dense = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(dense, memory_format=torch.channels_last)
    statistics = torch.empty((batch, 3, groups), dtype=torch.float32, device=x.device)
    moments = statistics
    grid = (batch * plan.slabs * plan.chunks,)
    weight, bias = weight.contiguous(), bias.contiguous()
    with torch.cuda.device_of(x):
        if plan.slabs > 1:
            moments = statistics.new_empty((batch, plan.slabs, 3, groups))
            _moments_kernel[grid](dense, moments, **shapes)
        _forward_kernel[grid](
            x=dense,
            moments=moments,
            weight=weight,
            bias=bias,
            y=y,
            statistics=statistics,
            eps=eps,
            SLABS=_power_of_two(plan.slabs),
            FILM=scale is not None,
            SILU=activation == "silu",
            **_film_arguments(weight, scale, shift),
            **shapes,
        )
    return _laid_out_as(x, y), statistics


def _launch_backward(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    tile = tile_for("group_norm_silu_backward", x)
    plan = _plan(batch, channels, height * width, groups, tile.elements)
    shapes = _shape_arguments(x, groups, plan, tile)
    film = _film_arguments(weight, scale, shift)
    dense = x.contiguous(memory_format=torch.channels_last)
    dx = torch.empty_like(dense, memory_format=torch.channels_last)
    weight, bias, statistics = weight.contiguous(), bias.contiguous(), statistics.contiguous()
    tiles = {
        "dy": dy.contiguous(memory_format=torch.channels_last),
        "x": dense,
        "weight": weight,
        "bias": bias,
        "statistics": statistics,
        "FILM": scale is not None,
        "SILU": activation == "silu",
        **film,
        **shapes,
    }
    sums = statistics.new_empty((batch, plan.slabs, 2, channels))
    affine = statistics.new_empty((batch, 2, channels))
    c = statistics.new_empty((batch, 2, groups))
    d_scale = x.new_empty(0) if scale is None else torch.empty_like(scale)
    d_shift = torch.empty_like(d_scale)
    grid = (batch * plan.slabs * plan.chunks,)
    with torch.cuda.device_of(x):
        _sums_kernel[grid](sums=sums, **tiles)
        _combine_kernel[(batch * plan.chunks,)](
            sums,
            weight,
            bias,
            film["scale"],
            statistics,
            affine,
            c,
            d_scale,
            d_shift,
            height * width,
            plan.slabs,
            film["scale_row"],
            film["scale_column"],
            *(d_scale.stride() if scale is not None else (0, 0)),
            CHANNELS=channels,
            PER_GROUP=channels // groups,
            CHUNK_GROUPS=plan.chunk_groups,
            WIDTH=plan.width,
            GROUPS=_groups_of_tile(channels, groups, plan),
            SLABS=_power_of_two(plan.slabs),
            FILM=scale is not None,
            **tile.options(),
        )
        _dx_kernel[grid](c=c, dx=dx, **tiles)
    d_weight, d_bias = affine.sum(0).unbind()
    return (
        _laid_out_as(x, dx),
        d_weight.to(weight.dtype, copy=True),
        d_bias.to(bias.dtype, copy=True),
        d_scale,
        d_shift,
    )


def _takes_kernel(x: Tensor) -> bool:
    return runs_triton(x) and x.dtype != torch.float64 and x.numel() > 0


def _laid_out_as(x: Tensor, channels_last: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return channels_last
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(channels_last)


# --- The registered operations


@torch.library.custom_op("ddpm::group_norm_silu", mutates_args=())
def _forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Returns y and, for the backward pass, mean, its rest and rstd: `[N, 3, groups]`."""
    if _takes_kernel(x):
        return _launch_forward(x, groups, weight, bias, scale, shift, eps, activation)
    y, statistics = group_norm_silu_reference(
        x, groups, weight, bias, scale, shift, eps, activation
    )
    return y.contiguous(memory_format=_channels_last_if(x)), statistics


@_forward.register_fake
def _(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=_channels_last_if(x))
    return y, x.new_empty((x.shape[0], 3, groups), dtype=_compute_dtype(x))


@torch.library.custom_op("ddpm::group_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dγ, dβ, ds, dt; the last two are empty when there is no scale and shift."""
    if _takes_kernel(x):
        return _launch_backward(dy, x, groups, weight, bias, scale, shift, statistics, activation)
    dtype = _compute_dtype(x)
    channels = x.shape[1] // groups
    gain, offset = _affine(weight, bias, scale, shift, dtype)
    mean, rest, rstd = statistics.repeat_interleave(channels, dim=2).unbind(1)
    centred = x.to(dtype) - _per_pixel(mean)
    x_hat = torch.addcmul(_per_pixel(-rest * rstd), centred, _per_pixel(rstd))
    dz = dy.to(dtype)
    if activation == "silu":
        z = x_hat * _per_pixel(gain) + _per_pixel(offset)
        sigmoid = z.sigmoid()
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    a, b = (dz * x_hat).sum((2, 3)), dz.sum((2, 3))

    pixels = x.shape[2] * x.shape[3]
    c1, c2 = (
        _group_mean(gain * sums, groups, pixels).repeat_interleave(channels, dim=1)
        for sums in (a, b)
    )
    dx = _per_pixel(rstd) * (_per_pixel(gain) * dz - _per_pixel(c2) - x_hat * _per_pixel(c1))
    if scale is None:
        d_scale = d_shift = x.new_empty(0)
        d_weight, d_bias = a.sum(0), b.sum(0)
    else:
        factor = 1 + scale.to(dtype)
        d_scale = (weight.to(dtype) * a + bias.to(dtype) * b).to(scale.dtype)
        d_shift = b.to(scale.dtype)
        d_weight, d_bias = (factor * a).sum(0), (factor * b).sum(0)
    dx = dx.to(x.dtype).contiguous(memory_format=_channels_last_if(x))
    # An operation's outputs may not be one tensor, and without scale d_shift would be d_scale.
    return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_scale, d_shift.clone()


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_scale = x.new_empty(0) if scale is None else torch.empty_like(scale)
    return (
        torch.empty_like(x, memory_format=_channels_last_if(x)),
        torch.empty_like(weight),
        torch.empty_like(bias),
        d_scale,
        torch.empty_like(d_scale),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, scale, shift, _, ctx.activation = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, weight, bias, scale, shift, statistics)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, shift, statistics = ctx.saved_tensors
    dx, d_weight, d_bias, d_scale, d_shift = torch.ops.ddpm.group_norm_silu_backward(
        dy, x, ctx.groups, weight, bias, scale, shift, statistics, ctx.activation
    )
    if scale is None:
        d_scale = d_shift = None
    return dx, None, d_weight, d_bias, d_scale, d_shift, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
