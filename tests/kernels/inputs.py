"""Arguments of the operations, random from fixed seeds, and the layouts they come in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_kernels import Column

STEPS = 50
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.2, STEPS, dtype=torch.float64), 0)
SIGNAL, SIGMA = ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()
LAYOUTS = ("nchw", "nhwc", "columns", "view")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORED = (torch.uint8, *FLOATS)
TARGETS = ("eps", "x0", "v")
# One pixel of one channel; pixels of three; primes; whole tiles; one element more than a tile; one
# less; two tiles and a bit.
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (3, 1, 7, 13),
    (2, 3, 17, 23),
    (1, 4, 16, 16),
    (1, 5, 5, 41),
    (1, 1, 11, 93),
    (2, 2, 32, 33),
)

Arguments = dict[str, Any]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides; `view` is cut out of a larger tensor, off its start."""
    if layout == "nhwc":
        return tensor.movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout == "columns":
        return tensor.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "view":
        channels, height, width = tensor.shape[-3:]
        larger = tensor.new_zeros(
            *tensor.shape[:-4], tensor.shape[-4] + 1, channels + 2, height + 1, 2 * width + 1
        )
        view = larger[..., 1:, 1:-1, 1:, 1::2]
        return view.copy_(tensor)
    assert layout == "nchw"
    return tensor.contiguous()


def in_float64(arguments: Arguments, *names: str) -> Arguments:
    """Copies of the floating-point tensors in float64: those named, or all of them."""
    return {
        k: v.to(torch.float64, copy=True)
        if isinstance(v, Tensor) and v.is_floating_point() and (k in names or not names)
        else v
        for k, v in arguments.items()
    }


def copied(arguments: Arguments) -> Arguments:
    """Copies of the tensors."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def per_pixel(per_sample: Tensor) -> Tensor:
    """`[B]` or `[B, C]`, shaped to broadcast against images."""
    return per_sample.reshape(*per_sample.shape, *[1] * (4 - per_sample.ndim))


def stored_images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Images with both extremes of uint8 in them, as they are stored."""
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(shape[0]))
    levels.flatten()[::3], levels.flatten()[1::3] = 0, 255
    return levels.to(torch.uint8) if dtype == torch.uint8 else (levels / 127.5 - 1).to(dtype)


LATENT = {"latent_scale": 0.3611, "latent_shift": 0.1159}


def stored_moments(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Tensor:
    """Means and log-variances of latents of a shape, the least of the latter and −∞ among them."""
    batch, channels, *pixels = shape
    generator = torch.Generator().manual_seed(sum(shape))
    mean = 5 * torch.randn(batch, channels, *pixels, generator=generator)
    log_variance = -12 + 14 * torch.rand(batch, channels, *pixels, generator=generator)
    log_variance.flatten()[::7], log_variance.flatten()[2::19] = -30, -torch.inf
    return torch.cat([mean, log_variance], dim=1).to(dtype)


def of_q_sample(
    shape: tuple[int, ...] = (3, 3, 5, 4),
    stored: torch.dtype = torch.uint8,
    flip: bool = True,
    *,
    latent: bool = False,
) -> Arguments:
    """What `q_sample` takes, without the dtype of its result and the stream.

    If `latent`, moments of latents of the shape, in half precision unless `stored` is another.
    """
    batch = shape[0]
    if latent:
        kept = stored if stored != torch.uint8 else torch.float16
        return {
            **of_q_sample(shape, flip=False), "images": stored_moments(shape, kept), **LATENT
        }  # fmt: skip
    return {
        "images": stored_images(shape, stored),
        "timesteps": (torch.arange(batch) * 17 + 3) % STEPS,
        "sqrt_alpha_bar": SIGNAL.float(),
        "sqrt_one_minus_alpha_bar": SIGMA.float(),
        "seed": torch.tensor(-5),
        "sample_ids": torch.arange(batch) + 2**33 - 1,
        "flip": torch.arange(batch) % 2 == 0 if flip else None,
        "latent_scale": None,
        "latent_shift": 0.0,
    }


def of_training_draws() -> Arguments:
    """What `training_draws` takes, in the order of the registered operation."""
    return {
        "seed": torch.tensor(-5),
        "positions": torch.arange(5) + 2**33 - 1,
        "labels": torch.arange(5) * 2,
        "integers": 1000,
        "flip": True,
        "label_dropout": 0.5,
        "null_class": 10,
        "augmentation_levels": 251,
        "dropout_key": True,
        "dropped": True,
        "step": 0,
    }


def target_tables(target: str) -> tuple[Tensor | None, Tensor | None]:
    """Factors of x_0 and ε in a target, float32 `[T]`."""
    ones = torch.ones(STEPS)
    tables: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "eps": (None, ones), "x0": (ones, None), "v": (-SIGMA.float(), SIGNAL.float()),
    }  # fmt: skip
    return tables[target]


def bound_table(target: str) -> Tensor:
    """By `BoundColumn`, from Ho et al. 2020, equations 4, 6 and 7: float64 `[T, 3]`."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BAR[:-1]])
    beta = 1 - ALPHA_BAR / before
    variance = beta * (1 - before) / (1 - ALPHA_BAR)
    variance[0] = variance[1]
    mean_from_x_0 = beta * before.sqrt() / (1 - ALPHA_BAR)
    x_0_from_error = {"eps": -SIGMA / SIGNAL, "x0": torch.ones_like(SIGMA), "v": -SIGMA}[target]
    return torch.stack([variance.log(), beta.log(), mean_from_x_0 * x_0_from_error], dim=1)


def of_denoising_loss(
    shape: tuple[int, ...] = (3, 3, 5, 4),
    target: str = "v",
    predicted: torch.dtype = torch.float32,
    stored: torch.dtype = torch.uint8,
    *,
    optional: bool = True,
    learned: bool = False,
    latent: bool = False,
) -> Arguments:
    """What `denoising_loss` takes, in its order.

    Weights and flips if `optional`; a learned variance, and timestep 0 first, if `learned`; moments
    in place of images if `latent`.
    """
    batch = shape[0]
    shared = of_q_sample(shape, stored, flip=optional, latent=latent)
    generator = torch.Generator().manual_seed(shape[-1])
    channels = shape[1] * (1 + learned)
    prediction = torch.randn(batch, channels, *shape[2:], generator=generator)
    target_x0, target_noise = target_tables(target)
    return {
        "prediction": prediction.to(predicted),
        "images": shared["images"],
        "timesteps": shared["timesteps"] - 3 if learned else shared["timesteps"],
        "target_x0": target_x0,
        "target_noise": target_noise,
        "seed": shared["seed"],
        "sample_ids": shared["sample_ids"],
        "weights": torch.arange(batch) + 0.5 if optional else None,
        "flip": shared["flip"],
        "bound_table": bound_table(target).float() if learned else None,
        "bound_weights": torch.arange(batch) + 1.5 if learned else None,
        "latent_scale": shared["latent_scale"],
        "latent_shift": shared["latent_shift"],
    }


ROWS = 6
REVERSE: dict[str, Arguments] = {
    "plain": {},
    "guided": {"guided": True, "rescale": True},
    "threshold": {"threshold": True},
    "history": {"slots": 2},
    "learned": {"learned": True},
    "everything": {
        "guided": True, "rescale": True, "threshold": True, "slots": 3, "learned": True,
        "output_dtype": torch.bfloat16,
    },
}  # fmt: skip


def of_reverse_step(
    shape: tuple[int, ...] = (3, 2, 5, 3),
    *,
    slots: int = 0,
    guided: bool = False,
    rescale: bool = False,
    threshold: bool = False,
    learned: bool = False,
    output_dtype: torch.dtype = torch.float32,
    row: int = 4,
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
        "x": lay_out(draw(*shape), "nhwc"),
        "output": draw(*output).to(output_dtype),
        "table": draw(ROWS, Column.HISTORY + slots),
        "row": torch.tensor(row),
        "seed": torch.tensor(-(2**40) - 5),
        "sample_ids": torch.arange(batch) * (2**33 + 1) + 3,
        "unconditional": draw(*output).to(output_dtype) if guided else None,
        "rescale": per_sample(0.5) if rescale else None,
        "threshold": per_sample(1.0) if threshold else None,
        "history": draw(slots, *shape) if slots else None,
    }


def of_residual_sum(
    shape: tuple[int, ...] = (3, 6, 5, 4),
    dtype: torch.dtype = torch.float32,
    *,
    slab_pixels: int = 8,
    optional: bool = True,
) -> Arguments:
    """What the registered operation of `residual_sum` takes; x and bias are `optional`."""
    generator = torch.Generator().manual_seed(shape[1] + 31 * shape[-1])

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * 2 + 0.5).to(dtype)

    return {
        "h": draw(*shape),
        "x": draw(*shape) if optional else None,
        "bias": draw(shape[1]) if optional else None,
        "divisor": 2**0.5,
        "slab_pixels": slab_pixels,
    }


def of_group_norm_silu(
    shape: tuple[int, ...] = (3, 6, 5, 4),
    groups: int = 3,
    dtype: torch.dtype = torch.float32,
    *,
    film: bool = True,
    affine_dtype: torch.dtype | None = None,
    eps: float = 1e-2,  # two nearly equal pixels have a steep norm
    activation: str = "silu",
) -> Arguments:
    """What `group_norm_silu` takes; scale and shift are halves of one tensor, if `film`."""
    generator = torch.Generator().manual_seed(shape[1] + 31 * shape[-1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    x, weight, bias = draw(*shape) * 2 + 0.5, draw(shape[1]), draw(shape[1])
    scale, shift = draw(shape[0], 2 * shape[1]).chunk(2, dim=1)
    return {
        "x": x,
        "groups": groups,
        "weight": weight.to(affine_dtype or dtype),
        "bias": bias.to(affine_dtype or dtype),
        "scale": scale if film else None,
        "shift": shift if film else None,
        "eps": eps,
        "activation": activation,
    }


def of_modulate(
    shape: tuple[int, int, int] = (3, 5, 6),
    dtype: torch.dtype = torch.float32,
    *,
    gated: bool = True,
    weighted: bool = False,
    norm: str = "layer",
    branch_dtype: torch.dtype | None = None,
    eps: float = 1e-2,  # two nearly equal channels have a steep norm
) -> Arguments:
    """What `modulate` takes; gate, scale and shift are slices of one product."""
    batch, length, channels = shape
    generator = torch.Generator().manual_seed(length + 31 * channels)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    gate, scale, shift = draw(batch, 6 * channels).to(branch_dtype or dtype).chunk(6, dim=1)[1:4]
    return {
        "x": draw(*shape) * 2 + 0.5,
        "y": draw(*shape).to(branch_dtype or dtype) if gated else None,
        "gate": gate if gated else None,
        "scale": scale,
        "shift": shift,
        "weight": draw(channels) if weighted else None,
        "norm": norm,
        "eps": eps,
    }
