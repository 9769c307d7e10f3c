"""AdamW over flat buffers, with moving averages and half-precision weights, and the gradient norm.

With g the gradient divided by a scale, t the number of this update and η the learning rate,

    m ← m + (1 − β₁)(g − m)          v ← v + (1 − β₂)(g² − v)
    w ← w − η λ w − η / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
    a_k ← a_k + r_k (w − a_k)        for each moving average, with the new w
    h ← w, rounded to half precision

which is torch's AdamW (λ is `weight_decay`), then its averages. Everything that changes between
steps, t included, is read from device memory, so that a captured graph can replay the step.

Gradients are not gathered: the kernel finds each where autograd put it. For a gradient in half
precision and one average, a weight costs 38 bytes:

| what                        | bytes |
|-----------------------------|-------|
| `gradient_norm` reads g     | 2     |
| g                           | 2     |
| w, m, v, a read             | 16    |
| w, m, v, a written          | 16    |
| h written                   | 2     |

and 32 bytes a tile for the table of tiles, at most a tenth of one percent.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; the averages are
Polyak & Juditsky's, exponentially weighted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.adamw_step.checks import check_buffers, check_dense, check_segments
from ddpm_kernels.adamw_step.launch import launch_adamw_step, launch_gradient_norm
from ddpm_kernels.dispatch import runs_triton, skips_dispatcher, takes_op


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Take the Euclidean norm of all gradients together, without reading it.

    Sums are added in an order that depends on shapes only, so that equal gradients have equal norms
    to the bit.

    Args:
        gradients: at least one; of any shapes, dense, float32, float16 or bfloat16 in any mix (or
            float64, for checking).

    Returns:
        0-dim float32 (float64 if a gradient is): infinite or NaN where a gradient is.

    Raises:
        ValueError: there is no gradient, or one is not dense.
    """
    if not gradients:
        raise ValueError("gradient_norm needs at least one gradient")
    if not takes_op(gradients[0]):
        return gradient_norm_reference(gradients)
    if skips_dispatcher(gradients[0]):
        return _gradient_norm(gradients)
    return torch.ops.ddpm.gradient_norm.default(gradients)


def adamw_step(
    gradients: list[Tensor],
    offsets: list[int],
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: Tensor,
    shadow: Tensor | None,
    step: Tensor,
    learning_rate: Tensor,
    ema_weights: Tensor,
    gradient_scale: Tensor,
    skip: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update weights, moments, averages and half-precision weights in place.

    A gradient belongs to the segment of the flat buffers that begins at its offset. What lies in no
    segment stays as it is, so a frozen weight's average does not move. Offsets that are multiples
    of 4 let float32 be moved 16 bytes at a time, and half precision 8.

    Args:
        gradients: of any shapes; dense, their elements in memory in the order of their segments;
            float32, float16 or bfloat16 in any mix.
        offsets: where each one's segment begins, in elements; ascending, segments do not overlap.
        weights: float32 `[N]` (or float64, as all others, for checking), contiguous.
        exp_avg: float32 `[N]`: m.
        exp_avg_sq: float32 `[N]`: v.
        averages: float32 `[K, N]`; K may be 0.
        shadow: float16 or bfloat16 `[M]`, M ≤ N: is given the first M new weights; or None.
        step: 0-dim float32: updates done. One more, unless skipped.
        learning_rate: 0-dim float32: η.
        ema_weights: float32 `[K]`: r.
        gradient_scale: 0-dim float32: gradients are divided by it.
        skip: 0-dim float32: if it is not zero, nothing changes.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε, added to the denominator.
        weight_decay: λ.

    Raises:
        ValueError: shapes do not fit together, or a tensor is not laid out as said.
        RuntimeError: captured into a graph, without a call before it for the same shapes.
    """
    arguments = (
        gradients, offsets, weights, exp_avg, exp_avg_sq, averages, shadow, step, learning_rate,
        ema_weights, gradient_scale, skip, *betas, eps, weight_decay,
    )  # fmt: skip
    if not takes_op(weights):
        adamw_step_reference_(*arguments)
    elif skips_dispatcher(weights):
        _adamw_step(*arguments)
    else:
        torch.ops.ddpm.adamw_step_.default(*arguments)


# --- Reference


def gradient_norm_reference(gradients: list[Tensor]) -> Tensor:
    """Compute what `gradient_norm` specifies."""
    dtype = _norm_dtype(gradients)
    norms = [torch.linalg.vector_norm(in_memory_order(g), dtype=dtype) for g in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def _norm_dtype(gradients: list[Tensor]) -> torch.dtype:
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    return torch.float64 if wide else torch.float32


def adamw_step_reference_(
    gradients: list[Tensor],
    offsets: list[int],
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: Tensor,
    shadow: Tensor | None,
    step: Tensor,
    learning_rate: Tensor,
    ema_weights: Tensor,
    gradient_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Compute what `adamw_step` specifies in place, in the precision of the weights."""
    check_buffers(weights, exp_avg, exp_avg_sq, averages, shadow, ema_weights)
    check_segments([g.numel() for g in gradients], offsets, weights.numel())
    dtype = weights.dtype
    skipped = skip != 0

    def set_to(old: Tensor, new: Tensor) -> None:
        old.copy_(torch.where(skipped, old, new.to(old.dtype)))

    t = step.to(dtype) + 1
    learning_rate = learning_rate.to(dtype)
    step_size = learning_rate / _bias_correction(beta1, t)
    root = _bias_correction(beta2, t).sqrt()
    half = 0 if shadow is None else shadow.numel()
    for gradient, offset in zip(gradients, offsets, strict=True):
        g = in_memory_order(gradient).to(dtype) / gradient_scale.to(dtype)
        segment = slice(offset, offset + g.numel())
        w, m, v = weights[segment], exp_avg[segment], exp_avg_sq[segment]
        new_m = m.lerp(g, 1 - beta1)
        new_v = v.lerp(g.square(), 1 - beta2)
        update = step_size * new_m / (new_v.sqrt() / root + eps)
        new_w = w - (learning_rate * weight_decay * w + update)
        a = averages[:, segment]
        set_to(a, a.lerp(new_w, ema_weights.to(dtype)[:, None]))
        if shadow is not None and offset < half:
            set_to(shadow[segment], new_w[: half - offset])
        for old, new in ((w, new_w), (m, new_m), (v, new_v)):
            set_to(old, new)
    step.copy_(torch.where(skipped, step, step + 1))


def _bias_correction(beta: float, t: Tensor) -> Tensor:
    """1 − βᵗ, which loses digits to cancellation if it is computed so."""
    return -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)


def in_memory_order(gradient: Tensor) -> Tensor:
    """View a dense tensor of any shape as `[numel]`, in the order of its elements in memory.

    Raises:
        ValueError: it is not dense.
    """
    check_dense(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))


# --- Registration


def _gradient_norm(gradients: list[Tensor]) -> Tensor:
    kernel = runs_triton(gradients[0]) and gradients[0].dtype != torch.float64
    return (launch_gradient_norm if kernel else gradient_norm_reference)(gradients)


def _adamw_step(gradients: list[Tensor], offsets: list[int], weights: Tensor, *rest: Any) -> None:
    kernel = runs_triton(weights) and weights.dtype == torch.float32
    (launch_adamw_step if kernel else adamw_step_reference_)(gradients, offsets, weights, *rest)


_library = torch.library.Library("ddpm", "FRAGMENT")
for _name, _reference, _run, _mutated in (
    ("gradient_norm", gradient_norm_reference, _gradient_norm, ()),
    (
        "adamw_step_", adamw_step_reference_, _adamw_step,
        ("weights", "exp_avg", "exp_avg_sq", "averages", "shadow", "step"),
    ),
):  # fmt: skip
    _schema = torch.library.infer_schema(_reference, mutates_args=_mutated)
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")


@torch.library.register_fake("ddpm::gradient_norm", lib=_library)
def _(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty((), dtype=_norm_dtype(gradients))


@torch.library.register_fake("ddpm::adamw_step_", lib=_library)
def _(*_: Any) -> None:
    return None
