"""The mathematics of `group_norm_silu`, and its reference in torch.

With u = x ⧺ skip + before, x̂ = (u − mean) · rstd over each (sample, group), γ, β the affine
parameters, s, t the per-sample scale and shift, and k what dropout multiplies by,

    z = (x̂ γ + β)(1 + s) + t        y = k z σ(z)   (or k z, without activation)

Backward, with dz = k dy · σ(z)(1 + z(1 − σ(z))), A = Σ dz x̂ and B = Σ dz over space per (sample,
channel):

    dt = B        ds = γA + βB        dγ = Σₙ (1 + s) A        dβ = Σₙ (1 + s) B
    du = rstd (γ(1 + s) dz − c₂ − x̂ c₁)        dbefore = Σ du over space

where c₁, c₂ are the means over the group's elements of γ(1 + s) dz x̂ and γ(1 + s) dz. What else is
computed from x and skip adds its gradient r: dx ⧺ dskip = du + r. A bias that these contain has the
gradient Σₙ Σ (du + r).

Statistics are taken in float32 (float64 for float64 inputs) whatever the data's precision. The
mean is kept as an unevaluated sum of two: rounded to one number it is off by up to 6·10⁻⁵
deviations where it is 1000 of them, and every gradient with it.

Source: Wu & He, "Group Normalization", ECCV 2018; the scale and shift are those of Dhariwal &
Nichol, "Diffusion Models Beat GANs", 2021 (adaptive group normalization).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_kernels.dropout import Dropout, keep_scale_of


def group_norm_silu_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
    skip: Tensor | None = None,
    before: Tensor | None = None,
    dropout_key: Tensor | None = None,
    dropout_probability: float = 0.0,
    moments: Tensor | None = None,
    slab_pixels: int = 0,
    skip_moments: Tensor | None = None,
    skip_slab_pixels: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute y, and for the backward pass mean, its rest and rstd: `[N, 3, groups]`.

    The arguments are those of `group_norm_silu`, one by one. The last four, the moments of x and of
    skip, save a kernel a pass; here they are not used.

    Not `F.group_norm`: on channels-last CPU tensors torch takes the variance as E[x²] − E[x²]²,
    which loses every digit once the mean is 1000 times the deviation, and one at 256×256 pixels.
    """
    u = joined(x, skip, before)
    channels, pixels = u.shape[1] // groups, u.shape[2] * u.shape[3]
    mean = _group_mean(u.sum((2, 3)), groups, pixels)
    centred = u - per_pixel(mean.repeat_interleave(channels, dim=1))
    # The sum's rounding is large beside a small deviation: take what it left off the mean too.
    rest = _group_mean(centred.sum((2, 3)), groups, pixels)
    variance = _group_mean(centred.square().sum((2, 3)), groups, pixels) - rest.square()
    rstd = (variance.clamp(min=0) + eps).rsqrt()
    gain, offset = _affine(weight, bias, scale, shift, u.dtype)
    gain = gain * rstd.repeat_interleave(channels, dim=1)
    offset = offset - gain * rest.repeat_interleave(channels, dim=1)
    z = torch.addcmul(per_pixel(offset), centred, per_pixel(gain))
    if activation == "silu":
        z = F.silu(z)
    if dropout_key is not None:
        z = z * keep_scale_of(z, Dropout(dropout_probability, dropout_key))
    return z.to(x.dtype), torch.stack([mean, rest, rstd], dim=1)


def group_norm_silu_backward_reference(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
    activation: str,
    needs_dx: bool = True,
    skip: Tensor | None = None,
    before: Tensor | None = None,
    dropout_key: Tensor | None = None,
    dropout_probability: float = 0.0,
    residual: Tensor | None = None,
    skip_residual: Tensor | None = None,
    owes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dγ, dβ, ds, dt, dskip, dbefore and the gradient of owed biases.

    Each is shaped as its argument, and empty where there is none.

    Args:
        dy: `[N, C, H, W]`, C being the channels of x and of skip.
        statistics: what `group_norm_silu_reference` returns.
        needs_dx: otherwise dx and dskip are empty.
        residual: the gradient of x, `[N, C₁, H, W]`, from what else is computed from it, or None.
        skip_residual: that of skip, `[N, C₂, H, W]`.
        owes: compute the gradient `[C]` of biases that x and skip contain, in float32 (float64 for
            float64 inputs); otherwise it is empty.
        x, groups, weight, bias, scale, shift, activation, skip, before: see `group_norm_silu`.
        dropout_key, dropout_probability: its `dropout`.
    """
    u = joined(x, skip, before)
    dtype, nothing = u.dtype, x.new_empty(0)
    channels, pixels = u.shape[1] // groups, u.shape[2] * u.shape[3]
    gain, offset = _affine(weight, bias, scale, shift, dtype)
    mean, rest, rstd = statistics.repeat_interleave(channels, dim=2).unbind(1)
    centred = u - per_pixel(mean)
    x_hat = torch.addcmul(per_pixel(-rest * rstd), centred, per_pixel(rstd))
    dz = dy.to(dtype)
    if dropout_key is not None:
        dz = dz * keep_scale_of(dz, Dropout(dropout_probability, dropout_key))
    if activation == "silu":
        z = x_hat * per_pixel(gain) + per_pixel(offset)
        sigmoid = z.sigmoid()
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    a, b = (dz * x_hat).sum((2, 3)), dz.sum((2, 3))

    if scale is None:
        d_scale, d_shift = nothing, x.new_empty(0)
        d_weight, d_bias = a.sum(0), b.sum(0)
    else:
        factor = 1 + scale.to(dtype)
        d_scale = (weight.to(dtype) * a + bias.to(dtype) * b).to(scale.dtype)
        d_shift = b.to(scale.dtype)
        d_weight, d_bias = (factor * a).sum(0), (factor * b).sum(0)
    affine = d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_scale, d_shift

    c1, c2 = (
        _group_mean(gain * sums, groups, pixels).repeat_interleave(channels, dim=1)
        for sums in (a, b)
    )
    du = per_pixel(rstd) * (per_pixel(gain) * dz - per_pixel(c2) - x_hat * per_pixel(c1))
    d_before = x.new_empty(0) if before is None else du.sum((2, 3)).to(before.dtype)
    own, others = du[:, : x.shape[1]], du[:, x.shape[1] :]
    own = own if residual is None else own + residual
    others = others if skip_residual is None else others + skip_residual
    d_owed = torch.cat([own.sum((0, 2, 3)), others.sum((0, 2, 3))]) if owes else x.new_empty(0)
    dx = _in_format_of(x, own) if needs_dx else x.new_empty(0)
    d_skip = x.new_empty(0) if skip is None or not needs_dx else _in_format_of(skip, others)
    return dx, *affine, d_skip, d_before, d_owed


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for a float64 x of any shape, float32 for others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def joined(x: Tensor, skip: Tensor | None, before: Tensor | None) -> Tensor:
    """What is normalised: `[N, C, H, W]` in `compute_dtype`."""
    u = (x if skip is None else torch.cat([x, skip], dim=1)).to(compute_dtype(x))
    return u if before is None else u + per_pixel(before.to(u.dtype))


def per_pixel(per_channel: Tensor) -> Tensor:
    """From `[…, C]` to `[…, C, 1, 1]`."""
    return per_channel[..., None, None]


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last or contiguous_format, of an x `[N, C, H, W]`."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _in_format_of(x: Tensor, gradient: Tensor) -> Tensor:
    # A copy: an operation's results may not share memory.
    return gradient.to(x.dtype, memory_format=memory_format_of(x), copy=True)


def _group_mean(sums: Tensor, groups: int, pixels: int) -> Tensor:
    """From sums over each channel's pixels, `[N, C]`, to means over each group, `[N, groups]`."""
    per_group = sums.unflatten(1, (groups, -1))
    return per_group.sum(-1) / (per_group.shape[-1] * pixels)


def _affine(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The multiplier and offset per (sample, channel) that affine, scale and shift amount to."""
    gain, offset = weight.to(dtype)[None], bias.to(dtype)[None]
    if scale is not None and shift is not None:
        factor = 1 + scale.to(dtype)
        gain, offset = gain * factor, offset * factor + shift.to(dtype)
    return gain, offset
