"""The weighted squared error between a prediction and its target, and its gradient.

    L_b = w_b · mean over pixels and channels of e²,        e = prediction − target
    target = target_x0 · x_0 + target_noise · ε
    ∂L_b / ∂prediction = 2 w_b e / (C H W)

The two coefficients are tables, looked up by timestep like those of `q_sample`, so that any target
that is linear in image and noise is one and the same kernel:

| target | target_x0             | target_noise       |
|--------|-----------------------|--------------------|
| ε      | None                  | 1                  |
| x_0    | 1                     | None               |
| v      | −sqrt(1 − ᾱ_t)        | sqrt(ᾱ_t)          |
| EDM's  | (1 − c_skip) / c_out  | −c_skip σ / c_out  |

None means zero: without target_x0 the images are not read, without target_noise there is no noise.
The noise is the one that made x_t, regenerated from the counter map; it is never passed in. With
w = 1 and the target ε this is L_simple. A latent x_0 is likewise drawn again from its moments
(`latents`), and never passed in.

A network that also learns its variance predicts 2C channels, and the loss gains a term of the
variational bound (`variational_bound`), which trains the second C channels alone:

    L_b = w_b · mean(e²) + λ_b · mean(ℓ)

Source: Ho et al. 2020, equation 14; v: Salimans & Ho 2022, appendix D; EDM: Karras et al. 2022,
equation 8; the hybrid loss: Nichol & Dhariwal 2021, equation 16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.denoising_loss.launch import launch_denoising_loss
from ddpm_kernels.dispatch import differentiable, runs_triton, skips_dispatcher, takes_op
from ddpm_kernels.latents import channels_of, check_moments
from ddpm_kernels.q_sample import clean_images, clean_samples, training_noise
from ddpm_kernels.tiling import as_scalar, check_per_sample
from ddpm_kernels.variational_bound import BoundColumn, variational_bound


def denoising_loss(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    target_x0: Tensor | None,
    target_noise: Tensor | None,
    seed: int | Tensor,
    sample_ids: Tensor,
    weights: Tensor | None = None,
    flip: Tensor | None = None,
    bound_table: Tensor | None = None,
    bound_weights: Tensor | None = None,
    latent_scale: float | None = None,
    latent_shift: float = 0.0,
) -> Tensor:
    """Compute the loss of each sample; differentiable, once, in `prediction` alone.

    Args:
        prediction: `[B, C, H, W]`, the network's output for `q_sample` of the same arguments;
            `[B, 2C, H, W]` with a learned variance.
        images: as given to `q_sample`; likewise `timesteps`, `seed`, `sample_ids`, `flip`,
            `latent_scale` and `latent_shift`.
        timesteps: int64 `[B]`, the row of each sample in the tables.
        target_x0: float32 `[T]` (float64 in float64 checks), factor of x_0 in the target; None: 0.
        target_noise: likewise, factor of ε.
        seed: 64-bit integer, or 0-dim int64 tensor.
        sample_ids: int64 `[B]`.
        weights: float32 `[B]`, or None for ones.
        flip: bool `[B]` or None.
        bound_table: float32 `[T, 3]`, see `BoundColumn`; with a learned variance only.
        bound_weights: float32 `[B]`, λ; with a learned variance only. T/1000 for the hybrid
            objective.
        latent_scale: what a latent is multiplied with; None: `images` are images, no moments.
        latent_shift: what is subtracted from a latent before.

    Returns:
        float32 `[B]` (float64 when the tables are).

    Raises:
        ValueError: the target is zero, or a shape does not fit the rest.
    """
    check_moments(images, flip, latent_scale, latent_shift)
    _check(
        prediction, images, timesteps, target_x0, target_noise, sample_ids, weights, flip,
        bound_table, bound_weights, channels_of(images, latent_scale),
    )  # fmt: skip
    arguments = (
        prediction, images, timesteps, target_x0, target_noise, as_scalar(seed, images.device),
        sample_ids, weights, flip, bound_table, bound_weights, latent_scale, latent_shift,
    )  # fmt: skip
    if takes_op(prediction):
        if skips_dispatcher(prediction):
            return _function(*arguments)
        loss, _ = torch.ops.ddpm.denoising_loss.default(*arguments)
        return loss
    return denoising_loss_reference(*arguments)


def _check(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    target_x0: Tensor | None,
    target_noise: Tensor | None,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    bound_table: Tensor | None,
    bound_weights: Tensor | None,
    channels: int,
) -> None:
    """Refuse what a kernel would read past the end of, or what has no meaning."""
    batch, _, *pixels = images.shape
    if target_x0 is None and target_noise is None:
        raise ValueError("target_x0 and target_noise are both None; give at least one")
    if (bound_table is None) != (bound_weights is None):
        raise ValueError("bound_table and bound_weights come together or not at all")
    expected = (batch, channels if bound_table is None else 2 * channels, *pixels)
    if prediction.shape != expected:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}; for images of {tuple(images.shape)}, "
            f"{'without' if bound_table is None else 'with'} a bound table, it must be {expected}"
        )
    if bound_table is not None and bound_table.shape[1:] != (len(BoundColumn),):
        raise ValueError(
            f"bound_table has shape {tuple(bound_table.shape)}; it must be [T, {len(BoundColumn)}]"
        )
    check_per_sample(
        batch, timesteps=timesteps, sample_ids=sample_ids, weights=weights, flip=flip,
        bound_weights=bound_weights,
    )  # fmt: skip


def _compute_dtype(target_x0: Tensor | None, target_noise: Tensor | None) -> torch.dtype:
    table = target_noise if target_x0 is None else target_x0
    assert table is not None
    return table.dtype


# --- Reference


def _error(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    target_x0: Tensor | None,
    target_noise: Tensor | None,
    seed: Tensor,
    sample_ids: Tensor,
    flip: Tensor | None,
    latent_scale: float | None,
    latent_shift: float,
) -> Tensor:
    """e = prediction − target, in the precision of the tables."""
    compute = _compute_dtype(target_x0, target_noise)
    channels = channels_of(images, latent_scale)
    target: Tensor | None = None
    if target_noise is not None:
        # In place, as one fewer tensor of the batch's size is alive then.
        target = training_noise(images, channels, seed, sample_ids, compute)
        target.mul_(target_noise[timesteps][:, None, None, None])
    if target_x0 is not None:
        x_0 = clean_samples(images, seed, sample_ids, flip, compute, latent_scale, latent_shift)
        of_image = target_x0[timesteps][:, None, None, None] * x_0
        target = of_image if target is None else target.add_(of_image)
    assert target is not None, "`_check` refuses this"
    return prediction[:, :channels].to(compute) - target


def _second_half(
    prediction: Tensor,
    images: Tensor,
    flip: Tensor | None,
    dtype: torch.dtype,
    latent_scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Return what a learned variance is computed from: r, and x_0 of images, None of latents."""
    r = prediction[:, channels_of(images, latent_scale) :]
    return r, clean_images(images, flip, dtype) if latent_scale is None else None


def denoising_loss_reference(
    prediction: Tensor, images: Tensor, timesteps: Tensor, *rest: Any
) -> Tensor:
    """Compute what `denoising_loss` specifies; arguments as there; differentiated by autograd."""
    target_x0, target_noise, seed, ids, weights, flip, bound_table, bound_weights, *latent = rest
    error = _error(
        prediction, images, timesteps, target_x0, target_noise, seed, ids, flip, *latent
    )  # fmt: skip
    # Not as a mean, whose gradient would be spread over a tensor before it meets the error.
    loss = error.square().sum((1, 2, 3)) / error.shape[1:].numel()
    if weights is not None:
        loss = loss * weights
    if bound_table is not None:
        r, x_0 = _second_half(prediction, images, flip, error.dtype, latent[0])
        bound, _ = variational_bound(error, r, x_0, timesteps, bound_table)
        loss = loss + bound_weights * bound.mean((1, 2, 3))
    return loss


def loss_and_slope_reference(
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    target_x0: Tensor | None,
    target_noise: Tensor | None,
    seed: Tensor,
    sample_ids: Tensor,
    weights: Tensor | None,
    flip: Tensor | None,
    bound_table: Tensor | None,
    bound_weights: Tensor | None,
    latent_scale: float | None,
    latent_shift: float,
) -> tuple[Tensor, Tensor]:
    """Compute the loss and, in one pass, what its gradient is made of: e, and behind it ∂ℓ/∂r.

    Arguments as in `denoising_loss`; the loss is `[B]`, the slopes are shaped as the prediction.
    The gradient is these times a number per sample, which is applied in the backward pass, in the
    precision of the loss: it holds the loss scale of half-precision training, and 1 / (C H W), and
    without the one the other would take float16 gradients below its normal range.
    """
    error = _error(
        prediction, images, timesteps, target_x0, target_noise, seed, sample_ids, flip,
        latent_scale, latent_shift,
    )  # fmt: skip
    loss = error.square().mean((1, 2, 3))
    if weights is not None:
        loss = loss * weights
    slope = error
    if bound_table is not None and bound_weights is not None:
        r, x_0 = _second_half(prediction, images, flip, error.dtype, latent_scale)
        bound, variance_slope = variational_bound(error, r, x_0, timesteps, bound_table)
        slope = torch.cat([error, variance_slope], dim=1)
        loss = loss + bound_weights * bound.mean((1, 2, 3))
    return loss, slope.to(prediction.dtype).contiguous(memory_format=torch.channels_last)


# --- Registration


def _loss_and_slope(prediction: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kernel = runs_triton(prediction) and _compute_dtype(*rest[2:4]) == torch.float32
    return (launch_denoising_loss if kernel else loss_and_slope_reference)(prediction, *rest)


_op = torch.library.custom_op(
    "ddpm::denoising_loss",
    _loss_and_slope,
    mutates_args=(),
    schema=torch.library.infer_schema(loss_and_slope_reference, mutates_args=()),
)


@_op.register_fake
def _(prediction: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    loss = prediction.new_empty(prediction.shape[0], dtype=_compute_dtype(*rest[2:4]))
    return loss, torch.empty_like(prediction, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, images, _, _, _, _, _, weights, _, _, bound_weights, latent_scale, _ = inputs
    _, slope = output
    ctx.channels = channels_of(images, latent_scale)
    ctx.save_for_backward(slope, weights, bound_weights)


def _differentiate(ctx: Any, d_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 13
    slope, weights, bound_weights = ctx.saved_tensors
    batch, _, height, width = slope.shape
    count = ctx.channels * height * width
    factor = d_loss / (count / 2)
    if weights is not None:
        factor = factor * weights
    factor = factor.view(batch, 1, 1, 1)
    if bound_weights is not None:
        variance = (d_loss / count * bound_weights).view(batch, 1, 1, 1)
        both = torch.cat([factor, variance], dim=1)
        factor = both.repeat_interleave(ctx.channels, dim=1)
    # Straight to the precision of the network, rounded once and without a float32 tensor between.
    # (Nor can this be differentiated again: torch says so, where a result would be wrong.)
    gradient = torch.mul(slope, factor, out=torch.empty_like(slope))
    return gradient, *[None] * 12


_function = differentiable(_op, _loss_and_slope, _save, _differentiate)
