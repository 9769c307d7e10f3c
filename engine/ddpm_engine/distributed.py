"""What the ranks of a run exchange; a process that was launched alone is one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
ErrorT = TypeVar("ErrorT", bound=Exception)


def rank() -> int:
    """Number of this process among all ranks; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, or the only process."""
    return rank() == 0


@contextmanager
def raise_together(kind: type[ErrorT], group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """If the block fails with an error of this kind on any rank, raise one on every rank.

    Args:
        kind: type of error; any other is raised where it happens, and the other ranks wait.
        group: ranks that all enter the block; None: all ranks.
    """
    failure: ErrorT | None = None
    try:
        yield
    except kind as error:
        failure = error
    if dist.is_initialized():
        messages: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(messages, None if failure is None else str(failure), group)
        if failure is None and any(messages):
            failure = kind("; ".join(message for message in messages if message))
    if failure is not None:
        raise failure


def of_main(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Return rank 0's value on every rank; all ranks call this together.

    Args:
        value: picklable.
        group: ranks that call it, rank 0 among them; None: all ranks.
    """
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


class Ranks:
    """Collectives over all ranks. Every method is called by all of them together."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate a tensor `[N, ...]` of every rank, in rank order: `[world size · N, ...]`.

        Takes the memory of all ranks' tensors on each rank: not for anything as large as a network.
        """
        if world_size() == 1:
            return tensor
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(gathered, tensor)
        return torch.cat(gathered)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks, elementwise; takes the memory of one copy."""
        total = tensor.clone()
        if world_size() > 1:
            dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over ranks, elementwise; takes the memory of one copy."""
        return self.sum(tensor).div_(world_size())

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over ranks, in place and in one exchange; takes the memory of one copy.

        On one rank there is nothing to do.

        Args:
            tensors: of any shapes and one dtype, the same on every rank.
        """
        if world_size() == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat.div_(world_size())
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
