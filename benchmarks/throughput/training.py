"""Every way of training that is measured, and whether it computes the same steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from benchmarks.throughput.subject import SEED, Subject
from torch import Tensor, nn

from ddpm_engine.data.dataset import Batch
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.training.ema import decays
from ddpm_engine.training.lr_schedule import learning_rate
from ddpm_engine.training.strategies.replicated import Replicated
from ddpm_kernels import Stream, gaussian_noise, random_integers

TOLERANCE = 1e-3
"""Of each loss and gradient norm, relative."""


@dataclass(frozen=True)
class Way:
    """One way of taking training steps; every step advances its own network."""

    name: str
    step: Callable[[], tuple[Tensor, Tensor]]
    """One optimizer step on the batch; returns loss and gradient norm, 0-dim and detached."""
    textbook_noise: bool
    """Whether it calls `torch.randn_like` and `torch.randint`."""


def batch_of(subject: Subject, size: int) -> Batch:
    """Random images: neither speed nor parity depends on what they show."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (size, *subject.unet.sample_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    return Batch(images, None, torch.arange(size))


def normalised(batch: Batch, device: torch.device) -> Tensor:
    """Images in [-1, 1], as torchvision's transforms hand them to a textbook loop."""
    return (batch.images.float() / 127.5 - 1).contiguous().to(device)


def engine_way(subject: Subject, batch: Batch, compiled: bool) -> Way:
    """What the `Trainer` does at each step, without reading data or reporting."""
    config, device = subject.config, subject.device
    model = subject.copy().train().requires_grad_()
    if compiled:
        model.compile_blocks()
    strategy = Replicated(model, config, device)
    objective = DenoisingObjective(
        subject.schedule, config.diffusion.prediction, TrainingInputs(SEED, device=device)
    )
    averages = decays(config.training).values()
    steps, skip = 0, torch.zeros((), device=device)

    def step() -> tuple[Tensor, Tensor]:
        nonlocal steps
        with strategy.accumulate(last=True):
            loss = objective(strategy.network, batch).mean()
            strategy.backward(loss)
        numbers = [learning_rate(config, steps), *(1 - decay(steps) for decay in averages)]
        rate, *shares = torch.tensor(numbers, dtype=torch.float64).to(device)
        norm = strategy.step(rate, torch.stack(shares), skip)
        steps += 1
        return loss.detach(), norm

    return Way("engine, compiled" if compiled else "engine, eager", step, textbook_noise=False)


def plain_way(subject: Subject, batch: Batch) -> Way:
    """A loop as tutorials write it, on the engine's eager network."""
    config = subject.config
    model = subject.copy().train().requires_grad_()
    average = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = optimizer_of(model, subject)
    images = normalised(batch, subject.device)
    alphas_cumprod = subject.schedule.alpha_bar.float().to(subject.device)
    steps = 0

    def step() -> tuple[Tensor, Tensor]:
        nonlocal steps
        set_rate(optimizer, subject, steps)
        t = torch.randint(0, len(alphas_cumprod), (len(images),), device=images.device)
        noise = torch.randn_like(images)
        alpha_bar = alphas_cumprod[t][:, None, None, None]
        noisy = alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise
        loss = F.mse_loss(model(noisy, t), noise)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for averaged, parameter in zip(average, model.parameters(), strict=True):
                averaged.lerp_(parameter, 1 - config.training.ema_decay)
        steps += 1
        return loss.detach(), norm

    return Way("plain loop", step, textbook_noise=True)


def peer_way(subject: Subject, batch: Batch) -> Way | None:
    """The recipe of diffusers' unconditional example; None if it is not installed."""
    try:
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel
    except ImportError:
        return None
    config = subject.config
    model = UNet2DModel.from_config(subject.twin.config)
    model.load_state_dict(subject.weights)
    model.to(subject.device).train()
    ema = EMAModel(
        model.parameters(), decay=config.training.ema_decay, use_ema_warmup=True,
        model_cls=UNet2DModel, model_config=model.config,
    )  # fmt: skip
    ema.to(subject.device)
    optimizer = optimizer_of(model, subject)
    scheduler = DDPMScheduler(
        num_train_timesteps=subject.schedule.timesteps,
        trained_betas=subject.schedule.betas.numpy(),
    )
    images = normalised(batch, subject.device)
    steps = 0

    def step() -> tuple[Tensor, Tensor]:
        nonlocal steps
        set_rate(optimizer, subject, steps)
        noise = torch.randn_like(images)
        t = torch.randint(
            0, scheduler.config.num_train_timesteps, (len(images),), device=images.device
        )
        noisy = scheduler.add_noise(images, noise, t)
        loss = F.mse_loss(model(noisy, t).sample.float(), noise.float())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        steps += 1
        return loss.detach(), norm

    return Way("diffusers' recipe", step, textbook_noise=True)


def optimizer_of(model: nn.Module, subject: Subject) -> torch.optim.Optimizer:
    """AdamW as a loop calls it, with the run's figures."""
    config = subject.config.optimizer
    return torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, eps=config.eps,
        weight_decay=config.weight_decay,
    )  # fmt: skip


def set_rate(optimizer: torch.optim.Optimizer, subject: Subject, steps: int) -> None:
    """Linear warm-up, as the run's."""
    config = subject.config.optimizer
    rate = config.learning_rate * min(1.0, (steps + 1) / max(config.warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = rate


def all_ways(subject: Subject, batch: Batch) -> list[Way]:
    """The plain loop first; the others are compared with it."""
    peer = peer_way(subject, batch)
    return [
        plain_way(subject, batch),
        *([] if peer is None else [peer]),
        engine_way(subject, batch, compiled=False),
        engine_way(subject, batch, compiled=True),
    ]


def first_steps(way: Way, batch: Batch, subject: Subject, steps: int) -> list[float]:
    """Loss and gradient norm of the first steps, with the engine's timesteps and noise."""
    patched: Any = nullcontext()
    if way.textbook_noise:
        positions = batch.positions.to(subject.device)
        shape = subject.unet.sample_shape
        noise = gaussian_noise(SEED, positions, shape, 0, Stream.TRAINING_NOISE).contiguous()
        t = random_integers(
            SEED, positions, subject.schedule.timesteps, 0, Stream.TRAINING_TIMESTEP
        )
        patched = mock.patch.multiple(
            torch, randn_like=lambda *_, **__: noise, randint=lambda *_, **__: t
        )
    with patched:
        return [value.item() for _ in range(steps) for value in way.step()]


def difference(found: list[float], standard: list[float]) -> float:
    """Largest relative difference; infinite if one is not finite."""
    pairs = zip(found, standard, strict=True)
    worst = [abs(a - b) / abs(b) if b else float("inf") for a, b in pairs]
    return max((one if one == one else float("inf")) for one in worst)
