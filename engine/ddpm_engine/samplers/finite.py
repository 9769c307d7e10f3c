"""Samples that are not finite numbers, which as images would be black."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ddpm_engine.errors import UserError

_NAMED = 8


class NotFiniteError(UserError):
    """Samples are not finite numbers: sampling has diverged, or the network's training had."""


def finite_samples(samples: Tensor) -> Tensor:
    """Say which samples `[N, C, H, W]` have finite values only: bool `[N]`, on their device."""
    return samples.flatten(1).isfinite().all(1)


def refuse_not_finite(ids: Sequence[int], seed: int, finite: Sequence[bool]) -> None:
    """Refuse samples with values that are not finite.

    Args:
        ids: of the samples, `[N]`.
        seed: of their noise.
        finite: `[N]`, as `finite_samples` says.

    Raises:
        NotFiniteError: a `UserError` that names them.
    """
    wrong = [str(k) for k, sound in zip(ids, finite, strict=True) if not sound]
    if wrong:
        listed = ", ".join(wrong[:_NAMED])
        listed += f" and {len(wrong) - _NAMED} more" if wrong[_NAMED:] else ""
        raise NotFiniteError(
            f"not finite: sample{'s' * (len(wrong) > 1)} {listed} of seed {seed}. Sampling has "
            "diverged, or the network's training had; take a lower `guidance.scale`, another "
            "`sampler`, more `steps`, or an earlier checkpoint"
        )
