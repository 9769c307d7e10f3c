"""What tells one sample from another: the seed of the noise, and the sample's id."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, SupportsIndex

import torch
from torch import Tensor

from ddpm_engine.bounds import Ge, Le, Lt, values_out_of_bounds
from ddpm_engine.errors import UserError
from ddpm_kernels.philox import MAX_SAMPLE_ID

Ids = Sequence[int] | Tensor
"""Ids of samples: which samples of a seed."""

Seed = Annotated[int, Ge(-(2**63)), Lt(2**64)]
"""Seed of noise: the 64 bits of its key, read as a signed integer or without a sign."""

SampleId = Annotated[int, Ge(0), Le(MAX_SAMPLE_ID)]
"""Id of a sample: the bits that noise has for it."""

Count = Annotated[int, Ge(1), Le(MAX_SAMPLE_ID + 1)]
"""Number of samples: ids 0 to count - 1."""


def check_seed(seed: int) -> None:
    """Refuse what is no `Seed`.

    Raises:
        UserError: another number, or none.
    """
    whole(seed, "seed")
    for problem in values_out_of_bounds({"seed": Seed}, {"seed": seed}):
        raise problem


def numbers_of(ids: Ids, name: str = "ids") -> list[int]:
    """Return ids as a list.

    Args:
        ids: `[N]`.
        name: of the field they are from.

    Raises:
        UserError: a number that noise cannot tell from another sample's, or that is not whole.
    """
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    return [check_id(k, name) for k in ids]


def check_id(sample_id: int, name: str = "ids") -> int:
    """Return the id of a sample.

    Raises:
        UserError: as `numbers_of`.
    """
    number = whole(sample_id, name)
    if not 0 <= number <= MAX_SAMPLE_ID:
        bits = (MAX_SAMPLE_ID + 1).bit_length() - 1
        raise UserError(f"`{name}` has {sample_id}; ids of samples are 0 to 2^{bits} - 1", name)
    return number


def distinct(ids: Sequence[int], name: str = "ids") -> Sequence[int]:
    """Return ids of a set of samples in ascending order; a range, however long, as a range.

    Raises:
        UserError: as `numbers_of`; no ids, or one of them twice.
    """
    if not len(ids):
        raise UserError(f"`{name}` is empty; name at least one sample", name)
    if isinstance(ids, range):
        ids = ids if ids.step > 0 else ids[::-1]
        for end in (ids[0], ids[-1]):
            check_id(end, name)
        return ids if ids.step == 1 else list(ids)
    numbers = sorted(numbers_of(ids, name))
    if twice := [a for a, b in pairwise(numbers) if a == b]:
        raise UserError(f"`{name}` has {twice[0]} more than once; name each sample once", name)
    return numbers


def whole(value: SupportsIndex, name: str) -> int:
    """Return a whole number, as any integer type has it; a float would be cut short.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UserError(f"`{name}` is {value}; it must be a whole number", name)
    return value.__index__()


def tensor_of(ids: Sequence[int], device: torch.device) -> Tensor:
    """Return checked ids as int64 `[N]`."""
    return torch.tensor(ids, dtype=torch.int64, device=device)
