"""Configuration of an autoencoder that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from ddpm_engine.bounds import Ge, Le, out_of_bounds
from ddpm_engine.errors import UserError
from ddpm_engine.sizes import Size, as_text, height_and_width


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Shape of an autoencoder; names are those of diffusers' `AutoencoderKL`."""

    sample_size: Annotated[Size, Ge(1), Le(2**15)] = 32
    """Side of the images in pixels, or height and width; multiples of the pixels of a latent."""
    in_channels: Annotated[int, Ge(1), Le(3)] = 3
    """Channels of the images: 1 (grey) or 3 (RGB)."""
    latent_channels: Annotated[int, Ge(1), Le(2**10)] = 4
    """Channels of the latents."""
    block_out_channels: tuple[Annotated[int, Ge(1), Le(2**16)], ...] = (32, 64, 64)
    """Channels of each level; from each to the next, sides are halved, so that three levels make
    one latent of 4×4 pixels."""
    layers_per_block: Annotated[int, Ge(1), Le(1000)] = 1
    """Residual blocks of a level of the encoder; the decoder has one more."""
    norm_num_groups: Annotated[int, Ge(1), Le(2**16)] = 8
    """Groups of every GroupNorm, which divide the channels of every level."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution."""

    @property
    def out_channels(self) -> int:
        """Channels of the reconstruction."""
        return self.in_channels

    @property
    def num_class_embeds(self) -> None:
        """None: it knows no classes."""
        return None

    @property
    def factor(self) -> int:
        """Pixels along a side for each latent."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the latents."""
        height, width = height_and_width(self.sample_size)
        return self.latent_channels, height // self.factor, width // self.factor

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of diffusers' class, as JSON values."""
        levels = len(self.block_out_channels)
        return {
            "in_channels": self.in_channels,
            "out_channels": self.in_channels,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "sample_size": max(height_and_width(self.sample_size)),
            "mid_block_add_attention": self.mid_block_add_attention,
        }

    def problems(self) -> Iterator[UserError]:
        """Report every reason why this autoencoder cannot be built, each with its remedy."""
        values = list(out_of_bounds(self))
        yield from values
        if values:
            return
        if self.in_channels == 2:
            yield UserError("`in_channels` is 2; images have 1 or 3 channels", "in_channels")
        levels = len(self.block_out_channels)
        if not 1 <= levels <= 7:
            yield UserError(
                f"`block_out_channels` has {levels} levels; give 1 to 7", "block_out_channels"
            )
            return
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            yield UserError(
                f"`norm_num_groups` is {self.norm_num_groups}, which does not divide all of "
                f"`block_out_channels` {self.block_out_channels}",
                "norm_num_groups",
            )
        if any(side % self.factor for side in height_and_width(self.sample_size)):
            yield UserError(
                f"`sample_size` is {as_text(self.sample_size)}, and with {levels} levels of "
                f"`block_out_channels` a latent is of {self.factor}×{self.factor} pixels; give "
                f"multiples of {self.factor}, or fewer levels",
                "sample_size",
            )


def check_shape(config: AutoencoderKLConfig) -> None:
    """Check that an autoencoder of this shape can be built.

    Raises:
        UserError: it cannot; the message lists every problem, each with its remedy.
    """
    if found := list(config.problems()):
        listed = "".join(f"\n  - {one}" for one in found)
        raise UserError(f"this autoencoder cannot be built:{listed}")
