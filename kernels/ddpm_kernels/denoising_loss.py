"""The weighted squared error between a prediction and its target, and its gradient.

    L_b = w_b · mean over pixels and channels of (prediction − target)²
    ∂L_b / ∂prediction = 2 w_b (prediction − target) / (C H W)

with the target ε, x_0, or v = sqrt(ᾱ_t) ε − sqrt(1 − ᾱ_t) x_0. The noise that made x_t is drawn a
second time from the counter map; it is never passed in. With w = 1 and target ε this is L_simple.

Source: Ho et al. 2020, equation 14; v: Salimans & Ho 2022, appendix D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.dispatch import runs_triton, takes_op
from ddpm_kernels.philox import Stream
from ddpm_kernels.q_sample import (
    TILE,
    WARPS,
    check_per_sample,
    clean_elements,
    clean_images,
    is_dense,
    is_wide,
    load_elements,
    noise_elements,
    tile_of,
    training_noise,
)
from ddpm_kernels.triton_shim import tl, triton

TARGETS = ("eps", "x0", "v")

SUM_TILE = 256
"""Partial sums that are added at once."""


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
    target: str = "eps",
) -> Tensor:
    """Per-sample loss; differentiable in `prediction` alone.

    Args:
        prediction: `[B, C, H, W]`, the network's output for `q_sample` of the same arguments.
        images: as given to `q_sample`; likewise `timesteps`, both tables, `seed`, `sample_ids` and
            `flip`.
        timesteps: int64 `[B]`.
        sqrt_alpha_bar: float32 `[T]`.
        sqrt_one_minus_alpha_bar: float32 `[T]`.
        seed: 64-bit integer, or 0-dim int64 tensor.
        sample_ids: int64 `[B]`.
        weights: float32 `[B]`, or None for ones.
        flip: bool `[B]` or None.
        target: what the network predicts: `"eps"`, `"x0"` or `"v"`.

    Returns:
        float32 `[B]` (float64 when the tables are).

    Raises:
        ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}")
    seed = torch.as_tensor(seed, dtype=torch.int64, device=images.device)
    arguments = (
        prediction, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids,
        weights, flip, target,
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
    """prediction − target, in the precision of the tables."""
    compute = sqrt_alpha_bar.dtype
    if target == "x0":
        truth = clean_images(images, flip, compute)
    else:
        truth = training_noise(images, seed, sample_ids, compute)
        if target == "v":
            signal = sqrt_alpha_bar[timesteps][:, None, None, None]
            sigma = sqrt_one_minus_alpha_bar[timesteps][:, None, None, None]
            truth = signal * truth - sigma * clean_images(images, flip, compute)
    return prediction.to(compute) - truth


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
    target: str,
) -> Tensor:
    """What `denoising_loss` computes, differentiated by autograd."""
    error = _error(
        prediction, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids,
        flip, target,
    )  # fmt: skip
    # Not as a mean, whose gradient would be spread over a tensor before it meets the error.
    loss = error.square().sum((1, 2, 3)) / error.shape[1:].numel()
    return loss if weights is None else loss * weights


@triton.jit
def _error_kernel(  # type: ignore[no-untyped-def]
    error_out,
    partial_sums,
    prediction,
    images,
    timesteps,
    sqrt_alpha_bar,
    sqrt_one_minus_alpha_bar,
    seed,
    sample_ids,
    flip,
    count,
    prediction_stride_n,
    prediction_stride_c,
    prediction_stride_h,
    prediction_stride_w,
    image_stride_n,
    image_stride_c,
    image_stride_h,
    image_stride_w,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TARGET: tl.constexpr,
    PREDICTION_DENSE: tl.constexpr,
    IMAGES_DENSE: tl.constexpr,
    FLIP: tl.constexpr,
    WIDE: tl.constexpr,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
):
    """prediction − target, and the sum of its squares over each tile."""
    sample, elements, blocks, inside = tile_of(count, TILE, WIDE)
    error = load_elements(
        prediction + sample * prediction_stride_n, elements, inside,
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
    tl.store(
        error_out + sample * count + elements,
        error.to(error_out.dtype.element_ty),
        mask=inside,
    )
    total = tl.sum(tl.where(inside, error * error, 0.0), axis=0)
    tl.store(partial_sums + tl.program_id(0), total)


@triton.jit
def _loss_kernel(  # type: ignore[no-untyped-def]
    loss, partial_sums, weights, tiles, count, WEIGHTS: tl.constexpr, SUM_TILE: tl.constexpr
):
    """The weighted means, one sample a program: from `tiles` partial sums of `count` elements."""
    sample = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, SUM_TILE)
    totals = tl.zeros((SUM_TILE,), tl.float32)
    for start in range(0, tiles, SUM_TILE):
        inside = start + index < tiles
        totals += tl.load(partial_sums + sample * tiles + start + index, mask=inside, other=0.0)
    mean = tl.sum(totals, axis=0) / tl.cast(count, tl.float32)
    if WEIGHTS:
        mean *= tl.load(weights + sample).to(tl.float32)
    tl.store(loss + sample, mean)


def launch_denoising_loss(
    loss: Tensor,
    error: Tensor,
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
    target: str,
) -> None:
    """Write the loss and prediction − target.

    Args:
        loss: float32 `[B]`.
        error: `[B, C, H, W]` contiguous in channels-last memory format.
        partial_sums: float32 `[B, tiles of TILE elements]`. Each has one writer and they are added
            in a fixed order, so the loss of a sample is the same to the bit in every batch.
        prediction: and what follows, as given to `denoising_loss_reference`.
    """
    batch, channels, height, width = prediction.shape
    if images.shape != prediction.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, images {tuple(images.shape)}"
        )
    check_per_sample(batch, timesteps=timesteps, sample_ids=sample_ids, weights=weights, flip=flip)
    count = channels * height * width
    tiles = partial_sums.shape[1]
    reads_images = target != "eps"
    with torch.cuda.device_of(prediction):
        _error_kernel[(batch * tiles,)](
            error,
            partial_sums,
            prediction,
            images,
            timesteps.contiguous(),
            sqrt_alpha_bar.contiguous(),
            sqrt_one_minus_alpha_bar.contiguous(),
            seed,
            sample_ids.contiguous(),
            None if flip is None else flip.contiguous().view(torch.uint8),
            count,
            *prediction.stride(),
            *images.stride(),
            CHANNELS=channels,
            WIDTH=width,
            TARGET=target,
            PREDICTION_DENSE=is_dense(prediction),
            IMAGES_DENSE=is_dense(images),
            FLIP=flip is not None,
            WIDE=is_wide(prediction, images) if reads_images else is_wide(prediction),
            STREAM=int(Stream.TRAINING_NOISE),
            TILE=TILE,
            num_warps=WARPS,
        )
        _loss_kernel[(batch,)](
            loss,
            partial_sums,
            None if weights is None else weights.contiguous(),
            tiles,
            count,
            WEIGHTS=weights is not None,
            SUM_TILE=SUM_TILE,
            num_warps=1,
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
    target: str,
) -> tuple[Tensor, Tensor]:
    """Returns the loss and prediction − target, in one pass over the prediction.

    The gradient is the second output times a number per sample, which is applied in the backward
    pass, in the precision of the loss: it holds the loss scale of half-precision training, and
    1 / (C H W), and without the one the other would take float16 gradients below its normal range.
    """
    if runs_triton(prediction) and sqrt_alpha_bar.dtype == torch.float32:
        batch, count = prediction.shape[0], prediction.shape[1:].numel()
        loss = sqrt_alpha_bar.new_empty(batch)
        out = torch.empty_like(prediction, memory_format=torch.channels_last)
        launch_denoising_loss(
            loss, out, loss.new_empty(batch, triton.cdiv(count, TILE)), prediction, images,
            timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids, weights, flip,
            target,
        )  # fmt: skip
        return loss, out
    error = _error(
        prediction, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids,
        flip, target,
    )  # fmt: skip
    loss = error.square().mean((1, 2, 3))
    if weights is not None:
        loss = loss * weights
    return loss, error.to(prediction.dtype).contiguous(memory_format=torch.channels_last)


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
    target: str,
) -> tuple[Tensor, Tensor]:
    loss = sqrt_alpha_bar.new_empty(prediction.shape[0])
    return loss, torch.empty_like(prediction, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights = inputs[7]
    _, error = output
    ctx.mark_non_differentiable(error)
    ctx.save_for_backward(error, weights)


def _differentiate(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    error, weights = ctx.saved_tensors
    factor = d_loss * (2 / (error.shape[1] * error.shape[2] * error.shape[3]))
    if weights is not None:
        factor = factor * weights
    return (error * factor[:, None, None, None]).to(error.dtype), *[None] * 9


_op.register_autograd(_differentiate, setup_context=_save)
