"""From a checkpoint on disk to a network that is ready to sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ddpm_engine.config import RunConfig, from_dict
from ddpm_engine.errors import UserError
from ddpm_engine.schedule import NoiseSchedule
from ddpm_engine.training.checkpoint import MANIFEST, Checkpoint, CheckpointStore, load_part, verify
from ddpm_engine.unet import UNet


@dataclass(frozen=True)
class Pretrained:
    """A trained network and what is needed to use it."""

    model: UNet
    """In eval mode, on the device asked for."""
    schedule: NoiseSchedule
    config: RunConfig
    """Of the run that trained it."""
    checkpoint: Checkpoint


def load_pretrained(
    path: Path, device: torch.device | str = "cpu", weights: str = "ema"
) -> Pretrained:
    """Load a run's newest sound checkpoint, or one checkpoint.

    Args:
        path: a run directory, or one `checkpoints/step-…` in it.
        device: where the network goes.
        weights: `"ema"`, or `"model"` for the weights without averaging.

    Raises:
        UserError: no checkpoint there, a damaged one, or one of another architecture.
    """
    if (path / MANIFEST).exists():
        checkpoint, rejected = verify(path)
    else:
        checkpoint, rejected = CheckpointStore(path / "checkpoints").newest()
    if checkpoint is None:
        reasons = "".join(f"\n       {reason}" for reason in rejected)
        raise UserError(
            f"there is no usable checkpoint in {path}{':' if reasons else ''}{reasons}\n"
            "       give a run directory of launch/train.py, or one of its checkpoints/step-…"
        )
    config = from_dict(checkpoint.state["config"], f"the configuration in {checkpoint.path}")
    model = UNet(config.model)
    load_part(checkpoint.path, weights, model.state_dict())
    model.to(device).eval().requires_grad_(False)
    return Pretrained(model, config.diffusion.build_schedule(), config, checkpoint)
