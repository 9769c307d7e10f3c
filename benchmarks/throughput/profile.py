"""Where the time of a network goes, operation by operation."""

from __future__ import annotations

import torch
from benchmarks.throughput.report import aligned
from benchmarks.throughput.subject import Subject
from torch.profiler import ProfilerActivity, profile

EVALUATIONS = 10


def shares_by_operation(subject: Subject, batch: int) -> dict[str, float]:
    """Share of the eager network's time on the CPU that each operation itself takes, largest first.

    Args:
        subject: on a CPU.
        batch: images of an evaluation.
    """
    x = torch.randn(batch, *subject.unet.sample_shape)
    timestep = torch.tensor(subject.schedule.timesteps // 2)
    with torch.inference_mode():
        subject.unet(x, timestep)
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            for _ in range(EVALUATIONS):
                subject.unet(x, timestep)
    times = {entry.key: entry.self_cpu_time_total for entry in watched.key_averages()}
    total = sum(times.values())
    return {key: time / total for key, time in sorted(times.items(), key=lambda item: -item[1])}


def table(shares: dict[str, float], rows: int = 8) -> list[str]:
    """The operations that take most, and all others together."""
    shown = list(shares.items())[:rows]
    rest = 1 - sum(share for _, share in shown)
    return aligned(
        ["operation of the eager network", "its share of the time"],
        [*([name, f"{share:.1%}"] for name, share in shown), ["all others", f"{rest:.1%}"]],
    )
