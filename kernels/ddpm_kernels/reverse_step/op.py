"""One step of the reverse process for every sampler: x_t → x_{t-1} by a row of coefficients.

A sampler is a table. Row i holds the float64-derived numbers of step i (`Column`), and the step is

    m    = u + guidance · (c − u)                    c, u: conditional, unconditional output
    m    = m · rescale                               per sample, if given
    x̂_0  = x0_from_x · x + x0_from_output · m
    x̂_0  = clip(x̂_0, −1, 1)                          or clip(x̂_0, −s, s) / s with a threshold s
    x'   = x · x + x0 · x̂_0 + Σ_k history_k · h_k + noise · z

where the words on the right are the row's columns, h_k is slot k of a ring of earlier x̂_0, and z
is standard normal, drawn inside with the row number as the counter's step. The new x̂_0 is written
to slot (row mod slots) after the ring is read. The first two columns hold what the network predicts
(ε, x_0, v), so the loop need not know it.

With a network that also predicts its variance (2C output channels), the second half v ∈ [-1, 1]
interpolates the log-variance between two columns (Nichol & Dhariwal 2021, equation 15),

    noise scale = noise · exp(½ (f · log_variance_max + (1 − f) · log_variance_min))
    f = (v + 1) / 2

and the noise column is 1, or 0 where a step adds none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.dispatch import runs_triton, skips_dispatcher, takes_op
from ddpm_kernels.gaussian_noise import gaussian_noise_reference
from ddpm_kernels.philox import Stream
from ddpm_kernels.reverse_step.columns import Column
from ddpm_kernels.reverse_step.launch import launch_reverse_step
from ddpm_kernels.tiling import as_scalar


def reverse_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,
    unconditional: Tensor | None = None,
    rescale: Tensor | None = None,
    threshold: Tensor | None = None,
    history: Tensor | None = None,
    clip: bool = True,
    in_place: bool = False,
) -> Tensor:
    """Advance the state by one step.

    Args:
        x: `[B, C, H, W]` float32 (or float64), channels-last: the state.
        output: `[B, C, H, W]`, or `[B, 2C, H, W]` with a predicted variance; any float dtype.
        table: float32 (or float64) `[S, Column.HISTORY + K]`.
        row: 0-dim int64 tensor in [0, S): a device value, so that a captured graph can advance it.
        seed: 64-bit integer, or 0-dim int64 tensor.
        sample_ids: int64 `[B]`.
        unconditional: the output for the null class, shaped as `output`, if guided.
        rescale: `[B]` factor on the guided output (Lin et al. 2023), or None.
        threshold: `[B]` dynamic threshold ≥ 1 (Saharia et al. 2022), or None.
        history: `[K, B, C, H, W]` ring of earlier x̂_0 in the dtype of `x`, or None; updated.
        clip: clip x̂_0 to [-1, 1]; a threshold takes precedence.
        in_place: overwrite `x`.

    Returns:
        The new state, shaped as `x`; `x` itself if `in_place`.
    """
    x = x if in_place else x.clone()
    call: Callable[..., None] = reverse_step_reference_
    if takes_op(x):
        differentiable = x.requires_grad or output.requires_grad  # which the operation refuses
        direct = skips_dispatcher(x) and not differentiable
        call = _reverse_step if direct else torch.ops.ddpm.reverse_step_.default
    call(
        x, output, table, row, as_scalar(seed, x.device), sample_ids, unconditional, rescale,
        threshold, history, clip,
    )  # fmt: skip
    return x


# --- Reference


def reverse_step_reference_(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    unconditional: Tensor | None,
    rescale: Tensor | None,
    threshold: Tensor | None,
    history: Tensor | None,
    clip: bool,
) -> None:
    """Compute what `reverse_step` specifies in place, in the precision of the state."""
    coefficients = table.index_select(0, row.reshape(1))[0].to(x.dtype)

    def per_sample(value: Tensor) -> Tensor:
        return value.to(x.dtype)[:, None, None, None]

    output = output.to(x.dtype)
    if unconditional is not None:
        unconditional = unconditional.to(x.dtype)
        output = unconditional + coefficients[Column.GUIDANCE] * (output - unconditional)
    output, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
    if rescale is not None:
        output = output * per_sample(rescale)

    x0 = coefficients[Column.X0_FROM_X] * x + coefficients[Column.X0_FROM_OUTPUT] * output
    if threshold is not None:
        bound = per_sample(threshold)
        x0 = torch.minimum(torch.maximum(x0, -bound), bound) / bound
    elif clip:
        x0 = x0.clamp(-1, 1)

    new = coefficients[Column.X] * x + coefficients[Column.X0] * x0
    noise_scale = coefficients[Column.NOISE]
    # On a CPU the scale can be read before generating noise; elsewhere that would synchronize.
    may_read = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not may_read or noise_scale != 0:
        _, channels, height, width = x.shape
        noise = gaussian_noise_reference(
            seed, sample_ids, channels, height, width, row, int(Stream.SAMPLER_NOISE)
        )
        if variance.shape[1]:
            fraction = (variance + 1) / 2
            log_variance = (
                fraction * coefficients[Column.LOG_VARIANCE_MAX]
                + (1 - fraction) * coefficients[Column.LOG_VARIANCE_MIN]
            )
            noise_scale = noise_scale * (0.5 * log_variance).exp()
        new = new + noise_scale * noise.to(x.dtype)
    if history is not None:
        slots = history.shape[0]
        weights = coefficients[Column.HISTORY : Column.HISTORY + slots]
        new = new + (weights[:, None, None, None, None] * history).sum(0)
        history.index_copy_(0, (row % slots).reshape(1), x0[None])
    x.copy_(new)


# --- Registration


def _reverse_step(x: Tensor, *rest: Any) -> None:
    kernel = runs_triton(x) and x.dtype == torch.float32
    (launch_reverse_step if kernel else reverse_step_reference_)(x, *rest)


_op = torch.library.custom_op(
    "ddpm::reverse_step_",
    _reverse_step,
    mutates_args=("x", "history"),
    schema=torch.library.infer_schema(reverse_step_reference_, mutates_args=("x", "history")),
)


@_op.register_fake
def _(*_: Any) -> None:
    return None
