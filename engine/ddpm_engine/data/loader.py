"""Read batches of a dataset, in worker processes or in this one."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from ddpm_engine.data.dataset import Batch, Sample, collate
from ddpm_engine.data.shuffle import rank_positions
from ddpm_engine.data.stream import ShardStream, number_batches
from ddpm_engine.errors import UserError


@dataclass(frozen=True)
class BatchPositions(Sampler[list[int]]):
    """Positions of each micro-batch of one rank: a batch sampler for a `DataLoader`.

    Every step yields `accumulation` lists, the contiguous parts of `rank_positions`.

    Raises:
        UserError: the global batch is not divisible by `world_size` · `accumulation`.
    """

    global_batch: int
    """Samples per step, over all ranks and micro-batches."""
    rank: int = 0
    """Rank of this process."""
    world_size: int = 1
    """Number of ranks."""
    accumulation: int = 1
    """Micro-batches per step."""
    start_step: int = 0
    """First step, where a run resumes."""
    end_step: int | None = None
    """One past the last step; None: endless."""

    def __post_init__(self) -> None:
        rank_positions(self.start_step, self.global_batch, self.rank, self.world_size)
        share = self.global_batch // self.world_size
        if self.accumulation < 1 or share % self.accumulation:
            raise UserError(
                f"{share} samples per rank (global batch {self.global_batch} over "
                f"{self.world_size}) do not split into {self.accumulation} accumulation steps; "
                "choose a global batch divisible by world size × accumulation"
            )

    @property
    def micro_batch(self) -> int:
        """Samples in each micro-batch."""
        return self.global_batch // self.world_size // self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.end_step is None or step < self.end_step:
            positions = rank_positions(step, self.global_batch, self.rank, self.world_size)
            for first in range(0, len(positions), self.micro_batch):
                yield list(positions[first : first + self.micro_batch])
            step += 1

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank.

        Raises:
            TypeError: there is no last step, as for any endless iterable.
        """
        if self.end_step is None:
            raise TypeError("positions without end have no length")
        return max(0, self.end_step - self.start_step) * self.accumulation


def make_batches(
    dataset: Dataset[Sample],
    positions: BatchPositions,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Iterate over the batches of a rank, from a set, a mixture or a stream.

    Args:
        dataset: indexed by position, or a `ShardStream`.
        positions: of each batch.
        workers: number of processes; 0 reads in this one.
        pin_memory: copy batches to page-locked memory.

    Raises:
        UserError: `workers` is negative; while iterating, data that cannot be read.
    """
    if isinstance(dataset, ShardStream):
        streamed = _loader(dataset, workers, pin_memory, batch_size=positions.micro_batch)
        return number_batches(streamed, positions)
    return iter(make_loader(dataset, positions, workers, pin_memory=pin_memory))


def make_loader(
    dataset: Dataset[Sample],
    batches: Iterable[list[int]],
    workers: int = 0,
    prefetch: int = 4,
    pin_memory: bool = False,
) -> DataLoader[Sample]:
    """Make a loader that reads ahead, in the order of `batches` whatever `workers` is.

    Workers are persistent and compute with one thread each, as torch sets them up. They ignore
    SIGTERM, SIGUSR1 and SIGINT, which schedulers send to the whole process group: the trainer then
    still gets the batches of the step it is finishing. They end with the loader or the process.

    Args:
        dataset: indexed by position.
        batches: positions of each batch, such as a `BatchPositions`.
        workers: number of processes; 0 reads in this one.
        prefetch: batches that each worker reads ahead.
        pin_memory: copy batches to page-locked memory, for asynchronous copies to a GPU.

    Returns:
        A loader that yields `Batch`. It knows its rank's share already: do not hand it to
        `Accelerator.prepare`, which would split it a second time.

    Raises:
        UserError: `workers` is negative.
    """
    return _loader(dataset, workers, pin_memory, prefetch, batch_sampler=batches)


def _loader(
    dataset: Dataset[Sample],
    workers: int,
    pin_memory: bool,
    prefetch: int = 4,
    **batching: Any,
) -> DataLoader[Sample]:
    if workers < 0:
        raise UserError(f"`workers` is {workers}; it must be 0 or more", field="workers")
    if workers == 0:
        return DataLoader(dataset, collate_fn=collate, pin_memory=pin_memory, **batching)
    # Python ends daemonic children at exit by SIGTERM and waits for them: obey that one.
    exiting = multiprocessing.Event()
    atexit.register(exiting.set)
    return DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=prefetch,
        persistent_workers=True,
        pin_memory=pin_memory,
        worker_init_fn=partial(_ignore_signals, exiting),
        **batching,
    )


def _ignore_signals(exiting: Event, _worker: int) -> None:
    def terminate(_signal: int, _frame: object) -> None:
        if exiting.is_set():
            os._exit(0)

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
