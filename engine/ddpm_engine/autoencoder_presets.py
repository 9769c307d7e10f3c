"""Ready-made configurations of autoencoders, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig

_LOG = LogConfig(every=100, checkpoint_every=200, sample_every=200, sample_count=32)


def numbers_autoencoder() -> RunConfig:
    """Two-digit numbers at 16×32 to latents of 4×4×8: minutes on a laptop."""
    return RunConfig(
        out=Path("runs/numbers-autoencoder"),
        data=DataConfig(path=Path("data/numbers-images"), source="numbers", workers=1),
        model=AutoencoderKLConfig(
            sample_size=(16, 32), in_channels=1, block_out_channels=(16, 32, 64)
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        training=TrainingConfig(steps=800, batch_size=32, ema_decay=0.99),
        log=_LOG,
    )


def photos_autoencoder() -> RunConfig:
    """32×32 squares of scikit-learn's two photographs to latents of 4×8×8: minutes on a laptop."""
    return RunConfig(
        out=Path("runs/photos-autoencoder"),
        data=DataConfig(path=Path("data/photos"), source="photos", horizontal_flip=True, workers=1),
        model=AutoencoderKLConfig(block_out_channels=(16, 32, 64)),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        training=TrainingConfig(steps=1000, batch_size=16, ema_decay=0.99),
        log=_LOG,
    )


AUTOENCODERS: dict[str, Callable[[], RunConfig]] = {
    "numbers-autoencoder": numbers_autoencoder,
    "photos-autoencoder": photos_autoencoder,
}
