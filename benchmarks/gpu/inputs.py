"""Arguments for the operations, and the same mathematics as a textbook has it.

Everything is drawn on the CPU from a fixed seed and then moved, so that a check that fails on one
device can be repeated on another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_kernels import Column

STEPS = 50
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.2, STEPS, dtype=torch.float64), 0)
LAYOUTS = ("nhwc", "nchw", "view")

Arguments = dict[str, Any]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides; `view` is cut out of a larger tensor, off its start."""
    if layout == "nhwc":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "nchw":
        return tensor.contiguous()
    assert layout == "view"
    batch, channels, height, width = tensor.shape
    larger = tensor.new_zeros(batch + 1, channels + 2, height + 1, 2 * width + 1)
    view = larger[1:, 1:-1, 1:, 1::2]
    view.copy_(tensor)
    return view


def moved(arguments: Arguments, device: torch.device) -> Arguments:
    """The tensors among the arguments on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def in_float64(arguments: Arguments, *names: str) -> Arguments:
    """Copies of the floating-point tensors in float64: those named, or all of them."""
    return {
        k: v.to(torch.float64, copy=True)
        if isinstance(v, Tensor) and v.is_floating_point() and (k in names or not names)
        else v
        for k, v in arguments.items()
    }


def of_q_sample(shape: tuple[int, ...], stored: torch.dtype) -> Arguments:
    """What `q_sample` takes, without the dtype of its result."""
    batch = shape[0]
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(batch))
    return {
        "images": levels.to(stored)
        if stored == torch.uint8
        else (levels / 127.5 - 1).to(stored),
        "timesteps": (torch.arange(batch) * 17 + 3) % STEPS,
        "sqrt_alpha_bar": ALPHA_BAR.sqrt().float(),
        "sqrt_one_minus_alpha_bar": (1 - ALPHA_BAR).sqrt().float(),
        "seed": torch.tensor(-5),
        "sample_ids": torch.arange(batch) + 2**33 - 1,
        "flip": torch.arange(batch) % 2 == 0,
    }  # fmt: skip


def of_denoising_loss(
    shape: tuple[int, ...], predicted: torch.dtype, stored: torch.dtype
) -> Arguments:
    """What `denoising_loss` takes, in its order and without the target."""
    prediction = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(predicted)
    shared = of_q_sample(shape, stored)
    flip = shared.pop("flip")
    return {
        "prediction": prediction,
        **shared,
        "weights": torch.arange(shape[0]) + 0.5,
        "flip": flip,
        "bound_table": None,
        "bound_weights": None,
    }


def of_learned_variance(shape: tuple[int, ...], stored: torch.dtype) -> Arguments:
    """The same with a learned variance, the first sample at t = 0: log-variances in (-3, -2)."""
    given = of_denoising_loss((shape[0], 2 * shape[1], *shape[2:]), torch.float32, stored)
    given["images"] = given["images"][:, : shape[1]].contiguous()
    given["timesteps"] = given["timesteps"].clone()
    given["timesteps"][0] = 0
    rows = len(given["sqrt_alpha_bar"])
    columns = (torch.full((rows,), -3.0), torch.full((rows,), -2.0), torch.full((rows,), 0.1))
    given["bound_table"] = torch.stack(columns, dim=1)
    given["bound_weights"] = torch.arange(shape[0]) + 1.5
    return given


def of_reverse_step(
    shape: tuple[int, ...],
    output_dtype: torch.dtype,
    *,
    slots: int = 0,
    guided: bool = False,
    rescale: bool = False,
    threshold: bool = False,
    learned: bool = False,
    row: int = 3,
) -> Arguments:
    """What `reverse_step` takes, without `clip`, on a table of numbers of order one."""
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def per_sample(least: float) -> Tensor:
        return least + torch.rand(shape[0], generator=generator)

    batch, channels, *pixels = shape
    output = (batch, channels * (1 + learned), *pixels)
    return {
        "x": draw(*shape),
        "output": draw(*output).to(output_dtype),
        "table": draw(5, Column.HISTORY + slots),
        "row": torch.tensor(row),
        "seed": torch.tensor(-(2**40) - 5),
        "sample_ids": torch.arange(batch) * (2**33 + 1) + 3,
        "unconditional": draw(*output).to(output_dtype) if guided else None,
        "rescale": per_sample(0.5) if rescale else None,
        "threshold": per_sample(1.0) if threshold else None,
        "history": draw(slots, *shape) if slots else None,
    }


def of_group_norm_silu(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, film: bool
) -> Arguments:
    """What `group_norm_silu` takes, without the activation."""
    generator = torch.Generator().manual_seed(shape[1] + 31 * shape[-1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return {
        "x": draw(*shape) * 2 + 0.5,
        "groups": groups,
        "weight": draw(shape[1]),
        "bias": draw(shape[1]),
        "scale": draw(*shape[:2]) if film else None,
        "shift": draw(*shape[:2]) if film else None,
        "eps": 1e-2,  # two nearly equal pixels have a steep norm
    }


# --- The textbook: what a codebase without kernels of its own writes


def per_pixel(per_sample: Tensor) -> Tensor:
    """`[B]` or `[B, C]`, shaped to broadcast against images."""
    return per_sample.reshape(*per_sample.shape, *[1] * (4 - per_sample.ndim))


def textbook_q_sample(
    images: Tensor, signal: Tensor, sigma: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x_t, and the noise, which the loss will want."""
    x_0 = images.to(dtype) / 127.5 - 1
    noise = torch.randn_like(x_0)
    return (per_pixel(signal) * x_0 + per_pixel(sigma) * noise).to(dtype), noise


def textbook_loss(prediction: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean square of prediction − noise, `[B]`."""
    return (prediction.float() - noise.float()).square().mean((1, 2, 3)) * weights


def textbook_reverse_step(x: Tensor, output: Tensor, row: Tensor) -> Tensor:
    """One step of ancestral sampling with x̂_0 clipped; `row` as in a coefficient table."""
    x_0 = (row[Column.X0_FROM_X] * x + row[Column.X0_FROM_OUTPUT] * output).clamp(-1, 1)
    mean = row[Column.X] * x + row[Column.X0] * x_0
    return mean + row[Column.NOISE] * torch.randn_like(x)


def textbook_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str = "silu",
) -> Tensor:
    """What `group_norm_silu` computes, of torch's own operations."""
    z = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        z = z * (1 + per_pixel(scale)) + per_pixel(shift)
    return F.silu(z) if activation == "silu" else z


def values_of(shape: tuple[int, ...]) -> int:
    """How many numbers a tensor of that shape holds."""
    return math.prod(shape)
