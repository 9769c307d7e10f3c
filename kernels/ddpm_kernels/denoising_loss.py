"""The weighted squared error between a prediction and its target, and its gradient.

    L_b = w_b · mean over pixels and channels of (prediction − target)²
    ∂L_b / ∂prediction = 2 w_b (prediction − target) / (C H W)

with the target ε, x_0, or v = sqrt(ᾱ_t) ε − sqrt(1 − ᾱ_t) x_0. The noise that made x_t is drawn a
second time from the counter map; it is never passed in. With w = 1 and target ε this is L_simple.

Source: Ho et al. 2020, equation 14; v: Salimans & Ho 2022, appendix D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.dispatch import takes_op
from ddpm_kernels.q_sample import clean_images, training_noise

TARGETS = ("eps", "x0", "v")


def denoising_loss(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,
    weights: Tensor | None = None,
    flip: Tensor | None = None,
    target: str = "eps",
) -> Tensor:
    """Per-sample loss; differentiable in `prediction` alone.

    Args:
        prediction: `[B, C, H, W]`, the network's output for `q_sample` of the same arguments.
        images: as given to `q_sample`; likewise `timesteps`, both tables, `seed`, `sample_ids` and
            `flip`.
        timesteps: int64 `[B]`.
        sqrt_alpha_bar: float32 `[T]`.
        sqrt_one_minus_alpha_bar: float32 `[T]`.
        seed: 64-bit integer, or 0-dim int64 tensor.
        sample_ids: int64 `[B]`.
        weights: float32 `[B]`, or None for ones.
        flip: bool `[B]` or None.
        target: what the network predicts: `"eps"`, `"x0"` or `"v"`.

    Returns:
        float32 `[B]` (float64 when the tables are).

    Raises:
        ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}")
    seed = torch.as_tensor(seed, dtype=torch.int64, device=images.device)
    arguments = (
        prediction, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids,
        weights, flip, target,
    )  # fmt: skip
    if takes_op(prediction):
        loss, _ = torch.ops.ddpm.denoising_loss(*arguments)
        return loss
    return denoising_loss_reference(*arguments)


def _error(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    target: str,
) -> Tensor:
    """prediction − target, in the precision of the tables."""
    compute = sqrt_alpha_bar.dtype
    if target == "x0":
        truth = clean_images(images, flip, compute)
    else:
        truth = training_noise(images, seed, sample_ids, compute)
        if target == "v":
            signal = sqrt_alpha_bar[timesteps][:, None, None, None]
            sigma = sqrt_one_minus_alpha_bar[timesteps][:, None, None, None]
            truth = signal * truth - sigma * clean_images(images, flip, compute)
    return prediction.to(compute) - truth


def denoising_loss_reference(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    target: str,
) -> Tensor:
    """What `denoising_loss` computes, differentiated by autograd."""
    error = _error(
        prediction, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids,
        flip, target,
    )  # fmt: skip
    loss = error.square().mean((1, 2, 3))
    return loss if weights is None else loss * weights


@torch.library.custom_op("ddpm::denoising_loss", mutates_args=())
def _op(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    target: str,
) -> tuple[Tensor, Tensor]:
    """Returns the loss and prediction − target, in one pass over the prediction.

    The gradient is the second output times a number per sample, which is applied in the backward
    pass, in the precision of the loss: it holds the loss scale of half-precision training, and
    1 / (C H W), and without the one the other would take float16 gradients below its normal range.
    """
    error = _error(
        prediction, images, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, sample_ids,
        flip, target,
    )  # fmt: skip
    loss = error.square().mean((1, 2, 3))
    if weights is not None:
        loss = loss * weights
    return loss, error.to(prediction.dtype).contiguous(memory_format=torch.channels_last)


@_op.register_fake
def _(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    target: str,
) -> tuple[Tensor, Tensor]:
    loss = sqrt_alpha_bar.new_empty(prediction.shape[0])
    return loss, torch.empty_like(prediction, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights = inputs[7]
    _, error = output
    ctx.mark_non_differentiable(error)
    ctx.save_for_backward(error, weights)


def _differentiate(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    error, weights = ctx.saved_tensors
    factor = d_loss * (2 / (error.shape[1] * error.shape[2] * error.shape[3]))
    if weights is not None:
        factor = factor * weights
    return (error * factor[:, None, None, None]).to(error.dtype), *[None] * 9


_op.register_autograd(_differentiate, setup_context=_save)
