"""One step of the reverse process for every sampler: x_t → x_{t-1} by a row of coefficients.

A sampler is a table. Row i holds the float64-derived numbers of step i (`Column`), and the step is

    m    = u + guidance · (c − u)                    c, u: conditional, unconditional output
    m    = m · rescale                               per sample, if given
    x̂_0  = x0_from_x · x + x0_from_output · m
    x̂_0  = clip(x̂_0, −1, 1)                          or clip(x̂_0, −s, s) / s with a threshold s
    x'   = x · x + x0 · x̂_0 + Σ_k history_k · h_k + noise · z

where the words on the right are the row's columns, h_k is slot k of a ring of earlier x̂_0, and z
is standard normal, drawn inside with the row number as the counter's step. The new x̂_0 is written
to slot (row mod slots) after the ring is read. The first two columns hold what the network predicts
(ε, x_0, v), so the loop need not know it.

With a network that also predicts its variance (2C output channels), the second half v ∈ [-1, 1]
interpolates the log-variance between two columns (Nichol & Dhariwal 2021, equation 15),

    noise scale = noise · exp(½ (f · log_variance_max + (1 − f) · log_variance_min))
    f = (v + 1) / 2

and the noise column is 1, or 0 where a step adds none.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of, runs_triton, skips_dispatcher, takes_op
from ddpm_kernels.philox import Stream, gaussian_noise, interleave4, normals4
from ddpm_kernels.tiles import Tile, tile_for
from ddpm_kernels.tiling import (
    as_scalar,
    is_wide,
    layout_of,
    offsets_of,
    packed,
    strides_of,
    tile_of,
)
from ddpm_kernels.triton_shim import tl, triton


class Column(IntEnum):
    """Columns of a coefficient table; those of the history ring follow from `HISTORY` on."""

    X0_FROM_X = 0
    X0_FROM_OUTPUT = 1
    X = 2
    X0 = 3
    NOISE = 4
    GUIDANCE = 5
    LOG_VARIANCE_MIN = 6
    LOG_VARIANCE_MAX = 7
    HISTORY = 8


def reverse_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,
    unconditional: Tensor | None = None,
    rescale: Tensor | None = None,
    threshold: Tensor | None = None,
    history: Tensor | None = None,
    clip: bool = True,
    in_place: bool = False,
) -> Tensor:
    """Advance the state by one step.

    Args:
        x: `[B, C, H, W]` float32 (or float64), channels-last: the state.
        output: `[B, C, H, W]`, or `[B, 2C, H, W]` with a predicted variance; any float dtype.
        table: float32 (or float64) `[S, Column.HISTORY + K]`.
        row: 0-dim int64 tensor in [0, S): a device value, so that a captured graph can advance it.
        seed: 64-bit integer, or 0-dim int64 tensor.
        sample_ids: int64 `[B]`.
        unconditional: the output for the null class, shaped as `output`, if guided.
        rescale: `[B]` factor on the guided output (Lin et al. 2023), or None.
        threshold: `[B]` dynamic threshold ≥ 1 (Saharia et al. 2022), or None.
        history: `[K, B, C, H, W]` ring of earlier x̂_0 in the dtype of `x`, or None; updated.
        clip: clip x̂_0 to [-1, 1]; a threshold takes precedence.
        in_place: overwrite `x`.

    Returns:
        The new state, shaped as `x`; `x` itself if `in_place`.
    """
    x = x if in_place else x.clone()
    call: Callable[..., None] = reverse_step_reference_
    if takes_op(x):
        differentiable = x.requires_grad or output.requires_grad  # which the operation refuses
        direct = skips_dispatcher(x) and not differentiable
        call = _reverse_step if direct else torch.ops.ddpm.reverse_step_.default
    call(
        x, output, table, row, as_scalar(seed, x.device), sample_ids, unconditional, rescale,
        threshold, history, clip,
    )  # fmt: skip
    return x


# --- Reference


def reverse_step_reference_(
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
    """Compute what `reverse_step` specifies in place, in the precision of the state."""
    coefficients = table.index_select(0, row.reshape(1))[0].to(x.dtype)

    def per_sample(value: Tensor) -> Tensor:
        return value.to(x.dtype)[:, None, None, None]

    output = output.to(x.dtype)
    if unconditional is not None:
        unconditional = unconditional.to(x.dtype)
        output = unconditional + coefficients[Column.GUIDANCE] * (output - unconditional)
    output, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
    if rescale is not None:
        output = output * per_sample(rescale)

    x0 = coefficients[Column.X0_FROM_X] * x + coefficients[Column.X0_FROM_OUTPUT] * output
    if threshold is not None:
        bound = per_sample(threshold)
        x0 = torch.minimum(torch.maximum(x0, -bound), bound) / bound
    elif clip:
        x0 = x0.clamp(-1, 1)

    new = coefficients[Column.X] * x + coefficients[Column.X0] * x0
    noise_scale = coefficients[Column.NOISE]
    # On a CPU the scale can be read before generating noise; elsewhere that would synchronize.
    may_read = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not may_read or noise_scale != 0:
        image = (x.shape[1], x.shape[2], x.shape[3])
        noise = gaussian_noise(seed, sample_ids, image, row, Stream.SAMPLER_NOISE)
        if variance.shape[1]:
            fraction = (variance + 1) / 2
            log_variance = (
                fraction * coefficients[Column.LOG_VARIANCE_MAX]
                + (1 - fraction) * coefficients[Column.LOG_VARIANCE_MIN]
            )
            noise_scale = noise_scale * (0.5 * log_variance).exp()
        new = new + noise_scale * noise.to(x.dtype)
    if history is not None:
        slots = history.shape[0]
        weights = coefficients[Column.HISTORY : Column.HISTORY + slots]
        new = new + (weights[:, None, None, None, None] * history).sum(0)
        history.index_copy_(0, (row % slots).reshape(1), x0[None])
    x.copy_(new)


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
    """One tile of consecutive elements of one sample; see `_launch` for the arguments."""
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


def _launch(
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
    """Launch the kernel on a float32 state of any strides."""
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


# --- Registration


def _reverse_step(x: Tensor, *rest: Any) -> None:
    kernel = runs_triton(x) and x.dtype == torch.float32
    (_launch if kernel else reverse_step_reference_)(x, *rest)


_op = torch.library.custom_op(
    "ddpm::reverse_step_",
    _reverse_step,
    mutates_args=("x", "history"),
    schema=torch.library.infer_schema(reverse_step_reference_, mutates_args=("x", "history")),
)


@_op.register_fake
def _(*_: Any) -> None:
    return None
