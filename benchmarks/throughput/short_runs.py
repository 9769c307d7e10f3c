"""Training runs of a few steps, each in a process of its own: images per second and memory."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from benchmarks.throughput.timing import Spread, interleaved

from ddpm_engine.config import RunConfig
from ddpm_engine.data.packing.sources.source import Source
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_engine.training.trainer import Trainer


@dataclass(frozen=True)
class Row:
    """A way of training and its figures."""

    name: str
    images_per_second: Spread
    megabytes: Spread
    """Most memory that the process held resident, in 10⁶ bytes."""


class Clock(Callback):
    """The times at which steps have ended, since a training step on a CPU waits for nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, run: Run) -> None:
        """See `Callback`."""
        self.times.append(time.perf_counter())


def spread_over(source: Source, count: int) -> Source:
    """Return so many examples, or all, from all over a source, which may be in an order."""
    count = min(count, len(source.examples))
    places = torch.linspace(0, len(source.examples) - 1, count).long().tolist()
    return replace(source, examples=[source.examples[place] for place in places])


def train_briefly(
    config: RunConfig, warm_up: int, steps: int, trainer: type[Trainer] = Trainer
) -> tuple[float, float]:
    """Train on one thread, reading data in this process.

    Args:
        config: the run; its directory is a temporary one.
        warm_up: steps before those that are timed, 1 or more.
        steps: steps that are timed.
        trainer: trains.

    Returns:
        Images per second, and the bytes that this process has held resident at most.
    """
    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        config = replace(
            config,
            out=Path(out) / "run",
            data=replace(config.data, workers=0),
            # The step after those that are timed ends with a checkpoint.
            training=replace(config.training, steps=warm_up + steps + 1),
            log=replace(config.log, every=10**6, sample_every=0, tracker="none"),
        )
        trainer(config, [clock]).fit()
    seconds = clock.times[-2] - clock.times[warm_up - 1]
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return steps * config.training.batch_size / seconds, resident


def measured(rounds: int, ways: Mapping[str, Callable[[], tuple[float, float]]]) -> list[Row]:
    """Take all ways in turn, each time in a new process.

    Args:
        rounds: repetitions of each way.
        ways: by name, what calls `train_briefly`; must be picklable.
    """
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    context = multiprocessing.get_context("spawn")

    def once(way: str) -> float:
        with context.Pool(1) as pool:
            result = pool.apply(ways[way])
        found[way].append(result)
        return result[0]

    interleaved(rounds, {way: partial(once, way) for way in ways})
    return [
        Row(
            way,
            Spread.of([rate for rate, _ in figures]),
            Spread.of([resident / 1e6 for _, resident in figures]),
        )
        for way, figures in found.items()
    ]
