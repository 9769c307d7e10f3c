"""The forward process in closed form, from stored images to noisy ones: q(x_t | x_0).

    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 − ᾱ_t) ε        (Ho et al. 2020, equation 4)

x_0 is the image in [-1, 1]: a uint8 image is mapped there, and mirrored where asked, on the way in.
ε is drawn inside from the counter map, so noise is never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_kernels.dispatch import runs_triton, takes_op
from ddpm_kernels.philox import Stream, gaussian_noise, interleave4, normals4
from ddpm_kernels.tiles import tile_for
from ddpm_kernels.triton_shim import tl, triton

INDEX_LIMIT = 2**31
"""Samples that reach as far as this, in elements, are indexed with 64 bits."""

_TRAINING = int(Stream.TRAINING_NOISE)


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
) -> Tensor:
    """Noise a batch of images.

    Args:
        images: `[B, C, H, W]` in any strides; uint8, or floating point already in [-1, 1].
        timesteps: int64 `[B]` in [0, T).
        sqrt_alpha_bar: float32 `[T]` (float64 in float64 checks), taken in float64, rounded once.
            Never half precision: bfloat16 cannot tell sqrt(ᾱ) of the first steps from one.
        sqrt_one_minus_alpha_bar: likewise.
        seed: 64-bit integer, or 0-dim int64 tensor on the device of `images`.
        sample_ids: int64 `[B]`; in training, the samples' positions.
        flip: bool `[B]`, which images to mirror left to right, or None.
        dtype: of the result.
        stream: of the noise; `denoising_loss` knows that of training only.

    Returns:
        x_t, `[B, C, H, W]` of `dtype`, channels-last.

    Raises:
        ValueError: `timesteps`, `sample_ids` or `flip` has not one value a sample.
    """
    check_per_sample(len(images), timesteps=timesteps, sample_ids=sample_ids, flip=flip)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=images.device)
    arguments = (
        images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids, flip, dtype,
    )  # fmt: skip
    if takes_op(images):
        x_t: Tensor = torch.ops.ddpm.q_sample(*arguments, int(stream))
        return x_t
    return q_sample_reference(*arguments, stream)


def clean_images(images: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x_0: the images in [-1, 1] as `dtype`, mirrored where `flip` says so."""
    # In the layout of the noise: to mix two layouts costs more than to change one.
    x_0 = images.to(dtype, memory_format=torch.channels_last)
    if images.dtype == torch.uint8:
        x_0 = x_0.div_(127.5).sub_(1)
    if flip is not None:
        x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
    return x_0


def training_noise(
    images: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    dtype: torch.dtype,
    stream: Stream = Stream.TRAINING_NOISE,
) -> Tensor:
    """The ε that belongs to each sample of a training batch, `[B, C, H, W]`."""
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return gaussian_noise(seed, sample_ids, shape, 0, stream).to(dtype)


def q_sample_reference(
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    dtype: torch.dtype,
    stream: Stream = Stream.TRAINING_NOISE,
) -> Tensor:
    """What `q_sample` computes, in the precision of the tables."""
    compute = sqrt_alpha_bar.dtype
    x_0 = clean_images(images, flip, compute)
    noise = training_noise(images, seed, sample_ids, compute, stream)
    signal = sqrt_alpha_bar[timesteps][:, None, None, None]
    sigma = sqrt_one_minus_alpha_bar[timesteps][:, None, None, None]
    x_t = signal * x_0 + sigma * noise
    return x_t.to(dtype).contiguous(memory_format=torch.channels_last)


@triton.jit
def load_elements(  # type: ignore[no-untyped-def]
    sample,
    elements,
    inside,
    stride_c,
    stride_h,
    stride_w,
    mirror,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    DENSE: tl.constexpr,
    MAY_MIRROR: tl.constexpr,
):
    """Elements of one sample by their channels-last index, in float32; zero where not `inside`.

    Args:
        sample: pointer to the sample's first element.
        elements: indices, int32 or int64.
        inside: mask.
        stride_c: in elements; likewise `stride_h`, `stride_w`. Not used of a dense sample.
        stride_h: of rows.
        stride_w: of columns.
        mirror: scalar; whether to take column WIDTH − 1 − w for column w.
        CHANNELS: constant, as is WIDTH, because it is divided by.
        WIDTH: of the image.
        DENSE: the sample lies in memory in the order of its indices.
        MAY_MIRROR: whether `mirror` can be true.
    """
    if DENSE:
        if MAY_MIRROR:
            # A branch, not a selection: images that are not mirrored keep their vector loads.
            if mirror:
                column = divide(elements, CHANNELS)
                column -= divide(column, WIDTH) * WIDTH
                source = elements + (WIDTH - 1 - 2 * column) * CHANNELS
                values = tl.load(sample + source, mask=inside, other=0).to(tl.float32)
            else:
                values = tl.load(sample + elements, mask=inside, other=0).to(tl.float32)
        else:
            values = tl.load(sample + elements, mask=inside, other=0).to(tl.float32)
    else:
        pixel = divide(elements, CHANNELS)
        channel = elements - pixel * CHANNELS
        row = divide(pixel, WIDTH)
        column = pixel - row * WIDTH
        if MAY_MIRROR:
            column = tl.where(mirror, WIDTH - 1 - column, column)
        source = channel * stride_c + row * stride_h + column * stride_w
        values = tl.load(sample + source, mask=inside, other=0).to(tl.float32)
    return values


@triton.jit
def divide(index, DIVISOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """index // DIVISOR of an index that is not negative, where unsigned division is cheaper."""
    if index.dtype == tl.int32:
        quotient = (index.to(tl.uint32) // DIVISOR).to(tl.int32)
    else:
        quotient = index // DIVISOR
    return quotient


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
    DENSE: tl.constexpr,
    FLIP: tl.constexpr,
):
    """x_0: elements of the image in [-1, 1], mirrored where `flip` says so, as `clean_images`."""
    mirror = False
    if FLIP:
        mirror = tl.load(flip + sample) != 0
    x_0 = load_elements(
        images + sample * stride_n, elements, inside, stride_c, stride_h, stride_w, mirror,
        CHANNELS, WIDTH, DENSE, FLIP,
    )  # fmt: skip
    if images.dtype.element_ty == tl.uint8:
        # The first step is exact, so this is rounded once, and both extremes are exact.
        x_0 = (2.0 * x_0 - 255.0) * 0.00392156862745098
    return x_0


@triton.jit
def tile_of(  # type: ignore[no-untyped-def]
    COUNT: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr
):
    """A program's part of a batch of samples of COUNT elements.

    COUNT is a constant, as the width is, so that finding the sample is no division, and where whole
    tiles cover it nothing is masked.

    Returns:
        The sample (int64), the tile's element indices in it, those of its counter blocks, and
        which elements exist.
    """
    TILES: tl.constexpr = (COUNT + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.uint32)
    sample = program // TILES
    tile = (program - sample * TILES).to(tl.int32)
    if WIDE:
        tile = tile.to(tl.int64)
    elements = tile * TILE + tl.arange(0, TILE)
    blocks = (tile * (TILE // 4) + tl.arange(0, TILE // 4)).to(tl.uint32)
    if COUNT % TILE == 0:  # noqa: SIM108 (Triton takes a branch on a constant, no selection)
        inside = tl.full((TILE,), True, tl.int1)
    else:
        inside = elements < COUNT
    return sample.to(tl.int64), elements, blocks, inside


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
    DENSE: tl.constexpr,
    FLIP: tl.constexpr,
    WIDE: tl.constexpr,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
):
    sample, elements, blocks, inside = tile_of(COUNT, TILE, WIDE)
    x_0 = clean_elements(
        images, flip, sample, elements, inside, stride_n, stride_c, stride_h, stride_w,
        CHANNELS, WIDTH, DENSE, FLIP,
    )  # fmt: skip
    noise = noise_elements(seed, sample_ids, sample, blocks, STREAM)
    t = tl.load(timesteps + sample)
    x_t = tl.load(sqrt_alpha_bar + t) * x_0 + tl.load(sqrt_one_minus_alpha_bar + t) * noise
    tl.store(out + sample * COUNT + elements, x_t.to(out.dtype.element_ty), mask=inside)


def is_dense(images: Tensor) -> bool:
    """Whether each sample of `[B, C, H, W]` is by itself contiguous in channels-last order."""
    _, channels, height, width = images.shape
    _, stride_c, stride_h, stride_w = images.stride()
    return (
        (channels == 1 or stride_c == 1)
        and (width == 1 or stride_w == channels)
        and (height == 1 or stride_h == width * channels)
    )


def is_wide(tile: int, *batches: Tensor) -> bool:
    """Whether indices within a sample, rounded up to whole tiles, need 64 bits."""
    return any(
        max(
            images[0].numel(),
            sum((n - 1) * s for n, s in zip(images.shape[1:], images.stride()[1:], strict=True)),
        )
        >= INDEX_LIMIT - tile
        for images in batches
        if len(images)
    )


def check_per_sample(batch: int, **values: Tensor | None) -> None:
    """Raise ValueError unless there is one value a sample: a kernel would read beyond the last."""
    for name, value in values.items():
        if value is not None and value.shape != (batch,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be ({batch},)")


def launch_q_sample(
    out: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    stream: int = _TRAINING,
) -> None:
    """Write x_t to `out`, `[B, C, H, W]` contiguous in channels-last memory format."""
    batch, channels, height, width = images.shape
    count = channels * height * width
    tile = tile_for("q_sample", images).fitted(count)
    with torch.cuda.device_of(images):
        _q_sample_kernel[(batch * triton.cdiv(count, tile.elements),)](
            out,
            images,
            timesteps.contiguous(),
            sqrt_alpha_bar.contiguous(),
            sqrt_one_minus_alpha_bar.contiguous(),
            seed,
            sample_ids.contiguous(),
            None if flip is None else flip.contiguous().view(torch.uint8),
            *images.stride(),
            COUNT=count,
            CHANNELS=channels,
            WIDTH=width,
            DENSE=is_dense(images),
            FLIP=flip is not None,
            WIDE=is_wide(tile.elements, images),
            STREAM=stream,
            TILE=tile.elements,
            **tile.options(),
        )


@torch.library.custom_op("ddpm::q_sample", mutates_args=())
def _op(
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    dtype: torch.dtype,
    stream: int = _TRAINING,
) -> Tensor:
    if not runs_triton(images) or sqrt_alpha_bar.dtype != torch.float32:
        return q_sample_reference(
            images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids, flip,
            dtype, Stream(stream),
        )  # fmt: skip
    out = torch.empty(
        images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    launch_q_sample(
        out, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids, flip,
        stream,
    )  # fmt: skip
    return out


@_op.register_fake
def _(
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    dtype: torch.dtype,
    stream: int = _TRAINING,
) -> Tensor:
    return torch.empty(
        images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
