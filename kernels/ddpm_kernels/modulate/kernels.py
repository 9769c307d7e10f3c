"""The Triton functions.

A program takes consecutive tokens of one sample, all channels of a few of them at a time: every
mean over channels is taken of what is in registers. What the backward pass sums over tokens it
leaves as one row of float32 `[3, C]` for each program, which a small launch adds.
"""

from __future__ import annotations

from ddpm_kernels.triton_shim import tl, triton


@triton.jit
def _tokens_of(program, length, blocks, block_tokens):  # type: ignore[no-untyped-def]
    """A program's sample, first token and last token + 1."""
    sample = (program.to(tl.uint32) // blocks.to(tl.uint32)).to(tl.int32)  # the cheaper division
    first = (program - sample * blocks) * block_tokens
    return sample.to(tl.int64), first, tl.minimum(first + block_tokens, length)


@triton.jit
def _place_of(  # type: ignore[no-untyped-def]
    sample, token, stop, length, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Offset of the first of ROWS tokens, of its tile's elements from there, and which exist."""
    row, channel = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row < stop - token)[:, None] & (channel < CHANNELS)[None, :]
    return (sample * length + token) * CHANNELS, row[:, None] * CHANNELS + channel[None, :], inside


@triton.jit
def _gain_of(  # type: ignore[no-untyped-def]
    scale, weight, channel, real, WEIGHTED: tl.constexpr
):
    """1 + s of some channels of a sample, and that times the norm's weight."""
    factor = 1.0 + tl.load(scale + channel, real, 0.0).to(tl.float32)
    gain = factor
    if WEIGHTED:
        gain = factor * tl.load(weight + channel, real, 0.0).to(tl.float32)
    return factor, gain


@triton.jit
def _normalised(r, inside, eps, CHANNELS: tl.constexpr, LAYER: tl.constexpr):  # type: ignore[no-untyped-def]
    """x̂ of a tile of tokens, and the factor that r was multiplied by: see `op`.

    Where there is no element r is zero, and x̂ is finite.
    """
    if LAYER:
        mean = tl.sum(r, 1) / CHANNELS
        r = tl.where(inside, r - mean[:, None], 0.0)
        # The mean's rounding is large beside a small deviation: take off what it left.
        rest = tl.sum(r, 1) / CHANNELS
        variance = tl.maximum(tl.sum(r * r, 1) / CHANNELS - rest * rest, 0.0)
        r = r - rest[:, None]
    else:
        variance = tl.sum(r * r, 1) / CHANNELS
    factor = tl.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32)))
    return r * factor[:, None], factor


@triton.jit(do_not_specialize=["length", "blocks", "block_tokens"])
def modulate_kernel(  # type: ignore[no-untyped-def]
    x,
    y,
    gate,
    scale,
    shift,
    weight,
    r,
    m,
    length,
    blocks,
    block_tokens,
    gate_row,
    scale_row,
    shift_row,
    eps,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LAYER: tl.constexpr,
):
    """From x and y to r and m; not GATED, from x to m."""
    sample, first, stop = _tokens_of(tl.program_id(0), length, blocks, block_tokens)
    channel = tl.arange(0, WIDTH)
    real = channel < CHANNELS
    gain = _gain_of(scale + sample * scale_row, weight, channel, real, WEIGHTED)[1]
    offset = tl.load(shift + sample * shift_row + channel, real, 0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + sample * gate_row + channel, real, 0.0).to(tl.float32)
    for token in tl.range(first, stop, ROWS, num_stages=STAGES):
        at, offsets, inside = _place_of(sample, token, stop, length, CHANNELS, ROWS, WIDTH)
        tile = tl.load(x + at + offsets, inside, 0.0).to(tl.float32)
        if GATED:
            branch = tl.load(y + at + offsets, inside, 0.0).to(tl.float32)
            stored = (tile + g[None, :] * branch).to(r.dtype.element_ty)
            tl.store(r + at + offsets, stored, inside)
            tile = stored.to(tl.float32)
        x_hat = _normalised(tile, inside, eps, CHANNELS, LAYER)[0]
        result = x_hat * gain[None, :] + offset[None, :]
        tl.store(m + at + offsets, result.to(m.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["length", "blocks", "block_tokens"])
def modulate_backward_kernel(  # type: ignore[no-untyped-def]
    dr,
    dm,
    r,
    y,
    gate,
    scale,
    weight,
    dx,
    dy,
    partials,
    length,
    blocks,
    block_tokens,
    gate_row,
    scale_row,
    eps,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LAYER: tl.constexpr,
):
    """From dr (if RESIDUAL) and dm to dx and dy, and Σ dm x̂, Σ dm and Σ dx y of the tokens."""
    sample, first, stop = _tokens_of(tl.program_id(0), length, blocks, block_tokens)
    channel = tl.arange(0, WIDTH)
    real = channel < CHANNELS
    gain = _gain_of(scale + sample * scale_row, weight, channel, real, WEIGHTED)[1]
    if GATED:
        g = tl.load(gate + sample * gate_row + channel, real, 0.0).to(tl.float32)
    along = tl.zeros((ROWS, WIDTH), tl.float32)
    plain = tl.zeros((ROWS, WIDTH), tl.float32)
    gated = tl.zeros((ROWS, WIDTH), tl.float32)
    for token in tl.range(first, stop, ROWS, num_stages=STAGES):
        at, offsets, inside = _place_of(sample, token, stop, length, CHANNELS, ROWS, WIDTH)
        # All loads before the sums over channels, at which a program waits.
        tile = tl.load(r + at + offsets, inside, 0.0).to(tl.float32)
        gradient = tl.load(dm + at + offsets, inside, 0.0).to(tl.float32)
        if RESIDUAL:
            residual = tl.load(dr + at + offsets, inside, 0.0)
        if GATED:
            branch = tl.load(y + at + offsets, inside, 0.0)
        x_hat, factor = _normalised(tile, inside, eps, CHANNELS, LAYER)
        along += gradient * x_hat
        plain += gradient
        gradient = gradient * gain[None, :]
        slope = tl.sum(gradient * x_hat, 1) / CHANNELS
        total = gradient - x_hat * slope[:, None]
        if LAYER:
            total -= (tl.sum(gradient, 1) / CHANNELS)[:, None]
        total = total * factor[:, None]
        if RESIDUAL:
            total += residual.to(tl.float32)
        tl.store(dx + at + offsets, total.to(dx.dtype.element_ty), inside)
        if GATED:
            gated += total * branch.to(tl.float32)
            tl.store(dy + at + offsets, (total * g[None, :]).to(dy.dtype.element_ty), inside)
    partials += tl.program_id(0).to(tl.int64) * (3 * CHANNELS)
    tl.store(partials + channel, tl.sum(along, 0), real)
    tl.store(partials + CHANNELS + channel, tl.sum(plain, 0), real)
    if GATED:
        tl.store(partials + 2 * CHANNELS + channel, tl.sum(gated, 0), real)


@triton.jit(do_not_specialize=["blocks"])
def modulate_sums_kernel(  # type: ignore[no-untyped-def]
    partials,
    scale,
    weight,
    d_gate,
    d_scale,
    d_shift,
    d_weight,
    blocks,
    scale_row,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LINE: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Add a sample's blocks, BLOCKS at a time, of LINE channels; d_weight is the sample's term."""
    CHUNKS: tl.constexpr = tl.cdiv(CHANNELS, LINE)
    sample = (tl.program_id(0) // CHUNKS).to(tl.int64)
    channel = tl.program_id(0) % CHUNKS * LINE + tl.arange(0, LINE)
    real = channel < CHANNELS
    along = tl.zeros((LINE,), tl.float32)
    plain = tl.zeros((LINE,), tl.float32)
    gated = tl.zeros((LINE,), tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        present = (block < blocks)[:, None] & real[None, :]
        partial = partials + (sample * blocks + block)[:, None] * (3 * CHANNELS) + channel[None, :]
        along += tl.sum(tl.load(partial, present, 0.0), 0)
        plain += tl.sum(tl.load(partial + CHANNELS, present, 0.0), 0)
        if GATED:
            gated += tl.sum(tl.load(partial + 2 * CHANNELS, present, 0.0), 0)
    out = sample * CHANNELS + channel
    d_s = along
    if WEIGHTED:
        d_s = along * tl.load(weight + channel, real, 0.0).to(tl.float32)
        factor = _gain_of(scale + sample * scale_row, weight, channel, real, False)[0]
        tl.store(d_weight + out, factor * along, real)
    tl.store(d_scale + out, d_s.to(d_scale.dtype.element_ty), real)
    tl.store(d_shift + out, plain.to(d_shift.dtype.element_ty), real)
    if GATED:
        tl.store(d_gate + out, gated.to(d_gate.dtype.element_ty), real)
