"""CUDA graphs: work of a GPU that is recorded once and replayed without the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

Work = Callable[[], None]
"""Work on tensors that exist before it and stay where they are."""

Capture = Callable[[Work], Work]
"""Records work without running it, and returns its replay."""


def captured(work: Work) -> Work:
    """Capture work on the current CUDA device as a graph, without running it; return its replay.

    The very same work must have run before: compilers and libraries set themselves up then, which
    is illegal during a capture. Other threads may go on using the device.
    """
    graph = torch.cuda.CUDAGraph()
    # Weights that autocast has converted are kept until it ends, and the graph may live longer.
    torch.clear_autocast_cache()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    torch.clear_autocast_cache()
    return graph.replay
