"""The Triton function of a reverse step, and its launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of
from ddpm_kernels.philox import Stream, interleave4, normals4
from ddpm_kernels.reverse_step.columns import Column
from ddpm_kernels.tiles import Tile, tile_for
from ddpm_kernels.tiling import is_wide, layout_of, offsets_of, packed, strides_of, tile_of
from ddpm_kernels.triton_shim import tl, triton

# --- Triton

_X0_FROM_X = tl.constexpr(int(Column.X0_FROM_X))
_X0_FROM_OUTPUT = tl.constexpr(int(Column.X0_FROM_OUTPUT))
_X = tl.constexpr(int(Column.X))
_X0 = tl.constexpr(int(Column.X0))
_NOISE = tl.constexpr(int(Column.NOISE))
_GUIDANCE = tl.constexpr(int(Column.GUIDANCE))
_LOG_VARIANCE_MIN = tl.constexpr(int(Column.LOG_VARIANCE_MIN))
_LOG_VARIANCE_MAX = tl.constexpr(int(Column.LOG_VARIANCE_MAX))
_HISTORY = tl.constexpr(int(Column.HISTORY))
_STREAM = tl.constexpr(int(Stream.SAMPLER_NOISE))


@triton.jit
def _reverse_step_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    output_ptr,
    table_ptr,
    row_ptr,
    seed_ptr,
    sample_ids_ptr,
    unconditional_ptr,
    rescale_ptr,
    threshold_ptr,
    history_ptr,
    columns,
    x_b,
    x_c,
    x_h,
    x_w,
    output_b,
    output_c,
    output_h,
    output_w,
    output_variance,
    unconditional_b,
    unconditional_c,
    unconditional_h,
    unconditional_w,
    unconditional_variance,
    history_k,
    history_b,
    history_c,
    history_h,
    history_w,
    COUNT: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEARNED: tl.constexpr,
    SLOTS: tl.constexpr,
    CLIP: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    OUTPUT_LAYOUT: tl.constexpr,
    UNCONDITIONAL_LAYOUT: tl.constexpr,
    HISTORY_LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of consecutive elements of one sample; `plan` has the arguments."""
    sample, element, blocks, inside = tile_of(COUNT, TILE, WIDE)
    row = tl.load(row_ptr)
    coefficients = table_ptr + row * columns

    x_at = x_ptr + sample * x_b + offsets_of(element, x_c, x_h, x_w, CHANNELS, WIDTH, X_LAYOUT)
    x = tl.load(x_at, inside)
    output_at = (
        output_ptr
        + sample * output_b
        + offsets_of(element, output_c, output_h, output_w, CHANNELS, WIDTH, OUTPUT_LAYOUT)
    )
    output = tl.load(output_at, inside).to(tl.float32)
    if LEARNED:
        variance = tl.load(output_at + output_variance, inside).to(tl.float32)
    if unconditional_ptr is not None:
        guidance = tl.load(coefficients + _GUIDANCE).to(tl.float32)
        unconditional_at = (
            unconditional_ptr
            + sample * unconditional_b
            + offsets_of(
                element, unconditional_c, unconditional_h, unconditional_w,
                CHANNELS, WIDTH, UNCONDITIONAL_LAYOUT,
            )
        )  # fmt: skip
        unconditional = tl.load(unconditional_at, inside).to(tl.float32)
        output = unconditional + guidance * (output - unconditional)
        if LEARNED:
            unconditional = tl.load(unconditional_at + unconditional_variance, inside)
            unconditional = unconditional.to(tl.float32)
            variance = unconditional + guidance * (variance - unconditional)
    if rescale_ptr is not None:
        output *= tl.load(rescale_ptr + sample).to(tl.float32)

    x0 = x * tl.load(coefficients + _X0_FROM_X).to(tl.float32)
    x0 += output * tl.load(coefficients + _X0_FROM_OUTPUT).to(tl.float32)
    if threshold_ptr is not None:
        # clip(x̂_0, −s, s) / s, with one division a sample.
        x0 *= tl.div_rn(1.0, tl.load(threshold_ptr + sample).to(tl.float32))
    if CLIP:
        # A NaN stays one, as in the reference: a sampler that diverged must show it.
        x0 = tl.clamp(x0, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)

    # A GPU contracts these into fused multiply-adds: the last bit may differ from the reference's.
    new = x * tl.load(coefficients + _X).to(tl.float32)
    new += x0 * tl.load(coefficients + _X0).to(tl.float32)

    if SLOTS > 0:
        history_at = (
            history_ptr
            + sample * history_b
            + offsets_of(element, history_c, history_h, history_w, CHANNELS, WIDTH, HISTORY_LAYOUT)
        )
        earlier_at = history_at
        for slot in tl.static_range(SLOTS):
            weight = tl.load(coefficients + _HISTORY + slot).to(tl.float32)
            new += weight * tl.load(earlier_at, inside)
            earlier_at += history_k

    scale = tl.load(coefficients + _NOISE).to(tl.float32)
    if scale != 0.0:
        seed = tl.load(seed_ptr)
        n0, n1, n2, n3 = normals4(seed, blocks, row, tl.load(sample_ids_ptr + sample), _STREAM)
        noise = interleave4(n0, n1, n2, n3) * scale
        if LEARNED:
            # ½ (f · max + (1 − f) · min) is linear in the output; ¼ log₂ e makes it a power of two.
            low = tl.load(coefficients + _LOG_VARIANCE_MIN).to(tl.float32)
            high = tl.load(coefficients + _LOG_VARIANCE_MAX).to(tl.float32)
            exponent = variance * ((high - low) * 0.36067376) + (high + low) * 0.36067376
            noise *= tl.exp2(exponent)
        new += noise

    if SLOTS > 0:
        # Another thread may be the one that reads what this one overwrites.
        tl.debug_barrier()
        tl.store(history_at + row % SLOTS * history_k, x0, inside)
    tl.store(x_at, new, inside)


# --- Launcher


Layout = tuple[torch.Size, tuple[int, ...]]
"""Shape and strides of a tensor."""


class Plan(NamedTuple):
    """All that a launch needs to know of its tensors besides where they are."""

    programs: int
    integers: tuple[int, ...]
    """The kernel's arguments that are no pointers."""
    constants: dict[str, Any]
    """Its constants, and the compiler's options."""


@lru_cache(maxsize=1024)
def plan(
    tile: Tile,
    clip: bool,
    x: Layout,
    output: Layout,
    table: Layout,
    sample_ids: Layout,
    unconditional: Layout | None,
    rescale: Layout | None,
    threshold: Layout | None,
    history: Layout | None,
) -> Plan:
    """Plan a launch; a sampler's steps are all of the same layouts.

    Raises:
        ValueError: the kernel would read past the end of a tensor.
    """
    shape = x[0]
    batch, channels, *pixels = shape
    slots = 0 if history is None else history[0][0]
    learned = output[0][1] == 2 * channels
    outputs = (batch, 2 * channels if learned else channels, *pixels)
    for name, layout, expected in (
        ("output", output, outputs),
        ("unconditional", unconditional, outputs),
        ("sample_ids", sample_ids, (batch,)),
        ("rescale", rescale, (batch,)),
        ("threshold", threshold, (batch,)),
        ("history", history, (slots, *shape)),
    ):
        if layout is not None and layout[0] != expected:
            raise ValueError(f"{name} is {list(layout[0])}, not {list(expected)}")
    columns = table[0][-1] if len(table[0]) == 2 else 0
    if columns < Column.HISTORY + slots or (history is not None and slots == 0):
        raise ValueError(
            f"table is {list(table[0])}, not [S, {Column.HISTORY + slots}] or wider, for "
            f"{slots} slots of history"
        )

    count = shape[1:].numel()
    tile = tile.fitted(max(count, 1))
    x_like, output_like, unconditional_like, history_like = (
        None if layout is None else torch.empty_strided(*layout, device="meta")
        for layout in (x, output, unconditional, history)
    )
    assert x_like is not None
    assert output_like is not None
    integers = (
        columns,
        *strides_of(x_like),
        *strides_of(output_like), channels * output_like.stride(1),
        *strides_of(unconditional_like),
        0 if unconditional_like is None else channels * unconditional_like.stride(1),
        0 if history_like is None else history_like.stride(0),
        *strides_of(history_like),
    )  # fmt: skip
    constants = {
        "COUNT": count,
        "CHANNELS": channels,
        "WIDTH": shape[3],
        "LEARNED": learned,
        "SLOTS": slots,
        "CLIP": clip or threshold is not None,
        "X_LAYOUT": layout_of(x_like, channels),
        "OUTPUT_LAYOUT": layout_of(output_like, channels),
        "UNCONDITIONAL_LAYOUT": layout_of(unconditional_like, channels),
        "HISTORY_LAYOUT": layout_of(history_like, channels),
        "WIDE": is_wide(tile.elements, x_like, output_like, unconditional_like, history_like),
        "TILE": tile.elements,
        **tile.options(),
    }
    return Plan(batch * -(-count // tile.elements), integers, constants)


def _layout(tensor: Tensor | None) -> Layout | None:
    return None if tensor is None else (tensor.shape, tensor.stride())


def launch_reverse_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    unconditional: Tensor | None,
    rescale: Tensor | None,
    threshold: Tensor | None,
    history: Tensor | None,
    clip: bool,
) -> None:
    """Launch a step of a float32 state of any strides; see `reverse_step_reference_`."""
    if history is not None and history.dtype != x.dtype:
        raise ValueError("history needs the dtype of x")
    planned = plan(
        tile_for("reverse_step", x), clip, (x.shape, x.stride()), (output.shape, output.stride()),
        (table.shape, table.stride()), (sample_ids.shape, sample_ids.stride()),
        _layout(unconditional), _layout(rescale), _layout(threshold), _layout(history),
    )  # fmt: skip
    if planned.programs == 0:
        return
    with on_device_of(x):
        _reverse_step_kernel[(planned.programs,)](
            x,
            output,
            table.contiguous(),
            row,
            seed,
            packed(sample_ids),
            unconditional,
            packed(rescale),
            packed(threshold),
            history,
            *planned.integers,
            **planned.constants,
        )
