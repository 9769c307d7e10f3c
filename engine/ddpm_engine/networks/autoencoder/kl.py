"""An autoencoder that is trained: diffusers' `AutoencoderKL` as a network of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.networks.autoencoder.autoencoder import LOGVAR_RANGE, Autoencoder, memory_format
from ddpm_engine.networks.autoencoder.config import KL
from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig, check_shape
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.files.layout import NETWORK_CONFIG
from ddpm_engine.networks.files.together import json_writer, write_together
from ddpm_engine.networks.files.weights import SAFETENSORS, weights_writer
from ddpm_engine.sizes import height_and_width

Moments = tuple[Tensor, Tensor]
"""Mean and log-variance of latents, `[B, C', h, w]` each."""


class AutoencoderKL(Network):
    """An encoder of images to a normal distribution of latents each, and a decoder of latents.

    Modules and parameters are those of diffusers' class of the same name.

    Args:
        config: the shape.

    Raises:
        UserError: a shape that cannot be built, or diffusers is not installed.

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2013; Rombach et al.,
    "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, appendix G.
    """

    config: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig) -> None:
        check_shape(config)
        super().__init__()
        self.config = config
        try:
            import diffusers
        except ImportError as error:
            raise UserError(
                "an autoencoder needs diffusers: pip install 'ddpm-engine[latents]'"
            ) from error
        whole = diffusers.AutoencoderKL(**config.arguments())
        self.encoder, self.decoder = whole.encoder, whole.decoder
        self.quant_conv, self.post_quant_conv = whole.quant_conv, whole.post_quant_conv
        self._lay_out()

    def forward(  # what it takes in place of a noise level is noise
        self, x: Tensor, noise_level: Tensor | None = None, conditioning: Conditioning | None = None
    ) -> tuple[Tensor, Moments]:
        """Encode images, and decode latents drawn from the distributions that they are encoded to.

        Args:
            x: `[B, C, H, W]` in [-1, 1], any memory format.
            noise_level: standard normal noise of the latents, `[B, C', h, w]`; None: the mean is
                decoded.
            conditioning: nothing is looked at.

        Returns:
            The reconstruction, `[B, C, H, W]`, and the moments; log-variances are in [-30, 20].
        """
        x = x.contiguous(memory_format=memory_format(x.device))
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        logvar = logvar.float().clamp(*LOGVAR_RANGE).to(logvar.dtype)
        latents = mean
        if noise_level is not None:
            latents = mean + (0.5 * logvar).exp() * noise_level.to(mean.dtype)
        return self.decoder(self.post_quant_conv(latents)), (mean, logvar)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the images."""
        return self.config.in_channels, *height_and_width(self.config.sample_size)

    @property
    def conditioning(self) -> ConditioningSpec:
        """No conditions."""
        return ConditioningSpec()

    def blocks(self) -> list[nn.Module]:
        """Return the levels of encoder and decoder, in the order of their use."""
        down, up = self.encoder.down_blocks, self.decoder.up_blocks
        return [*down, self.encoder.mid_block, self.decoder.mid_block, *up]

    def frozen(self, place: str = "") -> Autoencoder:
        """Return what encodes images and decodes latents by these weights, which it shares.

        Args:
            place: for messages.
        """
        config = self.config
        return Autoencoder(
            self,
            place,
            "",
            channels=config.latent_channels,
            factor=config.factor,
            image_channels=config.in_channels,
        )

    def save(self, folder: Path, scale: float) -> None:
        """Save as diffusers does: `open_autoencoder` and `AutoencoderKL.from_pretrained` read it.

        Args:
            folder: created if missing; files of an earlier save are replaced, all or none.
            scale: what latents are to be multiplied by.

        Raises:
            OSError: the folder cannot be written.
        """
        entries = {"_class_name": KL, **self.config.arguments(), "scaling_factor": scale}
        files = {
            # More metadata would be written in any order, and the same weights as other files.
            SAFETENSORS: weights_writer(self.state_dict(), {"format": "pt"}),
            NETWORK_CONFIG: json_writer(entries),
        }
        write_together(folder, files, [NETWORK_CONFIG])

    def _apply(self, fn: Any, recurse: bool = True) -> AutoencoderKL:
        """What `to`, `cuda` and the like do; another device may want another memory format."""
        super()._apply(fn, recurse)
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(
                    memory_format=memory_format(parameter.device)
                )
