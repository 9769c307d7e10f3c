"""A profiler's trace: how long the device works, in what, and what the host does for it."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST = 16 * 10**6
"""Bytes of a compressed trace that is kept whole."""
ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Categories of what a GPU does."""
CLASSES = (
    (
        "normalisation",
        r"group_norm|layer_norm|modulate|moments|^_(forward|sums|combine|dx|statistics|affine)",
    ),
    ("attention", r"flash|fmha|attention|softmax"),
    ("layout", r"nchwToNhwc|nhwcToNchw|transpose"),
    ("convolution", r"conv|cudnn|xmma|wgrad|dgrad|fprop|implicit"),
    ("matrix product", r"gemm|gemv|nvjet|cublas|cutlass|splitK|::mm$|addmm"),
    ("optimizer", r"adam|multi_tensor|lerp|norm_cleanup|LpNorm|lpnorm|gradient_norm|foreach"),
    ("noise and loss", r"q_sample|denoising|loss|reverse_step|philox|draw"),
    ("cast or copy", r"copy|Memcpy|to_copy|cast"),
    ("fill", r"Memset|fill|zero"),
    ("compiled", r"^triton_"),
    ("reduction", r"reduce|sum|mean"),
    ("elementwise", r"elementwise|add|mul|silu|sigmoid|dropout|cat|Cat|upsample|pad"),
)
"""Classes of kernels and what their names have; the first that matches."""
_LAUNCH = re.compile(r"LaunchKernel|cudaGraphLaunch|hipGraphLaunch|cudaMemcpyAsync|cudaMemsetAsync")


@dataclass(frozen=True)
class Summary:
    """What a trace says of some steps. Times are of one step, in milliseconds."""

    kernels: float
    """Kernels, copies and fills on the device."""
    launches: float
    """Calls by which the host starts something; a graph is one."""
    busy: float
    """Time in which the device does anything."""
    by_class: Mapping[str, tuple[float, float]]
    """Time and number of kernels of each class, most time first."""


def class_of(name: str) -> str:
    """Return the class of a kernel."""
    for title, pattern in CLASSES:
        if re.search(pattern, name):
            return title
    return "other"


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans `(begin, end)`."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def summarised(
    events: Sequence[Mapping[str, Any]], steps: int, categories: frozenset[str] = ON_DEVICE
) -> Summary:
    """Summarise the events of a Chrome trace.

    Args:
        events: its `traceEvents`; times are in microseconds.
        steps: that it covers.
        categories: of the events that count as work of the device.
    """
    work = [e for e in events if e.get("cat") in categories and "dur" in e]
    calls = [e for e in events if "cat" in e and _LAUNCH.search(str(e.get("name", "")))]
    by_class: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for event in work:
        title = class_of(str(event["name"]))
        took, count = by_class[title]
        by_class[title] = took + event["dur"] / steps / 1e3, count + 1 / steps
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in work]
    return Summary(
        kernels=len(work) / steps,
        launches=sum(e["cat"] in ("cuda_runtime", "cuda_driver") for e in calls) / steps,
        busy=covered(spans) / steps / 1e3,
        by_class=dict(sorted(by_class.items(), key=lambda entry: -entry[1][0])),
    )


def keep(path: Path, trace: Mapping[str, Any], largest: int = LARGEST) -> None:
    """Write a compressed trace; of one that would be too large, what the device did, and less.

    Args:
        path: ends in `.json.gz`.
        trace: of the profiler.
        largest: bytes of the file.
    """
    events = list(trace["traceEvents"])
    data = _packed({**trace, "traceEvents": events})
    if len(data) > largest:
        events = [e for e in events if e.get("cat") in ON_DEVICE or e.get("ph") == "M"]
        data = _packed({**trace, "traceEvents": events})
    while len(data) > largest:
        events = events[: len(events) // 2]
        data = _packed({**trace, "traceEvents": events})
    path.write_bytes(data)


def _packed(trace: Mapping[str, Any]) -> bytes:
    return gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), 6)
