"""Autoencoders of each kind, as small as ones with everything in them can be, in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

KL: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 8, 16],
    "norm_num_groups": 4,
    "sample_size": 32,
}
"""Of 4 pixels a latent."""
TINY: dict[str, Any] = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}
"""Of 2 pixels a latent."""


def kl_folder(folder: Path, seed: int = 0, variant: str | None = None, **config: Any) -> str:
    """Save an `AutoencoderKL` of diffusers with random weights; return its place."""
    return _save("AutoencoderKL", KL | config, folder, seed, variant)


def tiny_folder(folder: Path, seed: int = 0, variant: str | None = None, **config: Any) -> str:
    """Save an `AutoencoderTiny` of diffusers with random weights; return its place."""
    return _save("AutoencoderTiny", TINY | config, folder, seed, variant)


def _save(kind: str, config: dict[str, Any], folder: Path, seed: int, variant: str | None) -> str:
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(diffusers, kind)(**config)
        for name, parameter in model.named_parameters():
            # Norms and biases as they are after training: neither ones nor zeros.
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
            elif kind == "AutoencoderTiny" and name.endswith("weight"):
                parameter.data *= 1.5
    if variant == "fp16":
        model.half()
    model.save_pretrained(folder, variant=variant)
    return str(folder)
