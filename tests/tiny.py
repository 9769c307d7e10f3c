"""The network that tests train and draw with: as small as one with everything in it can be."""

from __future__ import annotations

from dataclasses import replace

from ddpm_engine.networks.unet.config import UNetConfig

TINY = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
"""RGB images of 8×8 pixels, two levels, attention at the lower one."""

TINY_GREY = replace(TINY, in_channels=1, out_channels=1)
"""The same for images of one channel."""
