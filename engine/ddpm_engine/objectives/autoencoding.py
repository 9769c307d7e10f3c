"""The objective of an autoencoder: the error of its reconstruction, and how far latents may stray.

    L = mean |D(z) − x| + λ · mean ½ (μ² + σ² − 1 − ln σ²),        z = μ + σ ε,   (μ, σ) = E(x)

Means are taken over the values of an image and over those of its latents, so that λ is in units of
the error for each nat of a latent. The noise ε is a pure function of the seed and the sample's
position. Not done here are the perceptual and the adversarial term of Rombach et al., whose
networks would have to be trained, or trusted, first: images come out softer than theirs.

Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2013; Rombach et al., "High-Resolution
Image Synthesis with Latent Diffusion Models", 2022, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.objectives.base import Network, Objective
from ddpm_engine.objectives.inputs import PreparedBatch, TrainingInputs
from ddpm_kernels import Stream, gaussian_noise


class AutoencodingObjective(Objective):
    """The absolute error of reconstructions, and the divergence of latents from normal noise.

    Args:
        inputs: mirrored images, and the seed of the noise.
        latent_shape: `(channels, height, width)` of the latents.
        kl_weight: λ.
        dtype: of the arithmetic.
    """

    def __init__(
        self,
        inputs: TrainingInputs,
        latent_shape: tuple[int, int, int],
        kl_weight: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.inputs = inputs
        self.latent_shape = latent_shape
        self.kl_weight = kl_weight
        self.dtype = dtype

    def __call__(self, network: Network, batch: Batch) -> Tensor:
        """See `Objective`; the network is an `AutoencoderKL`."""
        prepared = self.inputs.prepare(batch)
        x = _clean(prepared).to(self.dtype)
        noise = gaussian_noise(
            self.inputs.seed, prepared.positions, self.latent_shape, 0, Stream.LATENT
        )
        reconstruction, moments = network(x, noise)
        mean, logvar = (part.to(self.dtype) for part in moments)
        error = (reconstruction.to(self.dtype) - x).abs().mean(dim=(1, 2, 3))
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(1, 2, 3))
        return error + self.kl_weight * divergence


def _clean(batch: PreparedBatch) -> Tensor:
    """Return the images of a batch, some mirrored, `[B, C, H, W]` in [-1, 1]."""
    images = batch.images
    if images.dtype == torch.uint8:
        images = PixelCodec().encode(images)
    if batch.flip is None:
        return images
    return torch.where(batch.flip[:, None, None, None], images.flip(-1), images)
