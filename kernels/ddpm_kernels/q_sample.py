"""The forward process in closed form, from stored images to noisy ones: q(x_t | x_0).

    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 − ᾱ_t) ε        (Ho et al. 2020, equation 4)

x_0 is the image in [-1, 1]: a uint8 image is mapped there, and mirrored where asked, on the way in.
Or it is a latent, drawn from the moments of an autoencoder on the way in (`latents`). ε is
generated in registers from the counter map, so noise is never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of, runs_triton, skips_dispatcher, takes_op
from ddpm_kernels.gaussian_noise import gaussian_noise_reference
from ddpm_kernels.latents import (
    channels_of,
    check_moments,
    latent_elements,
    latents_reference,
    tile_of_samples,
)
from ddpm_kernels.philox import Stream, interleave4, normals4
from ddpm_kernels.tiles import Tile, tile_for
from ddpm_kernels.tiling import (
    as_scalar,
    check_per_sample,
    is_wide,
    layout_of,
    load_elements,
    packed,
    tile_of,
)
from ddpm_kernels.triton_shim import tl, triton


def q_sample(
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    stream: Stream = Stream.TRAINING_NOISE,
    latent_scale: float | None = None,
    latent_shift: float = 0.0,
) -> Tensor:
    """Noise a batch of images, or of latents that are drawn from moments.

    Args:
        images: `[B, C, H, W]` in any strides; uint8, or floating point already in [-1, 1]. With
            `latent_scale`, moments: `[B, 2C, H, W]`, floating point, means and log-variances.
        timesteps: int64 `[B]` in [0, T).
        sqrt_alpha_bar: float32 `[T]` (float64 in float64 checks), taken in float64, rounded once.
            Never half precision: bfloat16 rounds sqrt(ᾱ) of the first steps to one.
        sqrt_one_minus_alpha_bar: likewise.
        seed: 64-bit integer, or 0-dim int64 tensor on the device of `images`.
        sample_ids: int64 `[B]`; in training, the samples' positions.
        flip: bool `[B]`, which images to mirror left to right, or None; None for moments.
        dtype: of the result.
        stream: of the noise; `denoising_loss` draws that of training only.
        latent_scale: what a latent is multiplied with; None: `images` are images.
        latent_shift: what is subtracted from a latent before. By tables of one and zero the result
            is x_0 itself.

    Returns:
        x_t, `[B, C, H, W]` of `dtype`, channels-last.

    Raises:
        ValueError: `timesteps`, `sample_ids` or `flip` does not have one value per sample; what is
            given with `latent_scale` are no moments, or are to be mirrored.
    """
    check_moments(images, flip, latent_scale, latent_shift)
    check_per_sample(len(images), timesteps=timesteps, sample_ids=sample_ids, flip=flip)
    call: Callable[..., Tensor] = q_sample_reference
    if takes_op(images):
        direct = skips_dispatcher(images) and not images.requires_grad
        call = _q_sample if direct else torch.ops.ddpm.q_sample.default
    return call(
        images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar,
        as_scalar(seed, images.device), sample_ids, flip, dtype, int(stream), latent_scale,
        latent_shift,
    )  # fmt: skip


# --- Reference


def clean_images(images: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x_0: the images in [-1, 1] as `dtype`, mirrored where `flip` says so."""
    # In the layout of the noise: mixing two layouts costs more than changing one.
    x_0 = images.to(dtype, memory_format=torch.channels_last)
    if images.dtype == torch.uint8:
        x_0 = x_0.div_(127.5).sub_(1)
    if flip is not None:
        x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
    return x_0


def clean_samples(
    images: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    dtype: torch.dtype,
    latent_scale: float | None,
    latent_shift: float,
) -> Tensor:
    """Return x_0 `[B, C, H, W]` as `dtype`: `clean_images`, or latents drawn from moments."""
    if latent_scale is None:
        return clean_images(images, flip, dtype)
    return latents_reference(images, seed, sample_ids, dtype, latent_scale, latent_shift)


def training_noise(
    images: Tensor,
    channels: int,
    seed: Tensor,
    sample_ids: Tensor,
    dtype: torch.dtype,
    stream: Stream = Stream.TRAINING_NOISE,
) -> Tensor:
    """Return the ε that belongs to each sample of a training batch, `[B, channels, H, W]`."""
    height, width = images.shape[2:]
    step = as_scalar(0, sample_ids.device)
    noise = gaussian_noise_reference(seed, sample_ids, channels, height, width, step, int(stream))
    return noise.to(dtype)


def q_sample_reference(
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    dtype: torch.dtype,
    stream: int,
    latent_scale: float | None,
    latent_shift: float,
) -> Tensor:
    """Compute what `q_sample` specifies, in the precision of the tables."""
    compute = sqrt_alpha_bar.dtype
    x_0 = clean_samples(images, seed, sample_ids, flip, compute, latent_scale, latent_shift)
    noise = training_noise(images, x_0.shape[1], seed, sample_ids, compute, Stream(stream))
    signal = sqrt_alpha_bar[timesteps][:, None, None, None]
    sigma = sqrt_one_minus_alpha_bar[timesteps][:, None, None, None]
    x_t = signal * x_0 + sigma * noise
    return x_t.to(dtype).contiguous(memory_format=torch.channels_last)


# --- Triton


@triton.jit
def clean_elements(  # type: ignore[no-untyped-def]
    images,
    flip,
    sample,
    elements,
    inside,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """x_0: elements of the image in [-1, 1], mirrored where `flip` says so, as `clean_images`."""
    mirror = False
    if flip is not None:
        mirror = tl.load(flip + sample) != 0
    x_0 = load_elements(
        images + sample * stride_n, elements, inside, stride_c, stride_h, stride_w, mirror,
        CHANNELS, WIDTH, LAYOUT, flip is not None,
    )  # fmt: skip
    if images.dtype.element_ty == tl.uint8:
        # The first step is exact, so this is rounded once, and both extremes are exact.
        x_0 = (2.0 * x_0 - 255.0) * 0.00392156862745098
    return x_0


@triton.jit
def clean_sample_elements(  # type: ignore[no-untyped-def]
    images,
    seed,
    sample_ids,
    flip,
    sample,
    elements,
    blocks,
    inside,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """x_0, as `clean_samples`; SCALE is None where images are images."""
    if SCALE is None:
        x_0 = clean_elements(
            images, flip, sample, elements, inside, stride_n, stride_c, stride_h, stride_w,
            CHANNELS, WIDTH, LAYOUT,
        )  # fmt: skip
    else:
        x_0 = latent_elements(
            images + sample * stride_n, tl.load(seed), tl.load(sample_ids + sample),
            elements, blocks, inside, stride_c, stride_h, stride_w,
            CHANNELS, WIDTH, LAYOUT, SCALE, SHIFT,
        )  # fmt: skip
    return x_0


@triton.jit
def noise_elements(seed, sample_ids, sample, blocks, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The training noise of a tile, as `training_noise`."""
    step = tl.full((), 0, tl.int64)
    a, b, c, d = normals4(tl.load(seed), blocks, step, tl.load(sample_ids + sample), STREAM)
    return interleave4(a, b, c, d)


@triton.jit
def _q_sample_kernel(  # type: ignore[no-untyped-def]
    out,
    images,
    timesteps,
    sqrt_alpha_bar,
    sqrt_one_minus_alpha_bar,
    seed,
    sample_ids,
    flip,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    COUNT: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
    STREAM: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    sample, elements, blocks, inside = tile_of(COUNT, TILE, WIDE)
    x_0 = clean_sample_elements(
        images, seed, sample_ids, flip, sample, elements, blocks, inside,
        stride_n, stride_c, stride_h, stride_w, CHANNELS, WIDTH, LAYOUT, SCALE, SHIFT,
    )  # fmt: skip
    noise = noise_elements(seed, sample_ids, sample, blocks, STREAM)
    t = tl.load(timesteps + sample)
    x_t = tl.load(sqrt_alpha_bar + t) * x_0 + tl.load(sqrt_one_minus_alpha_bar + t) * noise
    tl.store(out + sample * COUNT + elements, x_t.to(out.dtype.element_ty), mask=inside)


# --- Launcher


@lru_cache(maxsize=1024)
def plan(
    tile: Tile,
    shape: torch.Size,
    strides: tuple[int, ...],
    stream: int,
    latent_scale: float | None,
    latent_shift: float,
) -> Callable[..., None]:
    """Return the kernel with its grid and all arguments but tensors, for images of a layout."""
    images = torch.empty_strided(shape, strides, device="meta")
    batch, _, height, width = shape
    channels = channels_of(images, latent_scale)
    count = channels * height * width
    tile = tile_of_samples(tile, count, latent_scale)
    return partial(
        _q_sample_kernel[(batch * triton.cdiv(count, tile.elements),)],
        **dict(zip(_STRIDES, strides, strict=True)),
        COUNT=count,
        CHANNELS=channels,
        WIDTH=width,
        LAYOUT=layout_of(images, channels),
        WIDE=is_wide(tile.elements, images),
        STREAM=stream,
        SCALE=latent_scale,
        SHIFT=latent_shift,
        TILE=tile.elements,
        **tile.options(),
    )


_STRIDES = ("stride_n", "stride_c", "stride_h", "stride_w")


def _empty_x_t(images: Tensor, dtype: torch.dtype, latent_scale: float | None) -> Tensor:
    if latent_scale is not None:
        images = images[:, : channels_of(images, latent_scale)]
    return torch.empty_like(images, dtype=dtype, memory_format=torch.channels_last)


def _launch(
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    dtype: torch.dtype,
    stream: int,
    latent_scale: float | None,
    latent_shift: float,
) -> Tensor:
    launch = plan(
        tile_for("q_sample", images), images.shape, images.stride(), stream, latent_scale,
        latent_shift,
    )  # fmt: skip
    out = _empty_x_t(images, dtype, latent_scale)
    with on_device_of(images):
        launch(
            out, images, packed(timesteps), packed(sqrt_alpha_bar),
            packed(sqrt_one_minus_alpha_bar), seed, packed(sample_ids), packed(flip),
        )  # fmt: skip
    return out


# --- Registration


def _q_sample(images: Tensor, timesteps: Tensor, sqrt_alpha_bar: Tensor, *rest: Any) -> Tensor:
    kernel = runs_triton(images) and sqrt_alpha_bar.dtype == torch.float32
    run = _launch if kernel else q_sample_reference
    return run(images, timesteps, sqrt_alpha_bar, *rest)


_op = torch.library.custom_op(
    "ddpm::q_sample",
    _q_sample,
    mutates_args=(),
    schema=torch.library.infer_schema(q_sample_reference, mutates_args=()),
)


@_op.register_fake
def _(images: Tensor, *rest: Any) -> Tensor:
    return _empty_x_t(images, rest[6], rest[8])
