"""What the Triton functions of both passes share: a program's part of the tensor, and its groups.

Memory is channels-last, `[N, pixels, C]`; of the channels the last SKIP may lie in a tensor of
their own. A program takes one sample, one slab of consecutive pixels and one chunk of whole groups
(`Plan`), so that its rows are contiguous and it alone writes its partial sums.
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
def offsets_at(  # type: ignore[no-untyped-def]
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
def tile_at(  # type: ignore[no-untyped-def]
    x,
    skip,
    first,
    stop,
    channel,
    real,
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Pointers to ROWS pixels' channels of x ⧺ skip, and which of them exist.

    x and skip point to pixel 0. Channels of both may be in one tile.
    """
    if SKIP:
        OWN: tl.constexpr = CHANNELS - SKIP
        own = channel < OWN
        column = tl.where(own, x + channel, skip + (channel - OWN))
        stride = tl.where(own, OWN, SKIP)
        pixel = first + tl.arange(0, ROWS)
        inside = (pixel < stop)[:, None] & real[None, :]
        if WIDE:
            pixel = pixel.to(tl.int64)
        pointers = column[None, :] + pixel[:, None] * stride[None, :]
    else:
        offsets, inside = offsets_at(first, stop, channel, real, CHANNELS, ROWS, WIDE)
        pointers = x + offsets
    return pointers, inside


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    x,
    skip,
    first,
    stop,
    channel,
    real,
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The elements at `tile_at`, as they are stored; zero where there is none."""
    pointers, inside = tile_at(x, skip, first, stop, channel, real, CHANNELS, SKIP, ROWS, WIDE)
    return tl.load(pointers, inside, 0.0)


@triton.jit
def at_pixel(tensor, pixel, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """`tensor` of so many channels from an int64 pixel on; itself, None, if it has no channels."""
    if CHANNELS:
        tensor += pixel * CHANNELS
    return tensor


@triton.jit
def two_sum(a, b):  # type: ignore[no-untyped-def]
    """a + b, and what its rounding lost. Knuth, TAOCP volume 2, theorem 4.2.2B."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def load_rows(tensor, sample, channel, real, row, column):  # type: ignore[no-untyped-def]
    """One sample's channels of a `[N, C]` tensor of any strides, in float32."""
    return tl.load(tensor + sample * row + channel * column, real, 0.0).to(tl.float32)


@triton.jit
def centre_of(  # type: ignore[no-untyped-def]
    mean,
    rest,
    before,
    sample,
    channel,
    real,
    before_row,
    before_column,
    BEFORE: tl.constexpr,
):
    """What is to be taken off each channel of x, in two parts: u − mean = x − (mean − before)."""
    if BEFORE:
        added = load_rows(before, sample, channel, real, before_row, before_column)
        mean, lost = two_sum(mean, -added)
        rest = rest + lost
    return mean, rest


@triton.jit
def sigmoid_of(z, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """σ(z); if not EXACT, to some 10⁻⁶, which in half precision is nothing, without a division."""
    if EXACT:
        sigmoid = tl.sigmoid(z)
    else:
        root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
        sigmoid = root * root
    return sigmoid


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
        factor = 1.0 + load_rows(scale, sample, channel, real, scale_row, scale_column)
        added = load_rows(shift, sample, channel, real, shift_row, shift_column)
        gain, offset = gain * factor, offset * factor + added
    return gain, offset
