"""The networks that tests train and draw with: as small as ones with everything in them can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig
from ddpm_engine.networks.dit.config import DiTConfig
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

TINY_TEXT = replace(
    TINY,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
    cross_attention_dim=12,
)
"""The same for images with a text, of tokens of 12 channels."""

TINY_DIT = DiTConfig(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    norm="rms",
    qk_norm=True,
    rotary=True,
    feed_forward="swiglu",
    patch_bottleneck=6,
)
"""A transformer over 16 patches of RGB images of 8×8 pixels."""

TINY_AUTOENCODER = AutoencoderKLConfig(
    sample_size=(8, 16),
    in_channels=1,
    latent_channels=2,
    block_out_channels=(4, 8),
    norm_num_groups=2,
)
"""An autoencoder of grey images of 8×16 pixels, one latent for 2×2 of them."""

FAMILIES: dict[str, Any] = {"unet": TINY, "dit": TINY_DIT}
"""A network of each family, for what holds of all."""


def of_family(family: str, model: UNetConfig) -> Any:
    """The U-Net itself, or the network of another family for the same samples and classes."""
    if family == "unet":
        return model
    names = ("sample_size", "in_channels", "out_channels", "num_class_embeds")
    return replace(FAMILIES[family], **{name: getattr(model, name) for name in names})
