"""The noise that samples start from, and how much of it where they start from an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_kernels import Stream, gaussian_noise


def initial_noise(seed: int, sample_ids: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the noise that each sample of a seed starts from: float32 `[B, C, H, W]`."""
    return gaussian_noise(seed, sample_ids, shape, 0, Stream.INITIAL_NOISE)


def interpolated_noise(
    seed: int, first: int, second: int, weights: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """Interpolate between the noise of two samples, on the great circle through both.

    So each state is as likely as noise is (Shoemake 1985; Song et al. 2020, appendix D.5). With a
    sampler that adds no noise, the samples lie between the two.

    Args:
        seed: of both samples.
        first: a sample id.
        second: another.
        weights: `[N]`: 0 is the first sample, 1 the second.
        shape: (C, H, W).

    Returns:
        float32 `[N, C, H, W]`.
    """
    a, b = initial_noise(seed, torch.tensor([first, second]), shape).double()
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    w = weights.double().cpu()[:, None, None, None]
    return ((((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()).float()


def noise_between(
    seed: int, interpolate: tuple[int, int, int], ids: Sequence[int], shape: tuple[int, int, int]
) -> Tensor:
    """Return what the samples of an interpolation start from.

    Args:
        seed: of all samples.
        interpolate: first id, second id and count, as in `SampleRequest`.
        ids: `[B]`, in [0, count).
        shape: (C, H, W).

    Returns:
        float32 `[B, C, H, W]`.

    Raises:
        UserError: an id that is not among them.
    """
    first, second, count = interpolate
    if beyond := [k for k in ids if k >= count]:
        raise UserError(
            f"`ids` has {beyond[0]}, but `interpolate` leads from sample 0 to {count - 1}", "ids"
        )
    # As torch.linspace, exact at both ends.
    step = 1 / (count - 1)
    weights = [k * step if 2 * k < count else 1 - (count - 1 - k) * step for k in ids]
    return interpolated_noise(
        seed, first, second, torch.tensor(weights, dtype=torch.float64), shape
    )


def check_interpolation(interpolate: tuple[int, int, int], sampler: str, stochastic: bool) -> None:
    """Refuse an interpolation between nothing, or with a sampler that adds noise.

    Args:
        interpolate: as in `SampleRequest`.
        sampler: its name.
        stochastic: whether it adds noise.

    Raises:
        UserError: either.
    """
    first, second, count = interpolate
    if count < 2 or first == second:
        raise UserError(
            f"`interpolate` asks for {count} from {first} to {second}; give two different "
            "ids and at least 2 samples"
        )
    if stochastic:
        raise UserError(
            f"to interpolate, the sampler must add no noise, and {sampler} does; use ddim, "
            "dpm++2m or unipc"
        )


def skipped_steps(steps: int, strength: float) -> int:
    """Return the number of first steps to leave out for an image; at least one step is taken.

    Args:
        steps: of the sampler.
        strength: fraction of the steps to take, above 0 and at most 1.
    """
    return steps - max(1, round(strength * steps))
