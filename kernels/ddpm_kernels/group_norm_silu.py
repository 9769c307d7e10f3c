"""GroupNorm, affine, optional per-sample scale and shift, optional SiLU: one operation.

With x̂ = (x − mean) · rstd over each (sample, group), γ, β the affine parameters and s, t the
per-sample scale and shift,

    z = (x̂ γ + β)(1 + s) + t        y = z σ(z)   (or z, without activation)

Backward, with dz = dy · σ(z)(1 + z(1 − σ(z))), A = Σ dz x̂ and B = Σ dz over space per (sample,
channel):

    dt = B        ds = γA + βB        dγ = Σₙ (1 + s) A        dβ = Σₙ (1 + s) B
    dx = rstd (γ(1 + s) dz − c₂ − x̂ c₁)

where c₁, c₂ are the means over the group's elements of γ(1 + s) dz x̂ and γ(1 + s) dz.

Statistics are taken in float32 (float64 for float64 inputs) whatever the data's precision.

Source: Wu & He, "Group Normalization", ECCV 2018; the scale and shift are those of Dhariwal &
Nichol, "Diffusion Models Beat GANs", 2021 (adaptive group normalization).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_kernels.dispatch import takes_op


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """Normalise, scale, shift and activate.

    Args:
        x: `[N, C, H, W]`, float32, float16, bfloat16 (or float64, for checking).
        groups: divides C.
        weight: `[C]`; `bias` likewise.
        bias: `[C]`.
        scale: `[N, C]` or None; enters as 1 + scale.
        shift: `[N, C]` or None; given exactly when `scale` is.
        eps: added to the variance.
        activation: `"silu"` or `"none"`.

    Returns:
        `[N, C, H, W]` in the dtype of `x`, channels-last if `x` is.

    Raises:
        ValueError: an unknown activation, groups that do not divide C, or scale without shift.
    """
    if activation not in ("silu", "none"):
        raise ValueError(f"activation is {activation!r}; it must be 'silu' or 'none'")
    if x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels cannot be normalised in {groups} groups")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together")
    if takes_op(x):
        y, _, _ = torch.ops.ddpm.group_norm_silu(
            x, groups, weight, bias, scale, shift, eps, activation
        )
        return y
    y, _, _ = group_norm_silu_reference(x, groups, weight, bias, scale, shift, eps, activation)
    return y


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_pixel(per_channel: Tensor) -> Tensor:
    return per_channel[..., None, None]


def _group_mean(sums: Tensor, groups: int, pixels: int) -> Tensor:
    """From sums over each channel's pixels, `[N, C]`, to means over each group, `[N, groups]`."""
    per_group = sums.unflatten(1, (groups, -1))
    return per_group.sum(-1) / (per_group.shape[-1] * pixels)


def group_norm_silu_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `group_norm_silu` computes; returns y, and the mean and rstd of each group, `[N, G]`.

    Not `F.group_norm`: on channels-last CPU tensors torch takes the variance as E[x²] − E[x]²,
    which loses every digit once the mean is 1000 times the deviation, and one at 256×256 pixels.
    """
    dtype = _compute_dtype(x)
    channels, pixels = x.shape[1] // groups, x.shape[2] * x.shape[3]
    wide = x.to(dtype)
    mean = _group_mean(wide.sum((2, 3)), groups, pixels)
    centred = wide - _per_pixel(mean.repeat_interleave(channels, dim=1))
    # The sum's rounding is large beside a small deviation: take what it left off the mean too.
    rest = _group_mean(centred.sum((2, 3)), groups, pixels)
    variance = _group_mean(centred.square().sum((2, 3)), groups, pixels) - rest.square()
    rstd = (variance.clamp(min=0) + eps).rsqrt()
    gain, offset = _affine(weight, bias, scale, shift, dtype)
    gain = gain * rstd.repeat_interleave(channels, dim=1)
    offset = offset - gain * rest.repeat_interleave(channels, dim=1)
    z = torch.addcmul(_per_pixel(offset), centred, _per_pixel(gain))
    if activation == "silu":
        z = F.silu(z)
    return z.to(x.dtype), mean + rest, rstd


def _affine(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The multiplier and offset per (sample, channel) that affine, scale and shift amount to."""
    gain, offset = weight.to(dtype)[None], bias.to(dtype)[None]
    if scale is not None and shift is not None:
        factor = 1 + scale.to(dtype)
        gain, offset = gain * factor, offset * factor + shift.to(dtype)
    return gain, offset


def _channels_last_if(like: Tensor) -> torch.memory_format:
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


@torch.library.custom_op("ddpm::group_norm_silu", mutates_args=())
def _forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y and, for the backward pass, the mean and rstd of each group, `[N, groups]`."""
    y, mean, rstd = group_norm_silu_reference(
        x, groups, weight, bias, scale, shift, eps, activation
    )
    return y.contiguous(memory_format=_channels_last_if(x)), mean, rstd


@_forward.register_fake
def _(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=_channels_last_if(x))
    statistics = x.new_empty((x.shape[0], groups), dtype=_compute_dtype(x))
    return y, statistics, torch.empty_like(statistics)


@torch.library.custom_op("ddpm::group_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dγ, dβ, ds, dt; the last two are empty when there is no scale and shift."""
    dtype = _compute_dtype(x)
    channels = x.shape[1] // groups
    gain, offset = _affine(weight, bias, scale, shift, dtype)
    mean_c, rstd_c = (s.repeat_interleave(channels, dim=1) for s in (mean, rstd))
    x_hat = (x.to(dtype) - _per_pixel(mean_c)) * _per_pixel(rstd_c)
    dz = dy.to(dtype)
    if activation == "silu":
        z = x_hat * _per_pixel(gain) + _per_pixel(offset)
        sigmoid = z.sigmoid()
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    a, b = (dz * x_hat).sum((2, 3)), dz.sum((2, 3))

    pixels = x.shape[2] * x.shape[3]
    c1, c2 = (
        _group_mean(gain * sums, groups, pixels).repeat_interleave(channels, dim=1)
        for sums in (a, b)
    )
    dx = _per_pixel(rstd_c) * (_per_pixel(gain) * dz - _per_pixel(c2) - x_hat * _per_pixel(c1))
    if scale is None:
        d_scale = d_shift = x.new_empty(0)
        d_weight, d_bias = a.sum(0), b.sum(0)
    else:
        factor = 1 + scale.to(dtype)
        d_scale = (weight.to(dtype) * a + bias.to(dtype) * b).to(scale.dtype)
        d_shift = b.to(scale.dtype)
        d_weight, d_bias = (factor * a).sum(0), (factor * b).sum(0)
    dx = dx.to(x.dtype).contiguous(memory_format=_channels_last_if(x))
    # An operation's outputs may not be one tensor, and without scale d_shift would be d_scale.
    return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_scale, d_shift.clone()


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_scale = x.new_empty(0) if scale is None else torch.empty_like(scale)
    return (
        torch.empty_like(x, memory_format=_channels_last_if(x)),
        torch.empty_like(weight),
        torch.empty_like(bias),
        d_scale,
        torch.empty_like(d_scale),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, scale, shift, _, ctx.activation = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    dx, d_weight, d_bias, d_scale, d_shift = torch.ops.ddpm.group_norm_silu_backward(
        dy, x, ctx.groups, weight, bias, scale, shift, mean, rstd, ctx.activation
    )
    if scale is None:
        d_scale = d_shift = None
    return dx, None, d_weight, d_bias, d_scale, d_shift, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
