"""The clean sample of latent diffusion, drawn from the moments of an autoencoder.

    x_0 = (mean + exp(log-variance / 2) ε′ − shift) · scale

Moments are stored once for each image, C channels of means and behind them C of log-variances, as
in diffusers' `DiagonalGaussianDistribution.parameters`, already clamped; a log-variance of −∞ is
that of an autoencoder without a distribution. ε′ is generated in registers from the counter map: of
`Stream.LATENT` and step 0, in the order of elements of a sample of C channels. So `q_sample` and
`denoising_loss` have the same x_0, to the bit, and there is no memory of it. A position draws the
same in every batch, and the positions of the next epoch draw anew.

A latent is never mirrored, for the latent of a mirrored image is another. Its moments are stored
beside those of the image, and who reads them chooses: half the bytes of handing over both.

Source: Kingma & Welling 2013, equation 10; Rombach et al. 2022, section 3.1 and appendix G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_kernels.gaussian_noise import gaussian_noise_reference
from ddpm_kernels.philox import Stream, interleave4, normals4
from ddpm_kernels.tiles import Tile
from ddpm_kernels.tiling import as_scalar, load_elements
from ddpm_kernels.triton_shim import tl, triton


def channels_of(images: Tensor, latent_scale: float | None) -> int:
    """Return the channels of a clean sample: half of those of moments `[B, 2C, H, W]`."""
    channels = images.shape[1]
    return channels if latent_scale is None else channels // 2


def tile_of_samples(tile: Tile, count: int, latent_scale: float | None) -> Tile:
    """Return the tile for samples of `count` elements.

    Half as many elements a thread of latents: those of two noises at a time spill on sm_100.
    """
    tile = tile.fitted(count)
    return tile if latent_scale is None else tile._replace(warps=2 * tile.warps)


def check_moments(
    images: Tensor, flip: Tensor | None, latent_scale: float | None, latent_shift: float
) -> None:
    """Check that what is given with a scale are moments, and that nothing mirrors them.

    Args:
        images: `[B, C, H, W]`, or moments, floating point `[B, 2C, H, W]`.
        flip: bool `[B]`, or None; None for moments.
        latent_scale: None for images.
        latent_shift: zero for images.

    Raises:
        ValueError: integers, an odd number of channels, or `flip`, with a scale; a shift without.
    """
    if latent_scale is None:
        if latent_shift != 0:
            raise ValueError(f"latent_shift is {latent_shift}, but latent_scale is None")
        return
    if not images.dtype.is_floating_point:
        raise ValueError(f"images are {images.dtype}; with latent_scale they must be moments")
    if images.shape[1] % 2:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; with latent_scale they must be moments, "
            "[B, 2C, H, W]"
        )
    if flip is not None:
        raise ValueError("flip mirrors images; give the moments of the mirrored image instead")


# --- Reference


def latents_reference(
    moments: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    dtype: torch.dtype,
    latent_scale: float,
    latent_shift: float,
) -> Tensor:
    """Draw x_0 `[B, C, H, W]` as `dtype` from moments `[B, 2C, H, W]`, as the module's formula."""
    _, channels, height, width = moments.shape
    noise = gaussian_noise_reference(
        seed, sample_ids, channels // 2, height, width, as_scalar(0, sample_ids.device),
        int(Stream.LATENT),
    ).to(dtype)  # fmt: skip
    mean, log_variance = (
        half.to(dtype, memory_format=torch.channels_last) for half in moments.chunk(2, dim=1)
    )
    deviation = log_variance.mul(0.5).exp()
    return torch.addcmul(mean, deviation, noise).sub_(latent_shift).mul_(latent_scale)


# --- Triton

_STREAM = tl.constexpr(int(Stream.LATENT))
_HALF_LOG2_E = tl.constexpr(0.7213475204444817)


@triton.jit
def latent_elements(  # type: ignore[no-untyped-def]
    moments,
    seed,
    sample_id,
    elements,
    blocks,
    inside,
    stride_c,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """x_0 of elements of one sample, as `latents_reference`; layout and strides of its moments."""
    a, b, c, d = normals4(seed, blocks, tl.full((), 0, tl.int64), sample_id, _STREAM)
    noise = interleave4(a, b, c, d)
    log_variance = load_elements(
        moments + tl.cast(stride_c, tl.int64) * CHANNELS, elements, inside,
        stride_c, stride_h, stride_w, False, CHANNELS, WIDTH, LAYOUT, False,
    )  # fmt: skip
    deviation = tl.exp2(log_variance * _HALF_LOG2_E)
    mean = load_elements(
        moments, elements, inside, stride_c, stride_h, stride_w,
        False, CHANNELS, WIDTH, LAYOUT, False,
    )  # fmt: skip
    # Fused by name, and no sum or product at the end that a caller's could be fused with: x_0 is
    # the same to the bit in every kernel.
    return (tl.fma(deviation, noise, mean) - SHIFT) * SCALE
