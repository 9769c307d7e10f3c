"""Where the time goes, operation by operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.throughput.report import aligned
from benchmarks.throughput.subject import Subject
from torch.profiler import ProfilerActivity, profile

REPETITIONS = 10


def evaluation(subject: Subject, batch: int) -> Callable[[], object]:
    """Return one evaluation of the eager network on a CPU, for a batch of images."""
    x = torch.randn(batch, *subject.unet.sample_shape)
    timestep = torch.tensor(subject.schedule.timesteps // 2)

    def evaluate() -> object:
        with torch.inference_mode():
            return subject.unet(x, timestep)

    return evaluate


def shares_by_operation(work: Callable[[], object]) -> dict[str, float]:
    """Share of a work's time on the CPU that each operation itself takes, largest first."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _ in range(REPETITIONS):
            work()
    times = {entry.key: entry.self_cpu_time_total for entry in watched.key_averages()}
    total = sum(times.values())
    return {key: time / total for key, time in sorted(times.items(), key=lambda item: -item[1])}


def table(of: str, shares: dict[str, float], rows: int = 8) -> list[str]:
    """The operations that take most, and all others together."""
    shown = list(shares.items())[:rows]
    rest = 1 - sum(share for _, share in shown)
    return aligned(
        [f"operation of {of}", "its share of the time"],
        [*([name, f"{share:.1%}"] for name, share in shown), ["all others", f"{rest:.1%}"]],
    )
