"""What happens while pictures are drawn: the network's inputs, its time, operations, memory."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def around(
    network: nn.Module, enter: Callable[[tuple[Any, ...]], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Call `enter` with the arguments before every evaluation of a network, `leave` after it."""
    handles = [
        network.register_forward_pre_hook(lambda _, arguments: enter(arguments)),
        network.register_forward_hook(lambda *_: leave()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a copy of the x that every evaluation is given: the states of the chain."""
    states: list[Tensor] = []
    with around(network, lambda arguments: states.append(arguments[0].clone()), lambda: None):
        yield states


class Stopwatch:
    """Seconds spent inside a network on a CPU."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def start(self, _: tuple[Any, ...]) -> None:
        """Enter the network."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Leave it."""
        self.seconds += time.perf_counter() - self._since


@dataclass
class Counts:
    """Operations that torch dispatched."""

    operations: int = 0
    """Those that read or write memory: each is a launch on a GPU."""
    views: int = 0
    waits: int = 0
    """`_local_scalar_dense`, behind `.item()` and `bool(tensor)`: the host waits for the device."""
    names: Counter[str] = field(default_factory=Counter)
    """Of the operations that are not views."""

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.operations - other.operations,
            self.views - other.views,
            self.waits - other.waits,
            self.names - other.names,
        )


class OperationCounter(TorchDispatchMode):
    """Count operations while active, those inside a network apart.

    What comes before the first evaluation of the network is `before`, and no matter of a step. A
    registered operation, such as one of the engine's kernels, counts as one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside, self.outside = Counts(), Counts(), Counts()
        self._counts = self.before

    def enter(self, _: tuple[Any, ...]) -> None:
        """What follows is inside the network."""
        self._counts = self.inside

    def leave(self) -> None:
        """What follows is outside."""
        self._counts = self.outside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode composite operations arrive whole.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        counts = self._counts
        if func is torch.ops.aten._local_scalar_dense.default:
            counts.waits += 1
        elif func.is_view or func is torch.ops.aten._unsafe_view.default:
            counts.views += 1
        elif not func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            counts.operations += 1
            counts.names[str(func)] += 1
        return func(*args, **kwargs)


@contextmanager
def operations_around(network: nn.Module) -> Iterator[OperationCounter]:
    """Count operations, telling those of a network from the rest.

    The network must not be compiled: torch does not run what it compiled while operations are
    dispatched to Python.
    """
    counter = OperationCounter()
    with around(network, counter.enter, counter.leave), counter:
        yield counter


def peak_tensor_bytes(work: Callable[[], object], device: torch.device) -> int:
    """How far what torch's allocator has handed out rises above its start during a call.

    Exact, and the same on every run, whatever else the process holds; what libraries allocate for
    themselves is not in it. On a CPU the profiler tells, on a GPU the allocator itself.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder, standard_error_to(Path(folder) / "errors"):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            work()
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    return max(itertools.accumulate((size for _, size in changes), initial=0))


@contextmanager
def standard_error_to(path: Path) -> Iterator[None]:
    """Send what libraries write to file descriptor 2 elsewhere: the profiler says when it runs."""
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
