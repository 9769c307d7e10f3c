"""Each fused operation beside the same job of torch's own, and beside a copy of its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from benchmarks.gpu import textbook
from benchmarks.gpu.item import Context
from benchmarks.gpu.networks import NormCall, heaviest_norms
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
    group_norm_silu,
    q_sample,
    reverse_step,
)
from ddpm_kernels.dispatch import force_ops

Shapes = Sequence[tuple[int, ...]]

STEPS = 1000


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


def norm_jobs(device: torch.device, calls: Sequence[NormCall]) -> Iterator[Job]:
    """Must read x and write y; backward, read x and dy and write dx. Torch's own in both layouts.

    Weights are float32, activations bfloat16, as in mixed precision.
    """
    for call in calls:
        shape, dtype, size = call.shape, torch.bfloat16, 2 * prod(call.shape)
        weight, bias = torch.randn(2, shape[1], device=device)
        upstream = normals(shape, dtype, device)

        def make(call: NormCall = call, weight: Tensor = weight, bias: Tensor = bias) -> Arguments:
            x = normals(call.shape, torch.bfloat16, device)
            return {"x": x, "nchw": x.contiguous(), "weight": weight, "bias": bias}

        def make_leaves(make: Callable[[], Arguments] = make) -> Arguments:
            return {name: value.detach().clone().requires_grad_() for name, value in make().items()}

        def engine(
            x: Tensor, nchw: Tensor, weight: Tensor, bias: Tensor, call: NormCall = call
        ) -> Tensor:
            return group_norm_silu(
                x, call.groups, weight, bias, eps=call.eps, activation=call.activation
            )

        def torch_nhwc(
            x: Tensor, nchw: Tensor, weight: Tensor, bias: Tensor, call: NormCall = call
        ) -> Tensor:
            return textbook.group_norm_silu(x, call.groups, weight, bias, call.eps, call.activation)

        def torch_nchw(
            x: Tensor, nchw: Tensor, weight: Tensor, bias: Tensor, call: NormCall = call
        ) -> Tensor:
            return textbook.group_norm_silu(
                nchw, call.groups, weight, bias, call.eps, call.activation
            )

        def ways(of: Callable[..., Any] | None = None) -> dict[str, Way]:
            found: dict[str, Way] = {
                "engine": engine,
                "torch, NHWC": torch_nhwc,
                "torch, NCHW": torch_nchw,
                "inductor": compiled(torch_nhwc, device),
            }
            return found if of is None else {name: partial(of, way) for name, way in found.items()}

        def both(function: Way, upstream: Tensor = upstream, **given: Any) -> object:
            y: Any = function(**given)
            # Of the two layouts of x each way uses one.
            return y, torch.autograd.grad(y, list(given.values()), upstream, allow_unused=True)

        yield Job("group_norm_silu", shape, dtype, 2 * size, make, ways())
        yield Job("group_norm_silu, both passes", shape, dtype, 5 * size, make_leaves, ways(both))


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


def _measure(context: Context, jobs: Iterator[Job]) -> None:
    repeats, beyond = (2, 1) if context.dry else (REPEATS, BEYOND_CACHES)
    with force_ops():
        for job in jobs:
            for row in measure(job, context.device, timer_of(context.device), repeats, beyond):
                context.add(row)


def pixels(context: Context) -> None:
    """Noising, loss with its gradient, and a sampling step."""
    shapes: Shapes = ((2, 3, 8, 8),) if context.dry else ((128, 3, 32, 32), (64, 3, 256, 256))
    for jobs in (q_sample_jobs, denoising_loss_jobs, reverse_step_jobs):
        _measure(context, jobs(context.device, shapes))


def norms(context: Context) -> None:
    """Compare GroupNorm with SiLU at the shapes where networks move most bytes through it."""
    _measure(context, norm_jobs(context.device, heaviest_norms(context.dry)))


def optimizer(context: Context) -> None:
    """One step of AdamW for the weights of the CIFAR-10 network, with what goes with it."""
    _measure(context, adamw_step_jobs(context.device, (1024,) if context.dry else (35_700_000,)))
