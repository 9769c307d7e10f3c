"""How many samples a device generates at a time. Samples do not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch

from ddpm_engine.bounds import Ge
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.sampler import Sampler

BatchSize = Annotated[int, Ge(1)] | Literal["auto"]
"""Samples at a time; auto: as many as a GPU's memory holds, and on a CPU 64."""

DEFAULT = 64
"""A CPU is busy with fewer, and memory that it shares with others should not be filled."""
_MOST = 1024
"""A GPU gains nothing from more, and a process that is killed would lose more."""
_PROBE = 4


def batch_size_of(sampler: Sampler, asked: BatchSize, ids: Sequence[int]) -> int:
    """Return the number of samples to generate at a time, by generating as many if necessary.

    Args:
        sampler: generates them; afterwards it has taken each kind of step for such a batch.
        asked: a number is returned as it is.
        ids: of the samples, not empty.

    Raises:
        UserError: not even one sample fits.
    """
    if asked != "auto":
        return asked
    if sampler.device.type != "cuda":
        return DEFAULT
    most = _power_of_two_from(min(len(ids), _MOST))
    bytes_of_one = _memory_of(sampler, ids[:_PROBE]) / min(len(ids), _PROBE)
    free, _ = torch.cuda.mem_get_info(sampler.device)
    estimate = _power_of_two_from(int(free / max(bytes_of_one, 1)))
    return largest_that_fits(lambda size: sampler.warm_up(ids[:size]), min(most, estimate))


def largest_that_fits(attempt: Callable[[int], object], start: int) -> int:
    """Return the largest batch size, of `start` halved again and again, that memory is enough for.

    Args:
        attempt: computes a batch of a size.
        start: a power of two.

    Raises:
        UserError: not even one sample fits.
    """
    size = start
    while size:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError:
            size //= 2
    raise UserError(
        "`batch_size` is auto, and memory is too small for a single sample; use precision bf16, or "
        "end what else runs on this GPU",
        "batch_size",
    )


def _memory_of(sampler: Sampler, ids: Sequence[int]) -> int:
    """The bytes of the sampler's GPU that a batch takes at its peak."""
    device = sampler.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    sampler.warm_up(ids)
    return torch.cuda.max_memory_allocated(device) - before


def _power_of_two_from(number: int) -> int:
    """The smallest power of two that is at least `number`, and at least 1."""
    return 1 << max(number - 1, 0).bit_length()
