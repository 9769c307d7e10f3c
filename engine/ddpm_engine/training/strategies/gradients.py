"""Where the gradients of a step are: as autograd left them, or summed in one flat buffer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from ddpm_engine.training.strategies.flat_state import FlatState, Segment

BUCKET_BYTES = 25 * 2**20
"""Size of what ranks exchange at once, as of torch's DistributedDataParallel."""


class Gradients(Protocol):
    """Collects the gradients of a network whose parameters belong to a `FlatState`."""

    whole: bool
    """Whether `take` returns one flat buffer, or a tensor for each segment."""

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Enclose the forward and backward pass of a micro-batch; `last`: it completes the step."""
        ...

    def take(self) -> list[Tensor]:
        """Return the gradients of the step, summed over micro-batches and ranks.

        They are those of the buffers' segments in their order, dense and in their memory order, or
        one flat buffer `[N]`. A parameter without a gradient has one of zeros.
        """
        ...

    def clear(self) -> None:
        """Forget the gradients that were taken."""
        ...

    def close(self) -> None:
        """Collect no more."""
        ...


class LocalGradients:
    """Gradients of one micro-batch and one rank: they stay where autograd left them."""

    whole = False

    def __init__(self, model: nn.Module, state: FlatState) -> None:
        parameters = dict(model.named_parameters())
        self._parameters = [parameters[segment.name] for segment in state.segments]

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """See `Gradients`."""
        return nullcontext()

    def take(self) -> list[Tensor]:
        """See `Gradients`."""
        return [torch.zeros_like(p) if (g := p.grad) is None else g for p in self._parameters]

    def clear(self) -> None:
        """See `Gradients`."""
        for parameter in self._parameters:
            parameter.grad = None

    def close(self) -> None:
        """See `Gradients`."""


class SummedGradients:
    """Gradients summed over micro-batches and ranks in one flat buffer, in the masters' precision.

    Ranks exchange slices of it, buckets, as soon as all gradients of a bucket are there, while
    backward goes on. The order of buckets is the same on every rank. This is what torch's
    DistributedDataParallel does (Li et al., "PyTorch Distributed", 2020), without a wrapper, in the
    buffer that the optimizer reads, and so that a CUDA graph can hold it.

    Args:
        model: network whose parameters belong to the state.
        state: flat state.
        ranks: number of ranks that take part.
    """

    whole = True

    def __init__(self, model: nn.Module, state: FlatState, ranks: int) -> None:
        self._flat = torch.zeros_like(state.weights)
        self._ranks = ranks
        self._buckets = _cut(model, state, self._flat)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket))
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]
        self._first, self._last = True, False
        self._next = 0
        self._in_flight: list[dist.Work] = []

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """See `Gradients`."""
        self._last = last
        yield
        self._finish_piece()

    def take(self) -> list[Tensor]:
        """See `Gradients`."""
        for work in self._in_flight:
            work.wait()
        self._in_flight.clear()
        return [self._flat]

    def clear(self) -> None:
        """See `Gradients`: the next step overwrites them."""
        self._first = True

    def close(self) -> None:
        """See `Gradients`."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, bucket: _Bucket, _parameter: Tensor) -> None:
        """Count a gradient, in the backward pass; send the buckets that are complete."""
        bucket.missing -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._send(self._buckets[self._next])

    def _finish_piece(self) -> None:
        """Send the buckets that have not become complete: some weights took no part."""
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._next, self._first = 0, False

    def _send(self, bucket: _Bucket) -> None:
        bucket.gather(self._first)
        self._next += 1
        if self._last and self._ranks > 1:
            work = dist.all_reduce(bucket.flat, async_op=True)
            assert work is not None, "this rank is one of the group"
            self._in_flight.append(work)


class _Bucket:
    """A slice of the flat buffer, and the parameters whose gradients it sums."""

    def __init__(self, flat: Tensor, start: int, segments: list[Segment], parameters: Any) -> None:
        self.parameters: list[Parameter] = [parameters[segment.name] for segment in segments]
        self.missing = len(segments)
        """Gradients of the micro-batch that are still to come."""
        self._start = start
        self.flat = flat[start : segments[-1].end]
        self._segments = segments
        self._views = self._views_of(self.flat)

    @torch.no_grad()
    def gather(self, first: bool) -> None:
        """Add what autograd has left to the slice, or overwrite it, and clear what it left."""
        gradients = [parameter.grad for parameter in self.parameters]
        here = [gradient is not None for gradient in gradients]
        # A fresh buffer, because the sum of lists of two dtypes is many launches.
        target, views = self.flat, self._views
        if not first:
            target = torch.zeros_like(self.flat)
            views = self._views_of(target)
        elif not all(here):
            target.zero_()
        if any(here):
            torch._foreach_copy_(
                [view for view, is_here in zip(views, here, strict=True) if is_here],
                [gradient for gradient in gradients if gradient is not None],
            )
        if not first:
            self.flat += target
        for parameter in self.parameters:
            parameter.grad = None

    def _views_of(self, flat: Tensor) -> list[Tensor]:
        return [
            flat.as_strided(s.shape, s.stride, flat.storage_offset() + s.offset - self._start)
            for s in self._segments
        ]


def _cut(model: nn.Module, state: FlatState, flat: Tensor) -> list[_Bucket]:
    """Cut the flat buffer into buckets, in about the order in which backward completes them.

    It goes through the network from its end, and the shadowed weights, which come first in the
    buffer, are nearly all there is of it.
    """
    parameters = dict(model.named_parameters())
    shadowed = 0 if state.shadow is None else len(state.shadow)
    regions = [
        [segment for segment in state.segments if segment.offset < shadowed],
        [segment for segment in state.segments if segment.offset >= shadowed],
    ]
    buckets = []
    for region in regions:
        bucket: list[Segment] = []
        for segment in reversed(region):
            bucket.insert(0, segment)
            if (bucket[-1].end - segment.offset) * flat.itemsize >= BUCKET_BYTES:
                buckets.append(bucket)
                bucket = []
        if bucket:
            buckets.append(bucket)
    return [_Bucket(flat, bucket[0].offset, bucket, parameters) for bucket in buckets]
