"""Compile everything that a training step needs, before the first one."""

from __future__ import annotations

import torch

from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.distributed import world_size
from ddpm_engine.networks.base import Network
from ddpm_engine.objectives.base import Objective
from ddpm_engine.runtime import autocast


def precompile(
    model: Network, objective: Objective, config: RunConfig, device: torch.device
) -> None:
    """Run one step's forward and backward pass on black images; no weight or gradient changes.

    Args:
        model: network on the device, not yet given to a strategy, so ranks exchange nothing.
        objective: objective of the run.
        config: the run, for the shape of a rank's micro-batch.
        device: device of the network.
    """
    training = config.training
    count = training.batch_size // (world_size() * training.accumulation)
    images = torch.zeros(count, *model.sample_shape, dtype=torch.uint8)
    positions = torch.arange(count)
    labels = None if model.conditioning.null_class is None else torch.zeros_like(positions)
    batch = Batch(images.contiguous(memory_format=torch.channels_last), labels, positions)
    was_training = model.training
    model.train()
    with autocast(training.precision, device):
        loss = objective(model, batch.to(device)).mean()
    loss.backward()
    objective.end_step(None)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
