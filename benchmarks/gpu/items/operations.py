"""Each fused operation beside the same job of torch's own, and beside a copy of its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from benchmarks.gpu import textbook
from benchmarks.gpu.item import Context
from benchmarks.gpu.timing import (
    BEYOND_CACHES,
    REPEATS,
    Arguments,
    Job,
    Way,
    compiled,
    measure,
    normals,
    timer_of,
)
from torch import Tensor

from ddpm_kernels import (
    Column,
    adamw_step,
    denoising_loss,
    gradient_norm,
    q_sample,
    reverse_step,
)
from ddpm_kernels.dispatch import force_ops

Shapes = Sequence[tuple[int, ...]]

STEPS = 1000
LATENTS = ((256, 4, 32, 32), (128, 4, 64, 64))
"""Shapes of latents of 256 and 512 pixels, as Stable Diffusion's autoencoder has them."""


def three_ways(ours: Way, textbook: Callable[..., object], device: torch.device) -> dict[str, Way]:
    """Return ours, the textbook's, and that compiled."""
    return {"engine": ours, "textbook": textbook, "compiled": compiled(textbook, device)}


def training_batch(shape: tuple[int, ...], device: torch.device) -> Arguments:
    """Return what the forward process and its loss share, images as a loader leaves them."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    ids = torch.arange(shape[0], device=device)
    return {
        "images": images.contiguous(memory_format=torch.channels_last),
        "timesteps": ids * 17 % STEPS,
        "seed": torch.full((), 5, device=device),
        "sample_ids": ids,
    }


def q_sample_jobs(device: torch.device, shapes: Shapes) -> Iterator[Job]:
    """Must read the images and write x_t."""
    alpha_bar = torch.linspace(0.99, 0.01, STEPS, device=device)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    for shape in shapes:
        dtype, size = torch.bfloat16, 2 * prod(shape)
        shared = training_batch(shape, device)

        def make(given: Arguments = shared) -> Arguments:
            return {**given, "images": given["images"].clone()}

        def ours(
            images: Tensor, timesteps: Tensor, dtype: torch.dtype = dtype, **given: Any
        ) -> object:
            return q_sample(images, timesteps, signal, sigma, **given, dtype=dtype)

        def theirs(
            images: Tensor, timesteps: Tensor, dtype: torch.dtype = dtype, **_: Any
        ) -> object:
            return textbook.q_sample(images, signal[timesteps], sigma[timesteps], dtype)

        ways = three_ways(ours, theirs, device)
        yield Job("q_sample", shape, dtype, prod(shape) + size, make, ways)


def denoising_loss_jobs(device: torch.device, shapes: Shapes) -> Iterator[Job]:
    """Loss of the noise, and its gradient: must read the prediction and write the gradient."""
    ones = torch.ones(STEPS, device=device)
    for shape in shapes:
        dtype, size = torch.bfloat16, 2 * prod(shape)
        shared = training_batch(shape, device)
        shared["weights"] = torch.ones(shape[0], device=device)

        def make(
            given: Arguments = shared, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> Arguments:
            prediction = normals(shape, dtype, device).requires_grad_()
            return {**given, "prediction": prediction, "noise": normals(shape, dtype, device)}

        def ours(noise: Tensor, prediction: Tensor, **given: Any) -> object:
            loss = denoising_loss(prediction, target_x0=None, target_noise=ones, **given)
            return torch.autograd.grad(loss.mean(), prediction)

        def theirs(
            prediction: Tensor, noise: Tensor, weights: Tensor, loss: Way = textbook.loss, **_: Any
        ) -> object:
            losses: Any = loss(prediction, noise, weights)
            return torch.autograd.grad(losses.mean(), prediction)

        ways: dict[str, Way] = {
            "engine": ours,
            "textbook": theirs,
            "compiled": partial(theirs, loss=compiled(textbook.loss, device)),
        }
        yield Job("denoising_loss and gradient", shape, dtype, 2 * size, make, ways)


def latent_jobs(device: torch.device, shapes: Shapes) -> Iterator[Job]:
    """Noise latents drawn from moments, and take the loss of v: must read the moments each time.

    The textbook's keeps its target.
    """
    alpha_bar = torch.linspace(0.99, 0.01, STEPS, device=device)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    scaling: dict[str, Any] = {"latent_scale": 0.18215, "latent_shift": 0.0}
    for batch, channels, *pixels in shapes:
        shape, dtype = (batch, channels, *pixels), torch.bfloat16
        shared = training_batch(shape, device)
        size, read = 2 * prod(shape), 4 * prod(shape)
        weights = torch.ones(batch, device=device)

        def make(
            given: Arguments = shared, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> Arguments:
            moments = normals((shape[0], 2 * shape[1], *shape[2:]), torch.float16, device)
            return {**given, "images": moments.contiguous()}

        def make_loss(
            make: Callable[[], Arguments] = make,
            shape: tuple[int, ...] = shape,
            dtype: torch.dtype = dtype,
        ) -> Arguments:
            prediction = normals(shape, dtype, device).requires_grad_()
            return {**make(), "prediction": prediction, "target": normals(shape, dtype, device)}

        def noised(timesteps: Tensor, images: Tensor, seed: Tensor, sample_ids: Tensor) -> object:
            return q_sample(
                images, timesteps, signal, sigma, seed, sample_ids, dtype=torch.bfloat16, **scaling
            )

        def noised_by_textbook(timesteps: Tensor, images: Tensor, **_: Any) -> object:
            x_0 = textbook.latents(images, **scaling)
            return textbook.mix(x_0, signal[timesteps], sigma[timesteps], torch.bfloat16)

        def loss(
            target: Tensor, prediction: Tensor, weights: Tensor = weights, **given: Any
        ) -> object:
            losses = denoising_loss(
                prediction, target_x0=sigma, target_noise=signal, weights=weights, **given,
                **scaling,
            )  # fmt: skip
            return torch.autograd.grad(losses.mean(), prediction)

        def loss_by_textbook(
            prediction: Tensor,
            target: Tensor,
            weights: Tensor = weights,
            loss: Way = textbook.loss,
            **_: Any,
        ) -> object:
            losses: Any = loss(prediction, target, weights)
            return torch.autograd.grad(losses.mean(), prediction)

        yield Job(
            "q_sample of moments", shape, dtype, read + size, make,
            three_ways(noised, noised_by_textbook, device),
        )  # fmt: skip
        yield Job(
            "denoising_loss of moments and gradient", shape, dtype, read + 2 * size, make_loss, {
                "engine": loss,
                "textbook": loss_by_textbook,
                "compiled": partial(loss_by_textbook, loss=compiled(textbook.loss, device)),
            },
        )  # fmt: skip


def reverse_step_jobs(device: torch.device, shapes: Shapes) -> Iterator[Job]:
    """Must read the output, and read and write the state, which is float32."""
    for shape in shapes:
        dtype, size = torch.bfloat16, 2 * prod(shape)
        shared = {
            # A chain that stays in bounds, however often it is stepped.
            "table": torch.full((5, Column.HISTORY), 0.25, device=device),
            "row": torch.full((), 3, device=device),
            "seed": torch.full((), 5, device=device),
            "sample_ids": torch.arange(shape[0], device=device),
        }

        def make(
            given: Arguments = shared, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> Arguments:
            x, output = normals(shape, torch.float32, device), normals(shape, dtype, device)
            return {"x": x, "output": output, **given}

        def theirs(x: Tensor, output: Tensor, table: Tensor, row: Tensor, **_: Any) -> Tensor:
            return textbook.reverse_step(x, output, table.index_select(0, row[None])[0])

        ways = three_ways(partial(reverse_step, in_place=True), theirs, device)
        yield Job("reverse_step", shape, dtype, 8 * prod(shape) + size, make, ways)


def adamw_step_jobs(device: torch.device, sizes: Sequence[int]) -> Iterator[Job]:
    """Must read gradient, weights, moments and an average, and write all but the first, and a half.

    The gradient is bfloat16: 38 bytes a weight. Torch's own: norm, clip, AdamW, average, copy.
    """
    scalars: dict[str, Any] = {
        "learning_rate": torch.tensor(1e-4, device=device),
        "ema_weights": torch.tensor([1e-4], device=device),
        "skip": torch.zeros((), device=device),
    }
    settings: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for size in sizes:

        def make(size: int = size) -> Arguments:
            weights = torch.randn(size, device=device)
            return {
                "gradient": torch.randn(size, dtype=torch.bfloat16, device=device),
                "weights": weights,
                "exp_avg": torch.zeros_like(weights),
                "exp_avg_sq": torch.ones_like(weights),
                "averages": weights.clone()[None],
                "shadow": weights.bfloat16(),
                "step": torch.ones((), device=device),
            }

        def ours(gradient: Tensor, **state: Any) -> None:
            scale = gradient_norm([gradient]).clamp(min=1)
            adamw_step([gradient], [0], **state, **scalars, gradient_scale=scale, **settings)

        def theirs(
            gradient: Tensor, weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
            averages: Tensor, shadow: Tensor, step: Tensor,
        ) -> None:  # fmt: skip
            wide = gradient.float()
            wide.div_(torch.linalg.vector_norm(wide).clamp(min=1))
            torch._fused_adamw_(
                [weights], [wide], [exp_avg], [exp_avg_sq], [], [step], lr=1e-4, beta1=0.9,
                beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
            averages[0].lerp_(weights, 1e-4)
            shadow.copy_(weights)

        yield Job(
            "adamw_step", (size,), torch.bfloat16, 38 * size, make,
            {"engine": ours, "torch": theirs},
        )  # fmt: skip


def measure_jobs(context: Context, jobs: Iterator[Job]) -> None:
    """Time every way of each job, and report it."""
    repeats, beyond = (2, 1) if context.dry else (REPEATS, BEYOND_CACHES)
    with force_ops():
        for job in jobs:
            for row in measure(job, context.device, timer_of(context.device), repeats, beyond):
                context.add(row)


def pixels(context: Context) -> None:
    """Noising, loss with its gradient, and a sampling step."""
    shapes: Shapes = ((2, 3, 8, 8),) if context.dry else ((128, 3, 32, 32), (64, 3, 256, 256))
    for jobs in (q_sample_jobs, denoising_loss_jobs, reverse_step_jobs):
        measure_jobs(context, jobs(context.device, shapes))


def latents(context: Context) -> None:
    """Noising and loss of latents that are drawn from moments."""
    shapes: Shapes = ((2, 4, 8, 8),) if context.dry else LATENTS
    measure_jobs(context, latent_jobs(context.device, shapes))


def optimizer(context: Context) -> None:
    """One step of AdamW for the weights of the CIFAR-10 network, with what goes with it."""
    measure_jobs(
        context, adamw_step_jobs(context.device, (1024,) if context.dry else (35_700_000,))
    )
