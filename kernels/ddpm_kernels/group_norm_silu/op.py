"""GroupNorm, affine, optional per-sample scale and shift, optional SiLU and dropout: one operation.

`reference` has the mathematics, and what is fused with it before and after.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_kernels.dispatch import skips_dispatcher, takes_op, traces_gradients
from ddpm_kernels.dropout import Dropout
from ddpm_kernels.dropout import dropout as drop
from ddpm_kernels.group_norm_silu.reference import group_norm_silu_reference, joined, per_pixel
from ddpm_kernels.group_norm_silu.registered import with_residual, without_dispatcher
from ddpm_kernels.moments import Moments
from ddpm_kernels.owed_bias import owe

NEAR = 8.0
"""Deviations: a mean no farther than this from zero costs torch's group norm a digit at most."""
Pair = tuple[Tensor | None, Tensor | None]
MomentsOfBoth = tuple[Moments | None, Moments | None]
_UNKNOWN: MomentsOfBoth = (None, None)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    *,
    skip: Tensor | None = None,
    before: Tensor | None = None,
    dropout: Dropout | None = None,
    moments: MomentsOfBoth = _UNKNOWN,
) -> Tensor:
    """Normalise, scale, shift and activate.

    Args:
        x: `[N, C₁, H, W]`, float32, float16, bfloat16 (or float64, for checking).
        groups: divides C.
        weight: γ, `[C]`.
        bias: β, `[C]`.
        scale: `[N, C]` or None; enters as 1 + scale.
        shift: `[N, C]` or None; given exactly when `scale` is.
        eps: added to the variance.
        activation: `"silu"` or `"none"`.
        skip: `[N, C₂, H, W]`, of the dtype of x: the other channels of what is normalised, which
            has C = C₁ + C₂ channels; None where it has those of x alone.
        before: `[N, C]` or None; added to every pixel before all else.
        dropout: after the activation; None where nothing is dropped.
        moments: those of x and of skip, as far as they are known.

    Returns:
        `[N, C, H, W]` in the dtype of `x`, channels-last if `x` is.

    Raises:
        ValueError: an unknown activation, groups that do not divide C, scale without shift, or a
            skip that differs from x in more than its channels.
    """
    arguments = _arguments(
        x, groups, weight, bias, scale, shift, eps, activation, skip, before, dropout, moments
    )
    return _apply(x, arguments, dropout)


def group_norm_silu_residual(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    *,
    skip: Tensor | None = None,
    before: Tensor | None = None,
    dropout: Dropout | None = None,
    moments: MomentsOfBoth = _UNKNOWN,
    owed: Pair = (None, None),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do what `group_norm_silu` does, and hand on x and skip to whatever else reads them.

    The gradients of what is computed from these are added by the kernel that writes those of x and
    skip. Under torch.compile, and in torch.func's transformations, autograd adds them.

    Args:
        owed: biases `[C₁]` and `[C₂]` that x and skip contain without autograd's knowledge, or
            None. They get the sum of the whole gradient of x and of skip over samples and pixels.
        x, groups, weight, bias, scale, shift, eps, activation: see `group_norm_silu`.
        skip, before, dropout, moments: see `group_norm_silu`.

    Returns:
        y `[N, C, H, W]`, and x and skip themselves, as views.

    Raises:
        ValueError: see `group_norm_silu`.
    """
    fused = takes_op(x) and not traces_gradients(x)
    if not fused:
        x, skip = owe(x, owed[0]), None if skip is None else owe(skip, owed[1])
    arguments = _arguments(
        x, groups, weight, bias, scale, shift, eps, activation, skip, before, dropout, moments
    )
    if fused:
        return with_residual(*owed, *arguments)
    return _apply(x, arguments, dropout), x, skip


def _apply(x: Tensor, arguments: tuple[Any, ...], dropout: Dropout | None) -> Tensor:
    """Compute y from `_arguments`, of which the first is x."""
    if not takes_op(x):
        y = _by_torch(*arguments[:10])
        if y is None:
            y, _ = group_norm_silu_reference(*arguments)
        elif dropout is not None:
            y = drop(y, dropout)
        return y
    if skips_dispatcher(x):
        return without_dispatcher(*arguments)
    y, _ = torch.ops.ddpm.group_norm_silu.default(*arguments)
    return y


def _arguments(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, eps: float, activation: str, skip: Tensor | None, before: Tensor | None,
    dropout: Dropout | None, moments: MomentsOfBoth,
) -> tuple[Any, ...]:  # fmt: skip
    """Check and flatten; options are left out if there are none, which is quicker."""
    if activation not in ("silu", "none"):
        raise ValueError(f"activation is {activation!r}; it must be 'silu' or 'none'")
    channels = x.shape[1]
    if skip is not None:
        _check_skip(x, skip)
        channels += skip.shape[1]
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be normalised in {groups} groups")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together")
    arguments = x, groups, weight, bias, scale, shift, eps, activation
    if skip is before is dropout is moments[0] is moments[1] is None:
        return arguments
    dropped = (None, 0.0) if dropout is None else (dropout.key, dropout.probability)
    known = [(None, 0) if one is None else (one.values, one.slab_pixels) for one in moments]
    return *arguments, skip, before, *dropped, *known[0], *known[1]


def _check_skip(x: Tensor, skip: Tensor) -> None:
    if skip.dtype != x.dtype:
        names = (str(one.dtype).removeprefix("torch.") for one in (skip, x))
        raise ValueError("skip is {} and x {}; they must be of one dtype".format(*names))
    if skip.shape[:1] + skip.shape[2:] != x.shape[:1] + x.shape[2:]:
        raise ValueError(
            f"skip has shape {tuple(skip.shape)} and x {tuple(x.shape)}; "
            "they may differ in their channels alone"
        )


def _by_torch(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, eps: float, activation: str, skip: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Compute `group_norm_silu` by torch's own group norm, two to five times as fast on a CPU.

    Without dropout. Torch does not take the mean off first, so its error is as many times as large
    as the mean is deviations. It is careful enough where float32 tensors are laid out NCHW and no
    mean is farther from zero than `NEAR`. This reads values, which no compiler's trace has.

    Returns:
        y, or None where the reference has to be taken.
    """
    careful = x.device.type == "cpu" and x.is_contiguous() and x.numel() > 0
    in_float32 = x.dtype == weight.dtype == bias.dtype == torch.float32
    if not careful or not in_float32 or torch.compiler.is_compiling():
        return None
    x = joined(x, skip, before)
    batch, channels, height, width = x.shape
    z, mean, rstd = torch.native_group_norm(  # which takes for granted that they are contiguous
        x, weight.contiguous(), bias.contiguous(), batch, channels, height * width, groups, eps
    )
    if (mean.detach() * rstd.detach()).abs().amax() > NEAR:
        return None
    if scale is not None and shift is not None:
        z = torch.addcmul(per_pixel(shift), z, per_pixel(1 + scale))
    return F.silu(z) if activation == "silu" else z
