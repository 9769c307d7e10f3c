"""The Triton functions of the loss, and their launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of
from ddpm_kernels.latents import channels_of, tile_of_samples
from ddpm_kernels.philox import Stream
from ddpm_kernels.q_sample import clean_elements, clean_sample_elements, noise_elements
from ddpm_kernels.tiles import Tile, tile_for
from ddpm_kernels.tiling import divide, is_wide, layout_of, load_elements, packed, tile_of
from ddpm_kernels.triton_shim import tl, triton
from ddpm_kernels.variational_bound import bound_row, decoder_elements, kl_elements

SUM_TILE = 256
"""Partial sums that are added at once."""


# --- Triton


@triton.jit
def _error_kernel(  # type: ignore[no-untyped-def]
    slope_out,
    partial_sums,
    prediction,
    images,
    timesteps,
    target_x0,
    target_noise,
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
    PREDICTION_LAYOUT: tl.constexpr,
    IMAGE_LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
    STREAM: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """e, ∂ℓ/∂r behind it if the variance is learned, and the weighted sum of the loss of a tile."""
    sample, elements, blocks, inside = tile_of(COUNT, TILE, WIDE)
    row = tl.load(timesteps + sample)
    prediction += sample * prediction_stride_n
    error = load_elements(
        prediction, elements, inside,
        prediction_stride_c, prediction_stride_h, prediction_stride_w,
        False, CHANNELS, WIDTH, PREDICTION_LAYOUT, False,
    )  # fmt: skip
    target = tl.zeros((TILE,), tl.float32)
    if target_noise is not None:
        noise = noise_elements(seed, sample_ids, sample, blocks, STREAM)
        target = tl.load(target_noise + row) * noise
    if target_x0 is not None:
        x_0 = clean_sample_elements(
            images, seed, sample_ids, flip, sample, elements, blocks, inside,
            image_stride_n, image_stride_c, image_stride_h, image_stride_w,
            CHANNELS, WIDTH, IMAGE_LAYOUT, SCALE, SHIFT,
        )  # fmt: skip
        target += tl.load(target_x0 + row) * x_0
    error -= target
    total = tl.sum(tl.where(inside, error * error, 0.0), axis=0)
    if weights is not None:
        total *= tl.load(weights + sample).to(tl.float32)

    if bound_table is not None:
        # In channels-last order the C slopes of a pixel lie behind its C errors.
        slope_out += sample * (2 * COUNT)
        places = elements + divide(elements, CHANNELS) * CHANNELS
        r = load_elements(
            prediction + CHANNELS * prediction_stride_c, elements, inside,
            prediction_stride_c, prediction_stride_h, prediction_stride_w,
            False, CHANNELS, WIDTH, PREDICTION_LAYOUT, False,
        )  # fmt: skip
        difference, low, excess, half_range = bound_row(bound_table, row, error, r)
        if row == 0:
            if SCALE is None:
                x_0 = clean_elements(
                    images, flip, sample, elements, inside,
                    image_stride_n, image_stride_c, image_stride_h, image_stride_w,
                    CHANNELS, WIDTH, IMAGE_LAYOUT,
                )  # fmt: skip
                bound, slope = decoder_elements(x_0, difference, low + excess)
            else:
                bound, slope = decoder_elements(None, difference, low + excess)
        else:
            bound, slope = kl_elements(difference, low, excess)
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


# --- Launcher


class Plan(NamedTuple):
    """What a call launches: kernels with their grids and all arguments but tensors."""

    error: Callable[..., None]
    loss: Callable[..., None]
    tiles: int
    """Tiles of a sample."""


@lru_cache(maxsize=1024)
def plan(
    tile: Tile,
    prediction_shape: torch.Size,
    prediction_strides: tuple[int, ...],
    image_shape: torch.Size,
    image_strides: tuple[int, ...],
    reads_images: bool,
    latent_scale: float | None,
    latent_shift: float,
) -> Plan:
    """Plan a call on tensors of these layouts."""
    images = torch.empty_strided(image_shape, image_strides, device="meta")
    batch, _, height, width = image_shape
    channels = channels_of(images, latent_scale)
    count = channels * height * width
    tile = tile_of_samples(tile, count, latent_scale)
    tiles = triton.cdiv(count, tile.elements)
    prediction = torch.empty_strided(prediction_shape, prediction_strides, device="meta")
    slope = torch.empty_like(prediction, memory_format=torch.channels_last)
    error = partial(
        _error_kernel[(batch * tiles,)],
        **dict(zip(_STRIDES, (*prediction_strides, *image_strides), strict=True)),
        COUNT=count,
        CHANNELS=channels,
        WIDTH=width,
        PREDICTION_LAYOUT=layout_of(prediction, channels),
        IMAGE_LAYOUT=layout_of(images, channels),
        WIDE=is_wide(tile.elements, prediction, images if reads_images else None, slope),
        STREAM=int(Stream.TRAINING_NOISE),
        SCALE=latent_scale,
        SHIFT=latent_shift,
        TILE=tile.elements,
        **tile.options(),
    )
    loss = partial(
        _loss_kernel[(batch,)],
        tiles=tiles,
        count=count,
        SUM_TILE=SUM_TILE,
        **Tile(SUM_TILE, 1).options(),
    )
    return Plan(error, loss, tiles)


_STRIDES = tuple(
    f"{tensor}_stride_{dimension}" for tensor in ("prediction", "image") for dimension in "nchw"
)


def launch_denoising_loss(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    target_x0: Tensor | None,
    target_noise: Tensor | None,
    seed: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    bound_table: Tensor | None,
    bound_weights: Tensor | None,
    latent_scale: float | None,
    latent_shift: float,
) -> tuple[Tensor, Tensor]:
    """Launch the loss; arguments and results as in `loss_and_slope_reference`."""
    launches = plan(
        tile_for("denoising_loss", images), prediction.shape, prediction.stride(), images.shape,
        images.stride(), target_x0 is not None or bound_table is not None, latent_scale,
        latent_shift,
    )  # fmt: skip
    batch = len(images)
    loss = prediction.new_empty(batch, dtype=torch.float32)
    slope = torch.empty_like(prediction, memory_format=torch.channels_last)
    # Each partial sum has one writer, and they are added in a fixed order: the loss of a sample is
    # the same to the bit in every batch.
    partial_sums = loss.new_empty(batch, launches.tiles)
    with on_device_of(prediction):
        launches.error(
            slope, partial_sums, prediction, images, packed(timesteps), packed(target_x0),
            packed(target_noise), seed, packed(sample_ids), packed(weights), packed(flip),
            packed(bound_table), packed(bound_weights),
        )  # fmt: skip
        launches.loss(loss, partial_sums)
    return loss, slope
