"""Super-resolution: the low-resolution image that conditions a network, and its augmentation.

The image is upsampled by interpolation, a little noise is added, and the network is given the level
of that noise (noise-conditioning augmentation). The noise hides the differences between samples of
another model and downsampled real images, so that a network trained on the latter applies to the
former.

Source: Ho et al., "Cascaded Diffusion Models for High Fidelity Image Generation", 2022, section 4;
Saharia et al., "Photorealistic Text-to-Image Diffusion Models", 2022, section 2.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_engine.diffusion.config import MAX_LEVEL
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.sizes import Size, height_and_width
from ddpm_kernels import Stream, q_sample
from ddpm_kernels.q_sample import clean_images


def downsample(images: Tensor, size: Size) -> Tensor:
    """Downsample images by averaging blocks of pixels, as area interpolation does.

    Args:
        images: `[B, C, H, W]`, uint8, or floating point in [-1, 1].
        size: of the result; its height h and width w divide H and W.

    Returns:
        float32 `[B, C, h, w]` in [-1, 1].
    """
    height, width = height_and_width(size)
    clean = clean_images(images, None, torch.float32)
    return F.avg_pool2d(clean, (images.shape[2] // height, images.shape[3] // width))


def upsample(images: Tensor, size: Size) -> Tensor:
    """Upsample images by bilinear interpolation between the centres of pixels.

    Args:
        images: float `[B, C, h, w]`.
        size: of the result, H not below h and W not below w.

    Returns:
        `[B, C, H, W]` of the same dtype.
    """
    return F.interpolate(images, height_and_width(size), mode="bilinear", align_corners=False)


class NoiseConditioningAugmentation:
    """Upsamples low-resolution images and adds noise, for the network to see beside x_t.

    Level 0 adds no noise; level s > 0 is the state after s steps of the linear chain of Ho et al.
    2020, whichever schedule the network itself was trained on. So a level means the same in every
    network of a cascade.

    Args:
        device: of the images.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        chain = NoiseSchedule.linear(MAX_LEVEL)
        tables = chain.sqrt_alpha_bar, chain.sqrt_one_minus_alpha_bar
        self._signal, self._sigma = (
            torch.cat([torch.full((1,), clean, dtype=torch.float64), table]).to(
                device, torch.float32
            )
            for clean, table in zip((1.0, 0.0), tables, strict=True)
        )

    def __call__(
        self,
        images: Tensor,
        size: Size,
        levels: Tensor,
        seed: int | Tensor,
        sample_ids: Tensor,
        flip: Tensor | None = None,
    ) -> Tensor:
        """Upsample and noise a batch; the noise is a function of the seed and each sample's id.

        Args:
            images: float32 `[B, C, h, w]` in [-1, 1].
            size: of the result, H and W.
            levels: int64 `[B]` in [0, `MAX_LEVEL`].
            seed: of the noise, 64 bits.
            sample_ids: int64 `[B]`; in training, the samples' positions.
            flip: bool `[B]`: whether to mirror each, or None.

        Returns:
            float32 `[B, C, H, W]`, channels-last.
        """
        return q_sample(
            upsample(images, size), levels, self._signal, self._sigma, seed, sample_ids, flip,
            stream=Stream.AUGMENTATION_NOISE,
        )  # fmt: skip
