"""From a checkpoint on disk to a network that is ready to sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ddpm_engine.checkpoints.store import MANIFEST, Checkpoint, CheckpointStore, load_part, verify
from ddpm_engine.config import RunConfig, from_dict
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.interop.layout import NETWORK_CONFIG, find_layout, is_diffusers
from ddpm_engine.interop.network import read_unet
from ddpm_engine.interop.scheduler import read_scheduler
from ddpm_engine.networks.unet.unet import UNet

_FROM_THE_HUB = ". To fetch one from the Hugging Face hub: hf download NAME --local-dir DIR"


@dataclass(frozen=True)
class LoadedModel:
    """A trained network and what is needed to use it."""

    model: UNet
    """In eval mode, on the device asked for."""
    schedule: NoiseSchedule
    config: RunConfig
    """Of the run that trained it; for another library's model what its files say, else defaults."""
    hash: str
    """Identifies it: the checkpoint's hash, or the sha256 of another library's weight file."""
    checkpoint: Checkpoint | None = None
    """What was loaded; None for another library's model."""

    @property
    def clip(self) -> bool:
        """Whether samplers should clip their estimates of x_0 to [-1, 1]."""
        return self.config.sampling.clip_x0

    @property
    def step(self) -> int | None:
        """Optimizer steps it was trained for; None if unknown."""
        return None if self.checkpoint is None else self.checkpoint.step


def load_model(path: Path, device: torch.device | str = "cpu", weights: str = "ema") -> LoadedModel:
    """Load a run's newest sound checkpoint, or one checkpoint, or a model that diffusers saved.

    Args:
        path: a run directory, or one `checkpoints/step-…` in it, or the folder of a pipeline of
            diffusers.
        device: where the network goes.
        weights: of a run: `"ema"`, or `"model"` for the weights without averaging.

    Raises:
        UserError: no checkpoint there, a damaged one, or one of another architecture.
    """
    # A run is known by its checkpoints, so that nothing else in its directory need be sound.
    own = (path / MANIFEST).exists() or (path / "checkpoints").exists()
    foreign = not own and is_diffusers(path)
    pretrained = _load_diffusers(path) if foreign else _load_run(path, weights)
    pretrained.model.to(device).eval().requires_grad_(False)
    return pretrained


def _load_run(path: Path, weights: str) -> LoadedModel:
    if (path / MANIFEST).exists():
        checkpoint, rejected = verify(path)
    else:
        checkpoint, rejected = CheckpointStore(path / "checkpoints").newest()
    if checkpoint is None:
        reasons = "".join(f"\n       {reason}" for reason in rejected)
        raise UserError(
            f"there is no usable checkpoint in {path}{':' if reasons else ''}{reasons}\n"
            "       give a run directory of launch/train.py, one of its checkpoints/step-…, or the "
            f"folder of a diffusers model{'' if path.exists() else _FROM_THE_HUB}"
        )
    config = from_dict(checkpoint.state["config"], f"the configuration in {checkpoint.path}")
    model = UNet(config.model)
    load_part(checkpoint.path, weights, model.state_dict())
    plan = config.distillation
    if plan.teacher is not None:
        # Of an unfinished distillation, the student has not learnt such long steps yet.
        stage = plan.stage(max(checkpoint.step - 1, 0), config.training.steps)
        sampling = replace(config.sampling, steps=plan.student_steps(stage))
        config = replace(config, sampling=sampling)
    schedule = config.diffusion.build_schedule()
    return LoadedModel(model, schedule, config, checkpoint.hash, checkpoint)


def _load_diffusers(path: Path) -> LoadedModel:
    layout = find_layout(path)
    process = read_scheduler(layout.scheduler)
    loaded = read_unet(layout.network)
    shape = loaded.model.config
    outputs = shape.in_channels * (2 if process.sampling.variance.startswith("learned") else 1)
    if shape.out_channels != outputs:
        raise UserError(
            f"out_channels is {shape.out_channels} in {layout.network / NETWORK_CONFIG}: with "
            f"in_channels {shape.in_channels} and the variance {process.sampling.variance} of "
            f"{layout.scheduler} it must be {outputs}; one of the two files is of another model"
        )
    if loaded.model.conditioning.null_class != loaded.null_class:
        raise UserError(
            f"num_class_embeds is {shape.num_class_embeds} in {layout.network / NETWORK_CONFIG}, "
            "and nothing says that the last of these classes stands for no class, as it does in "
            "this engine: load the network with interop.network.load_unet and give labels yourself"
        )
    config = RunConfig(
        model=shape,
        diffusion=process.diffusion,
        sampling=process.sampling,
        distillation=process.distillation,
    )
    schedule = process.diffusion.build_schedule()
    return LoadedModel(loaded.model, schedule, config, loaded.hash)
