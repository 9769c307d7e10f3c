"""Ready-made configurations of latent diffusion; their shards are packed with an autoencoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.networks.dit.config import DiTConfig
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.number_presets import numbers_text
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.samplers.config import SamplingConfig

_CLIP_CHANNELS = 768
"""Channels of the tokens of CLIP ViT-L/14."""


def numbers_latents() -> RunConfig:
    """Two-digit numbers from captions on latents of 4×4×8: minutes on a laptop.

    Train the autoencoder of the preset numbers-autoencoder first.
    """
    base = numbers_text()
    return replace(
        base,
        out=Path("runs/numbers-latents"),
        data=replace(
            base.data,
            path=Path("data/numbers-latents"),
            autoencoder="runs/numbers-autoencoder",
        ),
        model=replace(
            base.model,
            sample_size=(4, 8),
            in_channels=4,
            out_channels=4,
            block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
    )


def dit_b_256() -> RunConfig:
    """DiT-B/2 on latents of ImageNet at 256×256 as Peebles & Xie 2023: 130M parameters, 400k steps.

    Network, learned variance, schedule, optimizer, batch, average, label dropout, flips and
    sampling are those of their code; they trained DiT-XL/2, `DiTConfig`'s default shape, for 7M
    steps. Its data are latents of 4×32×32 of Stable Diffusion's autoencoder (8×8 pixels each, scale
    0.18215), packed with those of mirrored images. Different from their code: gradients are
    clipped, and the average's warm-up is this engine's.
    """
    return RunConfig(
        out=Path("runs/dit-b-256"),
        data=DataConfig(path=Path("data/imagenet256-latents"), horizontal_flip=True, workers=8),
        model=DiTConfig(
            out_channels=8,
            num_layers=12,
            num_attention_heads=12,
            attention_head_dim=64,
            num_class_embeds=1001,
        ),
        objective=ObjectiveConfig(learned_variance=True),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0),
        training=TrainingConfig(steps=400_000, batch_size=256),
        sampling=SamplingConfig(steps=250, variance="learned_range", clip_x0=False),
        log=LogConfig(sample_count=16),
    )


def ldm_256() -> RunConfig:
    """Text to image at 256×256 on latents as Rombach et al. 2022: 860M parameters, 390k steps.

    Width, depth, heads, levels that attend to text, batch, learning rate and steps are those of
    their text-to-image model, LDM-KL-8 (table 15), the noise schedule and the average those of
    its code, 250 steps of DDIM those of section 4.3. Its data are latents of 4×32×32 of an
    autoencoder of 8×8 pixels each, with captions. Different from it: the text encoder is frozen and
    its tokens have the 768 channels of CLIP ViT-L/14, as in Stable Diffusion 1, where they train
    one of 1280 channels with the network; one text in ten is dropped; gradients are clipped; the
    learning rate warms up, and the average's warm-up is this engine's.
    """
    heads = 8
    widths = (320, 640, 1280, 1280)
    attends = (True, True, True, False)
    steps, first, last = 1000, 0.00085**0.5, 0.012**0.5  # the root of beta rises linearly
    return RunConfig(
        out=Path("runs/ldm-256"),
        data=DataConfig(path=Path("data/captioned256-latents"), workers=8),
        model=UNetConfig(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            block_out_channels=widths,
            down_block_types=tuple(
                "CrossAttnDownBlock2D" if level else "DownBlock2D" for level in attends
            ),
            up_block_types=tuple(
                "CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(attends)
            ),
            attention_head_dim=tuple(width // heads for width in widths),
            cross_attention_dim=_CLIP_CHANNELS,
            norm_eps=1e-5,
            downsample_padding=1,
            flip_sin_to_cos=True,
            freq_shift=0,
        ),
        diffusion=DiffusionConfig(
            betas=tuple((first + (last - first) * t / (steps - 1)) ** 2 for t in range(steps))
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=10_000),
        training=TrainingConfig(steps=390_000, batch_size=680),
        sampling=SamplingConfig(sampler="ddim", steps=250, clip_x0=False),
        log=LogConfig(sample_count=16, sample_steps=50),
    )
