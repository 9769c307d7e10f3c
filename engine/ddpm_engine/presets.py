"""Ready-made configurations, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.networks.unet.config import UNetConfig
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


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__.replace("_", "-"): preset
    for preset in (
        digits,
        digits_classes,
        digits_upscale,
        digits_edm,
        photos,
        cifar10,
        cifar10_edm,
        celebahq256,
        lsun256,
    )
}
