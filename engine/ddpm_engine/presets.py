"""Ready-made configurations, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.latent_presets import dit_b_256, ldm_256, numbers_latents
from ddpm_engine.networks.dit.config import DiTConfig
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.number_presets import (
    MINILM,
    MINILM_CHANNELS,
    numbers_base,
    numbers_decoder,
    numbers_prior,
    numbers_text,
    numbers_upscale,
)
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.samplers.config import SamplingConfig


def digits() -> RunConfig:
    """Scikit-learn's handwritten digits at 16×16: minutes on a laptop."""
    return RunConfig(
        out=Path("runs/digits"),
        data=DataConfig(path=Path("data/digits"), source="digits", workers=1),
        model=UNetConfig(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=200),
        training=TrainingConfig(steps=3000, batch_size=64, ema_decay=0.998),
        sampling=SamplingConfig(steps=250, variance="fixed_small"),
        log=LogConfig(every=100, checkpoint_every=500, sample_every=1000, sample_steps=50),
    )


def digits_classes() -> RunConfig:
    """The digits with their classes, and the null class, for classifier-free guidance."""
    base = digits()
    model = replace(base.model, num_class_embeds=11)
    return replace(base, out=Path("runs/digits-classes"), model=model)


def digits_upscale() -> RunConfig:
    """Super-resolution of digits from 8×8, scikit-learn's size, to 16×16."""
    base = digits()
    model = replace(base.model, low_resolution=8)
    return replace(base, out=Path("runs/digits-upscale"), model=model)


def photos() -> RunConfig:
    """32×32 squares of scikit-learn's two photographs, in colour: minutes on a laptop."""
    return RunConfig(
        out=Path("runs/photos"),
        data=DataConfig(path=Path("data/photos"), source="photos", horizontal_flip=True, workers=1),
        model=UNetConfig(
            sample_size=32,
            block_out_channels=(16, 32, 64, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=200),
        training=TrainingConfig(steps=3000, batch_size=32, ema_decay=0.998),
        sampling=SamplingConfig(steps=250, variance="fixed_small"),
        log=LogConfig(every=100, checkpoint_every=500, sample_every=1000, sample_steps=50),
    )


def photos_text() -> RunConfig:
    """Images of one's own at 32×32, in colour, from captions: hours on a laptop."""
    base = photos()
    return replace(
        base,
        out=Path("runs/photos-text"),
        data=DataConfig(path=Path("data/photos-text"), text_encoder=MINILM, workers=1),
        model=replace(
            base.model,
            block_out_channels=(32, 64, 128, 128),
            down_block_types=(
                "DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D",
            ),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            cross_attention_dim=128,
            encoder_hid_dim=MINILM_CHANNELS,
        ),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
        training=TrainingConfig(steps=10_000, batch_size=32, ema_decay=0.999),
        sampling=SamplingConfig(sampler="dpm++2m", steps=25),
        log=replace(base.log, sample_count=16, sample_steps=25),
    )  # fmt: skip


def digits_edm() -> RunConfig:
    """The digits, trained and sampled as EDM does."""
    preset = digits()
    return replace(
        preset,
        out=Path("runs/digits-edm"),
        diffusion=DiffusionConfig(schedule="edm", prediction="edm"),
        sampling=SamplingConfig(sampler="heun", steps=18),
        log=replace(preset.log, sample_steps=18),
    )


def digits_flow() -> RunConfig:
    """The digits by flow matching: straight lines, logit-normal levels (Esser et al. 2024)."""
    preset = digits()
    return replace(
        preset,
        out=Path("runs/digits-flow"),
        diffusion=DiffusionConfig(schedule="flow", prediction="flow"),
        objective=ObjectiveConfig(timestep_sampling="logit-normal"),
        sampling=SamplingConfig(sampler="heun", steps=18),
        log=replace(preset.log, sample_steps=18),
    )


def digits_dit() -> RunConfig:
    """The digits by a transformer of 0.3M parameters, with what later work made standard."""
    preset = digits()
    return replace(
        preset,
        out=Path("runs/digits-dit"),
        model=DiTConfig(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            num_layers=4,
            num_attention_heads=4,
            attention_head_dim=16,
            norm="rms",
            qk_norm=True,
            rotary=True,
            feed_forward="swiglu",
        ),
    )


def cifar10() -> RunConfig:
    """CIFAR-10 as Ho et al. 2020: 35.7M parameters, 800k steps."""
    return RunConfig(
        out=Path("runs/cifar10"),
        data=DataConfig(path=Path("data/cifar10"), horizontal_flip=True),
        model=UNetConfig(dropout=0.1),
    )


def cifar10_edm() -> RunConfig:
    """CIFAR-10 without classes as Karras et al. 2022: 200 million images in batches of 512.

    Width, depth, attention at 16×16, dropout, learning rate, warm-up, half-life of the average
    (500k images) and sampling are those of their configuration for DDPM++. Different from it:
    images are mirrored and not augmented otherwise, where theirs are transformed geometrically with
    probability 0.12, as a condition; residual sums are not divided by sqrt(2); images
    are halved and doubled between residual blocks, not in them; on the way up all blocks of the
    16×16 level attend, not the last alone; initial weights are torch's; gradients are clipped; the
    average's warm-up is this engine's.
    """
    batch = 512
    return RunConfig(
        out=Path("runs/cifar10-edm"),
        data=DataConfig(path=Path("data/cifar10"), horizontal_flip=True),
        model=UNetConfig(
            block_out_channels=(256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=4,
            dropout=0.13,
        ),
        diffusion=DiffusionConfig(schedule="edm", prediction="edm"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10_000_000 // batch),
        training=TrainingConfig(
            steps=200_000_000 // batch, batch_size=batch, ema_decay=0.5 ** (batch / 500_000)
        ),
        sampling=SamplingConfig(sampler="heun", steps=18),
        log=LogConfig(sample_steps=18),
    )


def cifar10_flow() -> RunConfig:
    """CIFAR-10 without classes by flow matching: I-CFM of Tong et al. 2024, 400k steps.

    Network, attention heads of 64 channels, dropout, batch, learning rate, warm-up, clipping,
    average, flips and uniform levels are those of their code (`examples/images/cifar10` of
    torchcfm), which are those of Ho et al. 2020 but for heads and steps. Different from it: initial
    weights are torch's; Heun in 18 steps, 35 evaluations, where they take 100 of Euler or solve
    adaptively.
    """
    return RunConfig(
        out=Path("runs/cifar10-flow"),
        data=DataConfig(path=Path("data/cifar10"), horizontal_flip=True),
        model=UNetConfig(attention_head_dim=64, dropout=0.1),
        diffusion=DiffusionConfig(schedule="flow", prediction="flow"),
        training=TrainingConfig(steps=400_000),
        sampling=SamplingConfig(sampler="heun", steps=18),
        log=LogConfig(sample_steps=18),
    )


def _paper256(name: str, steps: int) -> RunConfig:
    attending = 4  # the 16×16 level
    return RunConfig(
        out=Path("runs") / name,
        data=DataConfig(path=Path("data") / name, workers=8),
        model=UNetConfig(
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=tuple(
                "AttnDownBlock2D" if level == attending else "DownBlock2D" for level in range(6)
            ),
            up_block_types=tuple(
                "AttnUpBlock2D" if level == attending else "UpBlock2D"
                for level in reversed(range(6))
            ),
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5),
        training=TrainingConfig(steps=steps, batch_size=64),
        sampling=SamplingConfig(variance="fixed_small"),
    )


def celebahq256() -> RunConfig:
    """CelebA-HQ at 256×256 as Ho et al. 2020: 114M parameters, 500k steps."""
    return _paper256("celebahq256", steps=500_000)


def lsun256() -> RunConfig:
    """LSUN Bedroom at 256×256 as Ho et al. 2020: 2.4M steps (Cat: 1.8M, Church: 1.2M)."""
    return _paper256("lsun256", steps=2_400_000)


def jit_b_64() -> RunConfig:
    """JiT-B/4 on pixels of ImageNet at 64×64 as Li & He 2025: 131M parameters, 600 epochs.

    Network, prediction of x_0 under the loss of the velocity with its denominator bounded by 0.05,
    levels, optimizer, batch, warm-up, average, label dropout, flips and 50 steps of Heun are those
    of their code. Different from it: the class enters by modulation alone, where theirs has 32
    tokens of it as well from the fourth block on; the network is conditioned on a timestep of
    1000; gradients are clipped; the average's warm-up is this engine's, and its decay the longest
    of those that they choose from; the bound on the denominator holds in training alone.
    """
    batch, images = 1024, 1_281_167
    return RunConfig(
        out=Path("runs/jit-b-64"),
        data=DataConfig(path=Path("data/imagenet64"), horizontal_flip=True, workers=8),
        model=DiTConfig(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            patch_size=4,
            num_layers=12,
            num_attention_heads=12,
            attention_head_dim=64,
            num_class_embeds=1001,
            norm="rms",
            qk_norm=True,
            rotary=True,
            feed_forward="swiglu",
            patch_bottleneck=128,
        ),
        diffusion=DiffusionConfig(schedule="flow", prediction="x0"),
        objective=ObjectiveConfig(
            loss="flow",
            loss_limit=1 / 0.05**2,
            timestep_sampling="logit-normal",
            logit_mean=0.8,
            logit_std=0.8,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, warmup_steps=5 * images // batch, betas=(0.9, 0.95)
        ),
        training=TrainingConfig(steps=600 * images // batch, batch_size=batch),
        sampling=SamplingConfig(sampler="heun", steps=50, clip_x0=False),
        log=LogConfig(sample_steps=50),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__.replace("_", "-"): preset
    for preset in (
        digits,
        digits_classes,
        digits_upscale,
        digits_edm,
        digits_flow,
        digits_dit,
        numbers_text,
        numbers_base,
        numbers_upscale,
        numbers_prior,
        numbers_decoder,
        numbers_latents,
        photos,
        photos_text,
        cifar10,
        cifar10_edm,
        cifar10_flow,
        celebahq256,
        lsun256,
        dit_b_256,
        ldm_256,
        jit_b_64,
    )
}
