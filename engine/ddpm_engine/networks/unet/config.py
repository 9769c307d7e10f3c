"""Configuration of the U-Net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; names and meaning as in diffusers' `UNet2DModel`."""

    sample_size: int = 32
    """Image side in pixels."""
    in_channels: int = 3
    """Channels of the noisy image."""
    out_channels: int = 3
    """Channels predicted."""
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    """Channels of each resolution level, highest resolution first."""
    down_block_types: tuple[Literal["DownBlock2D", "AttnDownBlock2D"], ...] = (
        "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D",
    )  # fmt: skip
    """Which levels attend, on the way down."""
    up_block_types: tuple[Literal["UpBlock2D", "AttnUpBlock2D"], ...] = (
        "UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D",
    )  # fmt: skip
    """Which attend, on the way up, lowest first."""
    layers_per_block: int = 2
    """Residual blocks of each level on the way down (one more on the way up)."""
    attention_head_dim: int | None = None
    """Channels of an attention head; None: one head."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    attn_norm_num_groups: int | None = None
    """Those of the middle attention; None: the same, or no norm if scale_shift."""
    norm_eps: float = 1e-6
    """Epsilon of every GroupNorm."""
    dropout: float = 0.0
    """Share of activations dropped inside the residual blocks, 0 to 1."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """The time embedding is added, or is scale and shift of the second norm."""
    downsample_padding: int = 0
    """0: pad right and bottom by one, as the paper's code; 1: pad all sides."""
    mid_block_scale_factor: float = 1.0
    """The middle block's residual sums are divided by this."""
    flip_sin_to_cos: bool = False
    """Time embedding as [cos, sin] instead of the paper's [sin, cos]."""
    freq_shift: int = 1
    """Subtracted from the frequency count in the time embedding's exponent."""
    num_class_embeds: int | None = None
    """Rows of the class embedding, null class included; None: unconditional."""
    low_resolution: int | None = None
    """Side in pixels of the small image that the network enlarges, a divisor of the sample size;
    None: it is shown none."""
    attention: Literal["sdpa", "xformers", "auto"] = "sdpa"
    """Whose kernel: torch's, xformers', or the best available."""
