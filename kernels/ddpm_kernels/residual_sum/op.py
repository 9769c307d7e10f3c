"""The sum that ends a residual branch: y = (h + b + x) / d, and the moments of y.

b is what the convolution before has left out, x the other branch, d a divisor. The norm that
follows needs the mean and the deviation of y: per channel and slab of consecutive pixels

    m + r = mean y        q = Σ (y − m − r)²

are taken of y as it is stored, while it is at hand (`moments.Moments`); the mean is kept as an
unevaluated sum of two, as by `group_norm_silu`.

Backward: dh = dx = dy / d. b gets no gradient here. Its own is the sum of dy over samples and
pixels, which is owed to it: by the norm that follows, whose backward pass reads dy anyway, or by
`owed_bias.owe`.

Source: He, Zhang, Ren & Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.dispatch import runs_triton, skips_dispatcher, takes_op
from ddpm_kernels.group_norm_silu.plan import fits_on_chip
from ddpm_kernels.moments import Moments
from ddpm_kernels.residual_sum.launch import format_of, launch

PROGRAMS = 512
"""To cut slabs for, as `tiles.Tile.programs` does."""
MAX_SLABS = 64
"""The norm's programs read the moments of all slabs of their sample."""
LEAST_PIXELS = 64
"""Of a slab, which are a multiple of it."""


def residual_sum(
    h: Tensor,
    x: Tensor | None = None,
    bias: Tensor | None = None,
    divisor: float = 1.0,
    *,
    moments: bool = True,
) -> tuple[Tensor, Moments | None]:
    """Add a branch, a bias and another branch, and divide.

    Args:
        h: `[N, C, H, W]`, float32, float16, bfloat16 (or float64, for checking).
        x: `[N, C, H, W]` in the dtype of `h`; None: nothing is added.
        bias: `[C]`; None: h has it already. It gets no gradient.
        divisor: of the sum.
        moments: whether a norm follows.

    Returns:
        y `[N, C, H, W]` in the dtype of `h`, channels-last if `h` is; and its moments, where the
        norm would have to read y for them, else None: on a CPU and of small maps.
    """
    if x is None and bias is None and divisor == 1:
        return h, None
    if not takes_op(h):
        return _by_torch(h, x, bias, divisor), None
    batch, channels, height, width = h.shape
    pixels = height * width
    # A norm that fits on chip reads a map once, with moments or without.
    wanted = moments and not fits_on_chip(pixels)
    slab = slab_pixels(batch, channels, pixels) if wanted else 0
    if skips_dispatcher(h):
        y, values = _function(h, x, bias, divisor, slab)
    else:
        y, values = torch.ops.ddpm.residual_sum.default(h, x, bias, divisor, slab)
    return y, Moments(values, slab) if slab else None


def slab_pixels(batch: int, channels: int, pixels: int) -> int:
    """Choose the pixels of a slab: enough slabs to keep a GPU busy, and no more."""
    chunks = -(-channels // 128)
    slabs = max(1, min(MAX_SLABS, PROGRAMS // (batch * chunks), pixels // (4 * LEAST_PIXELS)))
    return -(-pixels // (slabs * LEAST_PIXELS)) * LEAST_PIXELS


# --- Reference


def _by_torch(h: Tensor, x: Tensor | None, bias: Tensor | None, divisor: float) -> Tensor:
    y = h if bias is None else h + bias.detach().to(h.dtype)[:, None, None]
    y = y if x is None else x + y
    return y if divisor == 1 else y / divisor


def residual_sum_reference(
    h: Tensor, x: Tensor | None, bias: Tensor | None, divisor: float, slab_pixels: int
) -> tuple[Tensor, Tensor]:
    """Compute y, and the moments of slabs: `[N, slabs, 3, C]`, or empty if `slab_pixels` is 0.

    Arguments as in `residual_sum`; `slab_pixels` is the number of pixels of a slab.
    """
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    total = h.to(dtype)
    if bias is not None:
        total = total + bias.to(dtype)[:, None, None]
    if x is not None:
        total = total + x.to(dtype)
    y = (total if divisor == 1 else total / divisor).to(h.dtype)
    y = y.clone() if y is h else y  # an operation returns none of its inputs
    if slab_pixels == 0:
        return y, h.new_empty(0, dtype=dtype)
    return y, torch.stack(
        [_moments(slab) for slab in y.to(dtype).flatten(2).split(slab_pixels, dim=2)], dim=1
    )


def _moments(slab: Tensor) -> Tensor:
    """From `[N, C, pixels]` to `[N, 3, C]`."""
    mean = slab.mean(2)
    centred = slab - mean[..., None]
    rest = centred.mean(2)
    squares = (centred - rest[..., None]).square().sum(2)
    return torch.stack([mean, rest, squares], dim=1)


# --- Registration


def _residual_sum(
    h: Tensor, x: Tensor | None, bias: Tensor | None, divisor: float, slab_pixels: int
) -> tuple[Tensor, Tensor]:
    if runs_triton(h) and h.dtype != torch.float64 and h.numel() > 0:
        return launch(h, x, bias, divisor, slab_pixels)
    y, values = residual_sum_reference(h, x, bias, divisor, slab_pixels)
    return y.contiguous(memory_format=format_of(h)), values


_op = torch.library.custom_op(
    "ddpm::residual_sum",
    _residual_sum,
    mutates_args=(),
    schema=torch.library.infer_schema(residual_sum_reference, mutates_args=()),
)


@_op.register_fake
def _(
    h: Tensor, x: Tensor | None, bias: Tensor | None, divisor: float, slab_pixels: int
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    y = torch.empty_like(h, memory_format=format_of(h))
    if slab_pixels == 0:
        return y, h.new_empty(0, dtype=dtype)
    slabs = -(-h.shape[2] * h.shape[3] // slab_pixels)
    return y, h.new_empty((h.shape[0], slabs, 3, h.shape[1]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros would be made for the moments' gradient
    ctx.both, ctx.divisor = inputs[1] is not None, inputs[3]


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    gradient = dy if ctx.divisor == 1 else dy / ctx.divisor
    return gradient, gradient if ctx.both else None, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = _residual_sum(*arguments)
        _save(ctx, arguments, output)
        return output

    backward = staticmethod(_differentiate)


# `apply` itself first looks for functorch, which would have taken the dispatcher.
_function: Any = super(torch.autograd.Function, _Function).apply
