"""What the ranks of a run settle among themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

ErrorT = TypeVar("ErrorT", bound=Exception)


def is_main() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def raise_together(kind: type[ErrorT], group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """If the block fails with an error of this kind on any rank, raise one on every rank.

    Args:
        kind: of error; any other is raised where it happens and leaves the other ranks waiting.
        group: whose ranks all enter the block; None: all ranks.
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
