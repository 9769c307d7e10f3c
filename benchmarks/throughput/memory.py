"""Peak memory of tensors."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def peak_tensor_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Measure how far the memory of torch's allocator rises above its start during a call.

    Exact and reproducible, whatever else the process holds; what libraries allocate for themselves
    is not counted. On a CPU the profiler counts, on a GPU the allocator itself.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder, _standard_error_to(Path(folder) / "errors"):
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
def _standard_error_to(path: Path) -> Iterator[None]:
    """Redirect file descriptor 2: the profiler logs its own start and end there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
