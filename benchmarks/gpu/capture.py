"""A function as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(function: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Record what a function launches; what is returned replays it, into the same outputs.

    Nothing runs while a graph is recorded, but the function is called beforehand, to compile: what
    it changes in place is changed. Where there are no graphs the function itself is returned.
    """
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> T:
        graph.replay()
        return outputs

    return replay
