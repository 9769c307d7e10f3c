"""What the Triton functions of both passes share: a program's part of the tensor, and its groups.

Memory is channels-last, `[N, pixels, C]`. A program takes one sample, one slab of consecutive
pixels and one chunk of whole groups (`Plan`), so that its rows are contiguous and it alone writes
its partial sums.
"""

from __future__ import annotations

from ddpm_kernels.triton_shim import tl, triton


@triton.jit
def place_of(  # type: ignore[no-untyped-def]
    program,
    pixels,
    slabs,
    slab_pixels,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program's sample, slab, first pixel, last pixel + 1, chunk, channels and their mask.

    The slab is counted through all samples: of the program's index alone, so that what is written
    after a loop keeps nothing else in registers meanwhile.
    """
    CHUNKS: tl.constexpr = tl.cdiv(CHANNELS, CHUNK_GROUPS * PER_GROUP)
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
def last_first():  # type: ignore[no-untyped-def]
    """This program's number, counted from the last.

    A launch that reads what another has just read begins where that ended: the cache still has it.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def tile_at(  # type: ignore[no-untyped-def]
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
def sum_groups(values, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """From channels `[WIDTH]`, zero where there is none, to groups `[GROUPS]`."""
    if GROUPS * PER_GROUP == WIDTH:
        sums = tl.sum(tl.reshape(values, (GROUPS, PER_GROUP)), 1)
    else:
        group = tl.arange(0, WIDTH) // PER_GROUP
        member = group[:, None] == tl.arange(0, GROUPS)[None, :]
        sums = tl.sum(tl.where(member, values[:, None], 0.0), 0)
    return sums


@triton.jit
def spread_groups(values, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """From groups `[GROUPS]` to their channels `[WIDTH]`."""
    if GROUPS * PER_GROUP == WIDTH:
        spread = tl.reshape(tl.broadcast_to(values[:, None], (GROUPS, PER_GROUP)), (WIDTH,))
    else:
        group = tl.arange(0, WIDTH) // PER_GROUP
        member = group[:, None] == tl.arange(0, GROUPS)[None, :]
        spread = tl.sum(tl.where(member, values[None, :], 0.0), 1)
    return spread


@triton.jit
def affine_of(  # type: ignore[no-untyped-def]
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
    """Gain and offset of one sample's channels, before normalisation: see `op`."""
    gain = tl.load(weight + channel, real, 0.0).to(tl.float32)
    offset = tl.load(bias + channel, real, 0.0).to(tl.float32)
    if FILM:
        s = tl.load(scale + sample * scale_row + channel * scale_column, real, 0.0)
        t = tl.load(shift + sample * shift_row + channel * shift_column, real, 0.0)
        factor = 1.0 + s.to(tl.float32)
        gain, offset = gain * factor, offset * factor + t.to(tl.float32)
    return gain, offset
