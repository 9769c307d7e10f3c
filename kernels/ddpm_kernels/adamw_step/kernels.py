"""The Triton functions of `adamw_step` and `gradient_norm`."""

from __future__ import annotations

from ddpm_kernels.triton_shim import tl, triton


@triton.jit
def _piece(  # type: ignore[no-untyped-def]
    row, addresses, GRADIENT: tl.constexpr, ALIGNMENT: tl.constexpr
):
    """Find a program's piece of a gradient.

    Args:
        row: pointer to its row of a `Share`.
        addresses: of the gradients.
        GRADIENT: dtype of the gradients.
        ALIGNMENT: as in `Share`.

    Returns:
        Pointer to its first element, its place in the flat buffers, and its elements.
    """
    # An offset from a gradient's address is in elements, so it may pass 2³¹ and is int64.
    BYTES: tl.constexpr = ALIGNMENT * GRADIENT.primitive_bitwidth // 8
    address = tl.load(addresses + tl.load(row)).to(tl.pointer_type(GRADIENT))
    gradient = tl.multiple_of(address, BYTES if BYTES < 16 else 16)
    gradient += tl.multiple_of(tl.load(row + 1), ALIGNMENT)
    return gradient, tl.multiple_of(tl.load(row + 2), ALIGNMENT), tl.load(row + 3)


# --- The norm


@triton.jit
def squares_kernel(  # type: ignore[no-untyped-def]
    addresses,
    rows,
    count,
    sums,
    GRADIENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum the squares of every n-th tile of a share, of n programs; `count` rows in all."""
    program = tl.program_id(0)
    elements = tl.arange(0, TILE)
    squares = tl.zeros((TILE,), tl.float32)
    for index in range(program, count, tl.num_programs(0)):
        row = rows + index * 4
        gradient, _, inside = _piece(row, addresses, GRADIENT, ALIGNMENT)
        if inside == TILE:
            values = tl.load(gradient + elements).to(tl.float32)
        else:
            values = tl.load(gradient + elements, elements < inside, 0).to(tl.float32)
        squares += values * values
    tl.store(sums + program, tl.sum(squares))


@triton.jit
def root_kernel(  # type: ignore[no-untyped-def]
    sums, norm, COUNT: tl.constexpr, PADDED: tl.constexpr
):
    """Write the root of the sum of COUNT sums; PADDED is a power of two no smaller."""
    index = tl.arange(0, PADDED)
    total = tl.sum(tl.load(sums + index, index < COUNT, 0))
    tl.store(norm, tl.sqrt_rn(total))


# --- The step


@triton.jit
def begin_kernel(  # type: ignore[no-untyped-def]
    step,
    learning_rate,
    gradient_scale,
    skip,
    numbers,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
):
    """Count an update, and derive the numbers that all weights share: float32 `[4]`."""
    t = tl.load(step) + 1
    # 1 − βᵗ cancels where t is small: in float64 the digits that are left are enough.
    correction1 = 1 - tl.exp(t.to(tl.float64) * LOG_BETA1)
    correction2 = 1 - tl.exp(t.to(tl.float64) * LOG_BETA2)
    rate = tl.load(learning_rate).to(tl.float64)
    tl.store(numbers, (rate / correction1).to(tl.float32))
    tl.store(numbers + 1, (1 / tl.sqrt(correction2)).to(tl.float32))
    tl.store(numbers + 2, (rate * WEIGHT_DECAY).to(tl.float32))
    tl.store(numbers + 3, (1 / tl.load(gradient_scale).to(tl.float64)).to(tl.float32))
    if tl.load(skip) == 0:
        tl.store(step, t)


@triton.jit
def _lerp(start, end, weight):  # type: ignore[no-untyped-def]
    """start + weight · (end − start), which at weight 1 is `end` to the bit, as torch's is."""
    way = end - start
    return tl.where(weight < 0.5, start + weight * way, end - (1 - weight) * way)


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    elements,
    inside,
    gradient,
    weights,
    exp_avg,
    exp_avg_sq,
    averages,
    average_stride,
    shadow,
    in_shadow,
    numbers,
    ema_weights,
    WEIGHT1: tl.constexpr,
    WEIGHT2: tl.constexpr,
    EPS: tl.constexpr,
    AVERAGES: tl.constexpr,
):
    """Update one tile; pointers are to its first element, `inside` is its mask or None."""
    g = tl.load(gradient + elements, inside).to(tl.float32) * tl.load(numbers + 3)
    w = tl.load(weights + elements, inside)
    m = _lerp(tl.load(exp_avg + elements, inside), g, WEIGHT1)
    v = _lerp(tl.load(exp_avg_sq + elements, inside), g * g, WEIGHT2)
    # The last bits of an update that is small beside the weight: fast root and division do.
    update = tl.load(numbers) * m / (tl.sqrt(v) * tl.load(numbers + 1) + EPS)
    w -= tl.load(numbers + 2) * w + update
    # The other stores come after the loads of the averages, which need not wait for them.
    for k in tl.static_range(AVERAGES):
        a = tl.load(averages + elements, inside)
        tl.store(averages + elements, _lerp(a, w, tl.load(ema_weights + k)), inside)
        averages += average_stride
    tl.store(weights + elements, w, inside)
    tl.store(exp_avg + elements, m, inside)
    tl.store(exp_avg_sq + elements, v, inside)
    if shadow is not None:  # noqa: SIM102 (known to the compiler, unlike the other)
        if in_shadow:
            tl.store(shadow + elements, w.to(shadow.dtype.element_ty), inside)


@triton.jit
def update_kernel(  # type: ignore[no-untyped-def]
    addresses,
    rows,
    weights,
    exp_avg,
    exp_avg_sq,
    averages,
    average_stride,
    shadow,
    shadow_size,
    numbers,
    ema_weights,
    skip,
    WEIGHT1: tl.constexpr,
    WEIGHT2: tl.constexpr,
    EPS: tl.constexpr,
    AVERAGES: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Update one tile of a share, unless the step is skipped; see `adamw_step`."""
    if tl.load(skip) != 0:
        return
    row = rows + tl.program_id(0) * 4
    gradient, place, count = _piece(row, addresses, GRADIENT, ALIGNMENT)
    elements = tl.arange(0, TILE)
    weights += place
    exp_avg += place
    exp_avg_sq += place
    averages += place
    in_shadow = False
    if shadow is not None:
        in_shadow = place < shadow_size
        shadow += place
    # A mask would make accesses narrow: only a segment's last tile has one.
    if count == TILE:
        _update(
            elements, None, gradient, weights, exp_avg, exp_avg_sq, averages, average_stride,
            shadow, in_shadow, numbers, ema_weights, WEIGHT1, WEIGHT2, EPS, AVERAGES,
        )  # fmt: skip
    else:
        _update(
            elements, elements < count, gradient, weights, exp_avg, exp_avg_sq, averages,
            average_stride, shadow, in_shadow, numbers, ema_weights, WEIGHT1, WEIGHT2, EPS,
            AVERAGES,
        )  # fmt: skip
