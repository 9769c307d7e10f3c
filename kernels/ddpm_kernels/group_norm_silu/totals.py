"""The Triton function of the backward pass that sums what the others leave, over samples and slabs.

It comes last: one launch for the gradients of weight, bias, `before` and owed biases.
"""

from __future__ import annotations

from ddpm_kernels.triton_shim import tl, triton


@triton.jit
def _sum_rows(  # type: ignore[no-untyped-def]
    rows,
    count,
    channel,
    real,
    out,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
):
    """Sum LINE channels of rows that are STRIDE apart, ROWS at a time."""
    total = tl.zeros((ROWS, LINE), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        present = (row < count)[:, None] & real[None, :]
        terms = rows + row.to(tl.int64)[:, None] * STRIDE + channel[None, :]
        total += tl.load(terms, present, 0.0)
    tl.store(out + channel, tl.sum(total, 0).to(out.dtype.element_ty), real)


@triton.jit(do_not_specialize=["samples", "slabs"])
def totals_kernel(  # type: ignore[no-untyped-def]
    workspace,
    sums,
    d_weight,
    d_bias,
    d_before,
    owed,
    samples,
    slabs,
    CHANNELS: tl.constexpr,
    LINE: tl.constexpr,
    SAMPLES: tl.constexpr,
    OWED: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
):
    """Of LINE channels dγ and dβ, from the samples' terms, and with OWED the sum of all `sums`.

    With BY_SAMPLE, the programs beyond these sum those of one sample each.
    """
    LINES: tl.constexpr = tl.cdiv(CHANNELS, LINE)
    channel = tl.program_id(0) % LINES * LINE + tl.arange(0, LINE)
    real = channel < CHANNELS
    sample = tl.program_id(0) // LINES - 1
    if sample < 0:
        _sum_rows(workspace, samples, channel, real, d_weight, 2 * CHANNELS, SAMPLES, LINE)
        terms = workspace + CHANNELS
        _sum_rows(terms, samples, channel, real, d_bias, 2 * CHANNELS, SAMPLES, LINE)
        if OWED:
            _sum_rows(sums, samples * slabs, channel, real, owed, CHANNELS, SAMPLES, LINE)
    elif BY_SAMPLE:
        rows = sums + sample.to(tl.int64) * slabs * CHANNELS
        out = d_before + sample.to(tl.int64) * CHANNELS
        _sum_rows(rows, slabs, channel, real, out, CHANNELS, SAMPLES, LINE)
