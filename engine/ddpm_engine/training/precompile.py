"""Compile everything that a training step needs, before the first one."""

from __future__ import annotations

from dataclasses import replace

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
    text_length: int | None = None,
    latents: bool = False,
) -> None:
    """Run one step's forward and backward pass on black images; no weight or gradient changes.

    Args:
        model: network on the device, not yet given to a strategy, so ranks exchange nothing.
        objective: objective of the run.
        config: the run, for the shape of a rank's micro-batch.
        device: device of the network.
        half_weights: whether the strategy will keep weights in the run's half precision.
        text_length: tokens of every caption; None: the network takes no text.
        latents: whether batches hold moments of latents.
    """
    training = config.training
    count = training.batch_size // (world_size() * training.accumulation)
    batch = blank_batch(model, config, count, text_length, latents)
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


def blank_batch(
    model: Network,
    config: RunConfig,
    count: int,
    text_length: int | None = None,
    latents: bool = False,
) -> Batch:
    """Make a batch of zeros on the host, with everything that a step of the network reads.

    Args:
        model: the network.
        config: the run.
        count: number of samples.
        text_length: tokens of every caption; None: the network takes no text.
        latents: whether it holds moments of latents in place of images.
    """
    data, spec = config.data, model.conditioning
    channels, *sides = model.sample_shape
    positions = torch.arange(count)
    if latents:
        both = (2,) if data.horizontal_flip else ()
        images = torch.zeros(count, *both, 2 * channels, *sides, dtype=torch.float16)
    else:
        images = torch.zeros(count, channels, *sides, dtype=torch.uint8)
        images = images.contiguous(memory_format=torch.channels_last)
    batch = Batch(
        images,
        None if spec.null_class is None else torch.zeros_like(positions),
        positions,
    )
    embedding = model.sample_shape[0] if data.diffuse == "embeddings" else None
    if spec.vector is not None and data.vector == "image":
        embedding = spec.vector
    if embedding is not None:
        batch = replace(batch, embeddings=torch.zeros(count, embedding))
    if text_length is None:
        return batch
    half = torch.float16
    return replace(
        batch,
        text=torch.zeros(count, text_length, spec.text or 1, dtype=half),
        text_mask=torch.ones(count, text_length, dtype=torch.bool),
        pooled_text=torch.zeros(count, spec.vector or 1, dtype=half),
    )
