"""The forward process in closed form, from stored images to noisy ones: q(x_t | x_0).

    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 − ᾱ_t) ε        (Ho et al. 2020, equation 4)

x_0 is the image in [-1, 1]: a uint8 image is mapped there, and mirrored where asked, on the way in.
ε is drawn inside from the counter map, so noise is never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_kernels.dispatch import takes_op
from ddpm_kernels.philox import Stream, gaussian_noise


def q_sample(
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
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

    Returns:
        x_t, `[B, C, H, W]` of `dtype`, channels-last.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=images.device)
    call = torch.ops.ddpm.q_sample if takes_op(images) else q_sample_reference
    return call(
        images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids, flip, dtype
    )


def clean_images(images: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x_0: the images in [-1, 1] as `dtype`, mirrored where `flip` says so."""
    x_0 = images.to(dtype)
    if images.dtype == torch.uint8:
        x_0 = x_0 / 127.5 - 1
    if flip is not None:
        x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
    return x_0


def training_noise(images: Tensor, seed: Tensor, sample_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The ε that belongs to each sample of a training batch, `[B, C, H, W]`."""
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return gaussian_noise(seed, sample_ids, shape, 0, Stream.TRAINING_NOISE).to(dtype)


def q_sample_reference(
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What `q_sample` computes, in the precision of the tables."""
    compute = sqrt_alpha_bar.dtype
    x_0 = clean_images(images, flip, compute)
    noise = training_noise(images, seed, sample_ids, compute)
    signal = sqrt_alpha_bar[timesteps][:, None, None, None]
    sigma = sqrt_one_minus_alpha_bar[timesteps][:, None, None, None]
    x_t = signal * x_0 + sigma * noise
    return x_t.to(dtype).contiguous(memory_format=torch.channels_last)


_op = torch.library.custom_op("ddpm::q_sample", q_sample_reference, mutates_args=())


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
) -> Tensor:
    return torch.empty(
        images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
