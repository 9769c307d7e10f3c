"""The weighted squared error between a prediction and its target, and its gradient.

    L_b = w_b · mean over pixels and channels of e²,        e = prediction − target
    ∂L_b / ∂prediction = 2 w_b e / (C H W)

with the target ε, x_0, or v = sqrt(ᾱ_t) ε − sqrt(1 − ᾱ_t) x_0. The noise that made x_t is drawn a
second time from the counter map; it is never passed in. With w = 1 and target ε this is L_simple.

**Learned variance.** A network of 2C output channels predicts, in the second half r ∈ [-1, 1],
where the log-variance of the reverse step lies between two numbers of its timestep, and the loss
gains the term of the variational bound,

    L_b = w_b · mean(e²) + λ_b · mean(ℓ)
    log σ² = f · log_variance_max + (1 − f) · log_variance_min,        f = (r + 1) / 2
    ℓ = KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t))
      = ½ (log σ² − log_variance_min − 1 + exp(log_variance_min − log σ²) + (k e)² / σ²),      t > 0
    ℓ = −log of the mass of N(x_0 + k e, σ²) on x_0's bin of width 2/255,                      t = 0

in nats, where k e is the difference of the means: whatever is predicted, the mean is linear in it.
The gradient of ℓ goes to r alone; e counts there as a constant.

Source: Ho et al. 2020, equations 14, 5 and 13; v: Salimans & Ho 2022, appendix D; learned variance:
Nichol & Dhariwal 2021, equations 15 and 16. The normal distribution function is approximated as in
their code, Φ(z) ≈ σ(2 sqrt(2/π) (z + 0.044715 z³)), and a bin's mass is at least 10⁻¹².
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.dispatch import runs_triton, takes_op
from ddpm_kernels.philox import Stream, minus_two_log
from ddpm_kernels.q_sample import (
    check_per_sample,
    clean_elements,
    clean_images,
    divide,
    is_dense,
    is_wide,
    load_elements,
    noise_elements,
    tile_of,
    training_noise,
)
from ddpm_kernels.tiles import Tile, tile_for
from ddpm_kernels.triton_shim import tl, triton

TARGETS = ("eps", "x0", "v")

SUM_TILE = 256
"""Partial sums that are added at once."""


class BoundColumn(IntEnum):
    """Columns of the table of the bound; a row is a timestep."""

    LOG_VARIANCE_MIN = 0
    """Of the posterior q(x_{t-1} | x_t, x_0), that of t = 1 in place of the −∞ at t = 0."""
    LOG_VARIANCE_MAX = 1
    """log β_t."""
    MEAN_FROM_ERROR = 2
    """k: the difference of the means for one of prediction − target."""


_LOG_VARIANCE_MIN = tl.constexpr(int(BoundColumn.LOG_VARIANCE_MIN))
_LOG_VARIANCE_MAX = tl.constexpr(int(BoundColumn.LOG_VARIANCE_MAX))
_MEAN_FROM_ERROR = tl.constexpr(int(BoundColumn.MEAN_FROM_ERROR))
_LOG2_E = tl.constexpr(math.log2(math.e))


def denoising_loss(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,
    weights: Tensor | None = None,
    flip: Tensor | None = None,
    bound_table: Tensor | None = None,
    bound_weights: Tensor | None = None,
    target: str = "eps",
) -> Tensor:
    """Per-sample loss; differentiable, once, in `prediction` alone.

    Args:
        prediction: `[B, C, H, W]`, the network's output for `q_sample` of the same arguments;
            `[B, 2C, H, W]` with a learned variance.
        images: as given to `q_sample`; likewise `timesteps`, both tables, `seed`, `sample_ids` and
            `flip`.
        timesteps: int64 `[B]`.
        sqrt_alpha_bar: float32 `[T]`.
        sqrt_one_minus_alpha_bar: float32 `[T]`.
        seed: 64-bit integer, or 0-dim int64 tensor.
        sample_ids: int64 `[B]`.
        weights: float32 `[B]`, or None for ones.
        flip: bool `[B]` or None.
        bound_table: float32 `[T, 3]`, see `BoundColumn`; with a learned variance only.
        bound_weights: float32 `[B]`, λ; with a learned variance only. T/1000 for the hybrid
            objective.
        target: what the network predicts: `"eps"`, `"x0"` or `"v"`.

    Returns:
        float32 `[B]` (float64 when the tables are).

    Raises:
        ValueError: an unknown target, or a prediction whose channels do not fit the rest.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}")
    _check(prediction, images, timesteps, sample_ids, weights, flip, bound_table, bound_weights)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=images.device)
    arguments = (
        prediction, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids,
        weights, flip, bound_table, bound_weights, target,
    )  # fmt: skip
    if takes_op(prediction):
        loss, _ = torch.ops.ddpm.denoising_loss(*arguments)
        return loss
    return denoising_loss_reference(*arguments)


def _error(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    target: str,
) -> Tensor:
    """e = prediction − target, in the precision of the tables."""
    compute = sqrt_alpha_bar.dtype
    prediction = prediction[:, : images.shape[1]]
    if target == "x0":
        truth = clean_images(images, flip, compute)
    else:
        truth = training_noise(images, seed, sample_ids, compute)
        if target == "v":
            signal = sqrt_alpha_bar[timesteps][:, None, None, None]
            sigma = sqrt_one_minus_alpha_bar[timesteps][:, None, None, None]
            truth = signal * truth - sigma * clean_images(images, flip, compute)
    return prediction.to(compute) - truth


def _bound(
    error: Tensor,
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    flip: Tensor | None,
    bound_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """ℓ of each element and ∂ℓ/∂r, in the precision of `error`, which counts as a constant."""
    rows = bound_table.to(error.dtype)[timesteps][:, :, None, None, None]
    low = rows[:, BoundColumn.LOG_VARIANCE_MIN]
    high = rows[:, BoundColumn.LOG_VARIANCE_MAX]
    difference = rows[:, BoundColumn.MEAN_FROM_ERROR] * error.detach()
    fraction = (prediction[:, images.shape[1] :].to(error.dtype) + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low

    excess = log_variance - low
    ratio, scaled = (-excess).exp(), difference.square() * (-log_variance).exp()
    kl = 0.5 * (excess - 1 + ratio + scaled)
    kl_slope = 0.5 * (1 - ratio - scaled)

    x_0 = clean_images(images, flip, error.dtype)
    inverse_deviation = (-0.5 * log_variance).exp()
    upper, lower = (inverse_deviation * (end / 255 - difference) for end in (1, -1))
    above, below = _normal_distribution(upper), _normal_distribution(lower)
    # The outermost bins reach to infinity.
    above = torch.where(x_0 > 0.999, 1, above)
    below = torch.where(x_0 < -0.999, 0, below)
    mass = (above - below).clamp(min=1e-12)
    # The bin's ends, in deviations, shrink by half of what the log-variance grows.
    decoder_slope = 0.5 * (upper * _density(upper, above) - lower * _density(lower, below)) / mass
    decoder_slope = torch.where(above - below >= 1e-12, decoder_slope, 0)

    first = timesteps[:, None, None, None] == 0
    slope = torch.where(first, decoder_slope, kl_slope) * (high - low) / 2
    return torch.where(first, -mass.log(), kl), slope


def _normal_distribution(z: Tensor) -> Tensor:
    """Φ(z), as the module's formula."""
    return (2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).sigmoid()


def _density(z: Tensor, distribution: Tensor) -> Tensor:
    """The derivative of Φ at z; zero where Φ has been set to 0 or 1."""
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z.square())
    return distribution * (1 - distribution) * slope


def denoising_loss_reference(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    bound_table: Tensor | None,
    bound_weights: Tensor | None,
    target: str,
) -> Tensor:
    """What `denoising_loss` computes, differentiated by autograd."""
    error = _error(
        prediction, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids,
        flip, target,
    )  # fmt: skip
    # Not as a mean, whose gradient would be spread over a tensor before it meets the error.
    loss = error.square().sum((1, 2, 3)) / error.shape[1:].numel()
    if weights is not None:
        loss = loss * weights
    if bound_table is not None and bound_weights is not None:
        bound, _ = _bound(error, prediction, images, timesteps, flip, bound_table)
        loss = loss + bound_weights * bound.mean((1, 2, 3))
    return loss


def _check(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    bound_table: Tensor | None,
    bound_weights: Tensor | None,
) -> None:
    """Refuse what a kernel would read beyond the end of, or what has no meaning."""
    batch, channels, *pixels = images.shape
    if (bound_table is None) != (bound_weights is None):
        raise ValueError("bound_table and bound_weights come together or not at all")
    expected = (batch, channels if bound_table is None else 2 * channels, *pixels)
    if prediction.shape != expected:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}; for images of {tuple(images.shape)}, "
            f"{'without' if bound_table is None else 'with'} a bound table, it must be {expected}"
        )
    if bound_table is not None and bound_table.shape[1:] != (len(BoundColumn),):
        raise ValueError(
            f"bound_table has shape {tuple(bound_table.shape)}; it must be [T, {len(BoundColumn)}]"
        )
    check_per_sample(
        batch,
        timesteps=timesteps,
        sample_ids=sample_ids,
        weights=weights,
        flip=flip,
        bound_weights=bound_weights,
    )


@triton.jit
def _error_kernel(  # type: ignore[no-untyped-def]
    slope_out,
    partial_sums,
    prediction,
    images,
    timesteps,
    sqrt_alpha_bar,
    sqrt_one_minus_alpha_bar,
    seed,
    sample_ids,
    weights,
    flip,
    bound_table,
    bound_weights,
    prediction_stride_n,
    prediction_stride_c,
    prediction_stride_h,
    prediction_stride_w,
    image_stride_n,
    image_stride_c,
    image_stride_h,
    image_stride_w,
    COUNT: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TARGET: tl.constexpr,
    LEARNED: tl.constexpr,
    PREDICTION_DENSE: tl.constexpr,
    IMAGES_DENSE: tl.constexpr,
    FLIP: tl.constexpr,
    WIDE: tl.constexpr,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
):
    """e, ∂ℓ/∂r behind it if the variance is learned, and the weighted sum of the loss of a tile."""
    sample, elements, blocks, inside = tile_of(COUNT, TILE, WIDE)
    prediction += sample * prediction_stride_n
    error = load_elements(
        prediction, elements, inside,
        prediction_stride_c, prediction_stride_h, prediction_stride_w,
        False, CHANNELS, WIDTH, PREDICTION_DENSE, False,
    )  # fmt: skip
    if TARGET != "eps":
        x_0 = clean_elements(
            images, flip, sample, elements, inside,
            image_stride_n, image_stride_c, image_stride_h, image_stride_w,
            CHANNELS, WIDTH, IMAGES_DENSE, FLIP,
        )  # fmt: skip
    if TARGET == "x0":
        error -= x_0
    else:
        # Fused multiply-add may take the product that makes the noise before it is rounded: it
        # then differs from what q_sample added by half an ulp.
        noise = noise_elements(seed, sample_ids, sample, blocks, STREAM)
        if TARGET == "v":
            t = tl.load(timesteps + sample)
            signal = tl.load(sqrt_alpha_bar + t)
            sigma = tl.load(sqrt_one_minus_alpha_bar + t)
            noise = signal * noise - sigma * x_0
        error -= noise
    total = tl.sum(tl.where(inside, error * error, 0.0), axis=0)
    if weights is not None:
        total *= tl.load(weights + sample).to(tl.float32)

    if LEARNED:
        # In channels-last order the C slopes of a pixel lie behind its C errors.
        slope_out += sample * (2 * COUNT)
        places = elements + divide(elements, CHANNELS) * CHANNELS
        r = load_elements(
            prediction + CHANNELS * prediction_stride_c, elements, inside,
            prediction_stride_c, prediction_stride_h, prediction_stride_w,
            False, CHANNELS, WIDTH, False, False,
        )  # fmt: skip
        row = tl.load(timesteps + sample)
        coefficients = bound_table + row * 3
        low = tl.load(coefficients + _LOG_VARIANCE_MIN)
        half_range = 0.5 * (tl.load(coefficients + _LOG_VARIANCE_MAX) - low)
        difference = tl.load(coefficients + _MEAN_FROM_ERROR) * error
        excess = half_range * (r + 1.0)
        if row == 0:
            x_0 = clean_elements(
                images, flip, sample, elements, inside,
                image_stride_n, image_stride_c, image_stride_h, image_stride_w,
                CHANNELS, WIDTH, IMAGES_DENSE, FLIP,
            )  # fmt: skip
            bound, slope = _decoder_term(x_0, difference, low + excess)
        else:
            ratio = tl.exp2(excess * -_LOG2_E)
            scaled = difference * difference * tl.exp2((low + excess) * -_LOG2_E)
            bound = 0.5 * (excess - 1.0 + ratio + scaled)
            slope = 0.5 * (1.0 - ratio - scaled)
        slope *= half_range
        tl.store(slope_out + places + CHANNELS, slope.to(slope_out.dtype.element_ty), mask=inside)
        bound_total = tl.sum(tl.where(inside, bound, 0.0), axis=0)
        total += tl.load(bound_weights + sample).to(tl.float32) * bound_total
    else:
        slope_out += sample * COUNT
        places = elements
    tl.store(slope_out + places, error.to(slope_out.dtype.element_ty), mask=inside)
    tl.store(partial_sums + tl.program_id(0), total)


@triton.jit
def _decoder_term(x_0, difference, log_variance):  # type: ignore[no-untyped-def]
    """ℓ at t = 0 and its derivative by the log-variance, as `_bound`."""
    inverse_deviation = tl.exp2(log_variance * (-0.5 * _LOG2_E))
    upper = inverse_deviation * (0.00392156862745098 - difference)
    lower = inverse_deviation * (-0.00392156862745098 - difference)
    above = tl.where(x_0 > 0.999, 1.0, _distribution_elements(upper))
    below = tl.where(x_0 < -0.999, 0.0, _distribution_elements(lower))
    mass = above - below
    bounded = tl.maximum(mass, 1e-12)
    slope = upper * _density_elements(upper, above) - lower * _density_elements(lower, below)
    slope = tl.where(mass >= 1e-12, 0.5 * slope / bounded, 0.0)
    return 0.5 * minus_two_log(bounded), slope


@triton.jit
def _distribution_elements(z):  # type: ignore[no-untyped-def]
    """As `_normal_distribution`."""
    return tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def _density_elements(z, distribution):  # type: ignore[no-untyped-def]
    """As `_density`."""
    slope = 1.5957691216057308 + 0.21406444801541077 * z * z
    return distribution * (1.0 - distribution) * slope


@triton.jit
def _loss_kernel(  # type: ignore[no-untyped-def]
    loss, partial_sums, tiles, count, SUM_TILE: tl.constexpr
):
    """The means, one sample a program: from `tiles` partial sums of `count` elements."""
    sample = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, SUM_TILE)
    totals = tl.zeros((SUM_TILE,), tl.float32)
    for start in range(0, tiles, SUM_TILE):
        inside = start + index < tiles
        totals += tl.load(partial_sums + sample * tiles + start + index, mask=inside, other=0.0)
    tl.store(loss + sample, tl.sum(totals, axis=0) / tl.cast(count, tl.float32))


def tile_of_loss(images: Tensor) -> Tile:
    """The tile that the kernel takes for samples of this size, `[B, C, H, W]`."""
    return tile_for("denoising_loss", images).fitted(images.shape[1:].numel())


def launch_denoising_loss(
    loss: Tensor,
    slope: Tensor,
    partial_sums: Tensor,
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    bound_table: Tensor | None,
    bound_weights: Tensor | None,
    target: str,
) -> None:
    """Write the loss, e, and ∂ℓ/∂r.

    Args:
        loss: float32 `[B]`.
        slope: shaped as the prediction, contiguous in channels-last memory format: e in the first
            C channels, ∂ℓ/∂r in the others if there are any.
        partial_sums: float32 `[B, tiles]`. Each has one writer and they are added in a fixed order,
            so the loss of a sample is the same to the bit in every batch.
        prediction: and what follows, as given to `denoising_loss_reference`.
    """
    batch, channels, height, width = images.shape
    count = channels * height * width
    tile = tile_of_loss(images)
    tiles = partial_sums.shape[1]
    learned = bound_table is not None
    read = [prediction] if target == "eps" and not learned else [prediction, images]

    def packed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    with torch.cuda.device_of(prediction):
        _error_kernel[(batch * tiles,)](
            slope,
            partial_sums,
            prediction,
            images,
            timesteps.contiguous(),
            sqrt_alpha_bar.contiguous(),
            sqrt_one_minus_alpha_bar.contiguous(),
            seed,
            sample_ids.contiguous(),
            packed(weights),
            None if flip is None else flip.contiguous().view(torch.uint8),
            packed(bound_table),
            packed(bound_weights),
            *prediction.stride(),
            *images.stride(),
            COUNT=count,
            CHANNELS=channels,
            WIDTH=width,
            TARGET=target,
            LEARNED=learned,
            # Of two halves, each lies in steps of 2C, whatever the strides.
            PREDICTION_DENSE=is_dense(prediction) and not learned,
            IMAGES_DENSE=is_dense(images),
            FLIP=flip is not None,
            WIDE=is_wide(tile.elements, *read, slope),
            STREAM=int(Stream.TRAINING_NOISE),
            TILE=tile.elements,
            **tile.options(),
        )
        _loss_kernel[(batch,)](
            loss, partial_sums, tiles, count, SUM_TILE=SUM_TILE, **Tile(SUM_TILE, 1).options()
        )


@torch.library.custom_op("ddpm::denoising_loss", mutates_args=())
def _op(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    bound_table: Tensor | None,
    bound_weights: Tensor | None,
    target: str,
) -> tuple[Tensor, Tensor]:
    """Returns the loss and, in one pass, what its gradient is made of: e, and behind it ∂ℓ/∂r.

    The gradient is these times a number per sample, which is applied in the backward pass, in the
    precision of the loss: it holds the loss scale of half-precision training, and 1 / (C H W), and
    without the one the other would take float16 gradients below its normal range.
    """
    if runs_triton(prediction) and sqrt_alpha_bar.dtype == torch.float32:
        tiles = triton.cdiv(images.shape[1:].numel(), tile_of_loss(images).elements)
        loss = sqrt_alpha_bar.new_empty(images.shape[0])
        slope = torch.empty_like(prediction, memory_format=torch.channels_last)
        launch_denoising_loss(
            loss, slope, loss.new_empty(len(loss), tiles), prediction, images, timesteps,
            sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids, weights, flip, bound_table,
            bound_weights, target,
        )  # fmt: skip
        return loss, slope
    error = _error(
        prediction, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids,
        flip, target,
    )  # fmt: skip
    loss = error.square().mean((1, 2, 3))
    if weights is not None:
        loss = loss * weights
    slope = error
    if bound_table is not None and bound_weights is not None:
        bound, variance_slope = _bound(error, prediction, images, timesteps, flip, bound_table)
        slope = torch.cat([error, variance_slope], dim=1)
        loss = loss + bound_weights * bound.mean((1, 2, 3))
    return loss, slope.to(prediction.dtype).contiguous(memory_format=torch.channels_last)


@_op.register_fake
def _(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    bound_table: Tensor | None,
    bound_weights: Tensor | None,
    target: str,
) -> tuple[Tensor, Tensor]:
    loss = sqrt_alpha_bar.new_empty(prediction.shape[0])
    return loss, torch.empty_like(prediction, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, bound_weights = inputs[7], inputs[10]
    _, slope = output
    ctx.mark_non_differentiable(slope)
    ctx.set_materialize_grads(False)  # or zeros would be made for a gradient of the slope
    ctx.channels = inputs[1].shape[1]
    ctx.save_for_backward(slope, weights, bound_weights)


def _differentiate(ctx: Any, d_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 12
    slope, weights, bound_weights = ctx.saved_tensors
    mean = d_loss / (ctx.channels * slope.shape[2] * slope.shape[3])
    factor = 2 * mean if weights is None else 2 * mean * weights
    factor = factor[:, None].expand(-1, ctx.channels)
    if bound_weights is not None:
        variance = (mean * bound_weights)[:, None].expand(-1, ctx.channels)
        factor = torch.cat([factor, variance], dim=1)
    # Straight to the precision of the network, rounded once and without a float32 tensor between.
    # (Nor can this be differentiated again: torch says so, where a result would be wrong.)
    gradient = torch.mul(slope, factor[:, :, None, None], out=torch.empty_like(slope))
    return gradient, *[None] * 11


_op.register_autograd(_differentiate, setup_context=_save)
