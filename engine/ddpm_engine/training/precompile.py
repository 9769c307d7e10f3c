"""Compile everything that a training step needs, before the first one."""

from __future__ import annotations

import torch

from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.distributed import world_size
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.half_weights import half_names, to_half
from ddpm_engine.objectives.base import Objective
from ddpm_engine.runtime import DTYPES, autocast


def precompile(
    model: Network,
    objective: Objective,
    config: RunConfig,
    device: torch.device,
    *,
    half_weights: bool,
) -> None:
    """Run one step's forward and backward pass on black images; no weight or gradient changes.

    Args:
        model: network on the device, not yet given to a strategy, so ranks exchange nothing.
        objective: objective of the run.
        config: the run, for the shape of a rank's micro-batch.
        device: device of the network.
        half_weights: whether the strategy will keep weights in the run's half precision.
    """
    training = config.training
    count = training.batch_size // (world_size() * training.accumulation)
    images = torch.zeros(count, *model.sample_shape, dtype=torch.uint8)
    positions = torch.arange(count)
    labels = None if model.conditioning.null_class is None else torch.zeros_like(positions)
    batch = Batch(images.contiguous(memory_format=torch.channels_last), labels, positions)
    was_training = model.training
    model.train()
    whole = {name: model.get_parameter(name).data for name in half_names(model)}
    if half_weights and training.precision in DTYPES:
        to_half(model, DTYPES[training.precision])
    with autocast(training.precision, device):
        loss = objective(model, batch.to(device)).mean()
    loss.backward()
    objective.end_step(None)
    model.zero_grad(set_to_none=True)
    for name, data in whole.items():
        model.get_parameter(name).data = data
    model.train(was_training)
