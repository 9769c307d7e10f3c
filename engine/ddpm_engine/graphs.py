"""CUDA graphs: work of a GPU that is recorded once and replayed without the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

Work = Callable[[], None]
"""Work on tensors that exist before it and stay where they are."""

Capture = Callable[[Work], Work]
"""Records work without running it, and returns its replay."""


@contextmanager
def as_captured(device: torch.device) -> Iterator[None]:
    """Run the block on the stream that captures use, between what is queued before and after.

    What is to be captured has to run so first. Compilers and libraries set themselves up then, some
    for each stream, which is illegal during a capture; and a node of autograd that outlives the
    first run belongs to no other stream than the capture's.

    Args:
        device: of the work; nothing changes unless it is a GPU.
    """
    if device.type != "cuda":
        yield
        return
    current = torch.cuda.current_stream(device)
    stream = _stream(current.device_index)
    # Memory of one stream that the other has used is not written before that use has ended.
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


def captured(work: Work) -> Work:
    """Capture work on the current CUDA device as a graph, without running it; return its replay.

    The very same work must have run before, `as_captured`. Other threads may go on using the
    device.
    """
    graph = torch.cuda.CUDAGraph()
    # Weights that autocast has converted are kept until it ends, and the graph may live longer.
    torch.clear_autocast_cache()
    stream = _stream(torch.cuda.current_device())
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    torch.clear_autocast_cache()
    return graph.replay


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The one stream of a device that captures use."""
    return torch.cuda.Stream(device)
