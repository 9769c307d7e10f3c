"""Gated residual, LayerNorm or RMSNorm, per-sample scale and shift: one operation.

What joins one branch of a transformer's block to the next. With g, s, t the gate, scale and shift
of a sample, w the norm's weight or one, and means over the channels of a token,

    r = x + g y        m = (1 + s) w x̂ + t
    x̂ = (r − mean r) / √(var r + ε)  (LayerNorm)  or  r / √(mean r² + ε)  (RMSNorm)

r is rounded to the precision it is stored in before it is normalised. Backward, with ρ the factor
of x̂, dr the gradient of what else r is used for, and c₁, c₂ the means of f dm x̂ and f dm over the
channels of a token, where f = w (1 + s) (and c₂ = 0 for RMSNorm),

    dx = dr + ρ (f dm − c₂ − x̂ c₁)        dy = g dx
    dg = Σ dx y        dt = Σ dm        ds = w A        dw = Σₙ (1 + s) A        with A = Σ dm x̂

and sums over the tokens of a sample. Mean and ρ are taken again from r: a token's channels are on
chip together, so that keeping them would save nothing. In half precision forward moves 8 bytes an
element (x, y, r, m), backward 12 (dm, dr, r, y, dx, dy); without y 4 and 8.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (adaLN-Zero); Ba et
al., "Layer Normalization", 2016; Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_kernels.dispatch import (
    differentiable,
    runs_triton,
    skips_dispatcher,
    takes_op,
    traces_gradients,
)
from ddpm_kernels.modulate.launch import launch_backward, launch_forward

NORMS = ("layer", "rms")


def modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream, normalise, scale and shift.

    What is computed from the r that is returned, its gradient is added in the kernel that writes
    that of x. This holds without y too: go on with r, not with x.

    Args:
        x: `[B, L, C]`, the residual stream: float32, float16, bfloat16 (or float64, for checking).
        y: `[B, L, C]`, what the branch before computed, or None.
        gate: `[B, C]`, given exactly when `y` is.
        scale: `[B, C]`; enters as 1 + scale. It, shift and gate may be slices of one product.
        shift: `[B, C]`.
        weight: of the norm, `[C]`, or None for one.
        norm: `"layer"` or `"rms"`.
        eps: added to the variance, or to the mean square.

    Returns:
        r = x + gate · y, and m, the modulated norm of r: both `[B, L, C]` in the dtype of `x`.

    Raises:
        ValueError: an unknown norm, y without gate, or shapes that do not fit.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(map(repr, NORMS))}")
    if (y is None) != (gate is None):
        raise ValueError("y and gate must be given together")
    _check_shapes(x, y, gate, scale, shift, weight)
    arguments = x, y, gate, scale, shift, weight, norm, eps
    if takes_op(x):
        return (_by_op if traces_gradients(x) else _function)(*arguments)
    if x.dtype in (torch.float32, torch.float64):
        same = all(t is None or t.dtype == x.dtype for t in (y, gate, scale, shift, weight))
        if same:
            return _by_torch(*arguments)
    return modulate_reference(*arguments)


def _check_shapes(x: Tensor, y: Tensor | None, *rest: Tensor | None) -> None:
    """Check them against x; a kernel would read past the end of less."""
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, L, C]")
    batch, _, channels = x.shape
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}; it must be {tuple(x.shape)}, as x")
    *per_sample, weight = rest
    for name, tensor in zip(("gate", "scale", "shift"), per_sample, strict=True):
        if tensor is not None and tensor.shape != (batch, channels):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; it must be ({batch}, {channels})"
            )
    if weight is not None and weight.shape != (channels,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be ({channels},)")


# --- Reference


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_token(per_sample: Tensor, dtype: torch.dtype) -> Tensor:
    return per_sample.to(dtype)[:, None]


def _normalised(r: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Return x̂ and the factor ρ, in float32 or float64."""
    centred = r.to(_compute_dtype(r))
    if norm == "layer":
        centred = centred - centred.mean(-1, keepdim=True)
        # The mean's rounding is large beside a small deviation: take off what it left.
        centred = centred - centred.mean(-1, keepdim=True)
    factor = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * factor, factor


def _gain(scale: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The multiplier of x̂, `[B, 1, C]`."""
    gain = 1 + _per_token(scale, dtype)
    return gain if weight is None else gain * weight.to(dtype)


def modulate_reference(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute r and m, `[B, L, C]`; without y, r is x itself. Arguments as in `modulate`."""
    dtype = _compute_dtype(x)
    r = x
    if y is not None and gate is not None:
        r = torch.addcmul(x.to(dtype), _per_token(gate, dtype), y.to(dtype)).to(x.dtype)
    x_hat, _ = _normalised(r, norm, eps)
    m = torch.addcmul(_per_token(shift, dtype), x_hat, _gain(scale, weight, dtype))
    return r, m.to(x.dtype)


def modulate_backward_reference(
    dr: Tensor | None,
    dm: Tensor,
    r: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dy, dgate, dscale, dshift and dweight; empty where there is no such argument.

    dr and dm are shaped as r, which is what `modulate` returns; the rest is as given to it.
    """
    dtype = _compute_dtype(r)
    x_hat, factor = _normalised(r, norm, eps)
    wide = dm.to(dtype)
    dx_hat = wide * _gain(scale, weight, dtype)
    dx = dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True)
    if norm == "layer":
        dx = dx - dx_hat.mean(-1, keepdim=True)
    dx = dx * factor
    if dr is not None:
        dx = dx + dr.to(dtype)
    dy, d_gate, d_weight = (r.new_empty(0) for _ in range(3))
    if y is not None and gate is not None:
        dy = (dx * _per_token(gate, dtype)).to(y.dtype)
        d_gate = (dx * y.to(dtype)).sum(1).to(gate.dtype)
    along = (wide * x_hat).sum(1)
    d_scale, d_shift = along, wide.sum(1).to(scale.dtype)
    if weight is not None:
        d_scale = along * weight.to(dtype)
        d_weight = ((1 + scale.to(dtype)) * along).sum(0).to(weight.dtype)
    return dx.to(r.dtype), dy, d_gate, d_scale.to(scale.dtype), d_shift, d_weight


def _by_torch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute `modulate` by torch's own norms, which are quicker; all in one dtype, `[B, L, C]`."""
    r = x if y is None or gate is None else torch.addcmul(x, gate[:, None], y)
    if norm == "layer":
        normalised = F.layer_norm(r, r.shape[-1:], weight, None, eps)
    else:
        normalised = F.rms_norm(r, r.shape[-1:], weight, eps)
    return r, torch.addcmul(shift[:, None], normalised, 1 + scale[:, None])


# --- Registration


def _takes_kernel(x: Tensor) -> bool:
    return runs_triton(x) and x.dtype != torch.float64 and x.numel() > 0


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if _takes_kernel(x):
        return launch_forward(x, *rest)
    r, m = modulate_reference(x, *rest)
    return (r if r is x else r.contiguous()), m.contiguous()


def _forward_of_op(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The same with an empty tensor for an r that is x: an operation cannot return its argument."""
    r, m = _forward(x, *rest)
    return (x.new_empty(0) if r is x else r), m


def _backward(dr: Tensor | None, dm: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    if _takes_kernel(dm):
        return launch_backward(dr, dm, *rest)
    dx, dy, *sums = modulate_backward_reference(dr, dm, *rest)
    return dx.contiguous(), dy.contiguous(), *sums


def _backward_of_op(dr: Tensor | None, dm: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The same with empty tensors for None, which an operation cannot return."""
    gradients = _backward(dr, dm, *rest)
    return tuple(dm.new_empty(0) if gradient is None else gradient for gradient in gradients)


_op = torch.library.custom_op(
    "ddpm::modulate",
    _forward_of_op,
    mutates_args=(),
    schema=torch.library.infer_schema(modulate_reference, mutates_args=()),
)
_backward_op = torch.library.custom_op(
    "ddpm::modulate_backward",
    _backward_of_op,
    mutates_args=(),
    schema=torch.library.infer_schema(modulate_backward_reference, mutates_args=()),
)


@_op.register_fake
def _(x: Tensor, y: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(0) if y is None else x.new_empty(x.shape), x.new_empty(x.shape)


@_backward_op.register_fake
def _(
    dr: Tensor | None, dm: Tensor, r: Tensor, y: Tensor | None, gate: Tensor | None,
    scale: Tensor, weight: Tensor | None, norm: str, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(tensor: Tensor | None) -> Tensor:
        return r.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return like(r), like(y), like(gate), like(scale), like(scale), like(weight)


def _by_op(x: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    r, m = torch.ops.ddpm.modulate.default(x, y, *rest)
    return (x if y is None else r), m


def _run(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (_forward if skips_dispatcher(x) else _by_op)(x, *rest)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, gate, scale, _, weight, ctx.norm, ctx.eps = inputs
    r = x if y is None else output[0]
    ctx.save_for_backward(r, y, gate, scale, weight)


def _differentiate(ctx: Any, dr: Tensor | None, dm: Tensor | None) -> tuple[Tensor | None, ...]:
    r, y, gate, scale, weight = ctx.saved_tensors
    if dr is not None and dr.shape != r.shape:
        dr = None  # of the empty tensor that the operation returns for r
    if dm is None:
        if dr is None:
            return (None,) * 8
        dm = torch.zeros_like(r)
    call = _backward if skips_dispatcher(dm) else torch.ops.ddpm.modulate_backward.default
    dx, dy, d_gate, d_scale, d_shift, d_weight = call(
        dr, dm, r, y, gate, scale, weight, ctx.norm, ctx.eps
    )
    if y is None:
        dy = d_gate = None
    if weight is None:
        d_weight = None
    return dx, dy, d_gate, d_scale, d_shift, d_weight, None, None


_function = differentiable(_op, _run, _save, _differentiate, results=2)
