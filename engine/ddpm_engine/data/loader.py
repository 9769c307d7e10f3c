"""Read batches of a dataset, in worker processes or in this one."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from ddpm_engine.data.dataset import Batch, Sample, collate
from ddpm_engine.data.shuffle import rank_positions
from ddpm_engine.data.stream import ShardStream, number_batches
from ddpm_engine.errors import UserError

_KILLED = re.compile(r"DataLoader worker \(pid\S* [^)]*\) ([^.(]*)")
"""What torch says of a worker that has ended."""


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
        UserError: `workers` is negative; while iterating, data that cannot be read, in the same
            words with and without workers.
    """
    if isinstance(dataset, ShardStream):
        streamed = _loader(dataset, workers, pin_memory, batch_size=positions.micro_batch)
        numbered = number_batches(streamed, positions)
        # Their new positions are not in the memory that the loader has pinned.
        return map(Batch.pin_memory, numbered) if pin_memory else numbered
    return iter(make_loader(dataset, positions, workers, pin_memory=pin_memory))


@contextmanager
def explained_deaths() -> Iterator[None]:
    """Say in one line that a worker was killed.

    That is noticed anywhere in the process that started it, not only where it waits for data: the
    block is all that happens meanwhile.

    Raises:
        UserError: in place of what torch raises.
    """
    try:
        yield
    except RuntimeError as error:
        # By what signal, only the cause may say.
        found = _KILLED.search(f"{error.__cause__}\n{error}")
        if found is None:
            raise
        how = found[1].strip().rstrip(".")
        short = "shared memory" if "Bus error" in how else "memory"
        shared = "; or enlarge /dev/shm" if "Bus error" in how else ""
        raise UserError(
            f"a process that reads data {how}, perhaps for want of {short}: use fewer "
            f"`data.workers`{shared}. The same command goes on from the last checkpoint"
        ) from error


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


class _Loader(DataLoader[Sample]):
    """A loader whose errors are the same with workers as without.

    Args:
        exiting: set while workers obey SIGTERM.
        arguments: of `DataLoader`.
    """

    def __init__(self, exiting: Event | None, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._exiting = exiting

    def __iter__(self) -> Any:
        if self._exiting is not None:
            self._exiting.clear()
        # At once, not with the first batch: it draws from torch's generator.
        return self._checked(super().__iter__())

    def _checked(self, batches: Any) -> Iterator[Batch]:
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except _EXPLAINED as error:
                    raise _explained(error) from error
                if isinstance(batch, _Failure):
                    raise batch.error
                yield batch
        except BaseException:
            # What a worker waits for may never come: it must not be waited for.
            if self._exiting is not None:
                self._exiting.set()
                # Otherwise torch would take a worker that had just begun for one that failed.
                _remove_worker_pids(id(batches))
                batches._worker_pids_set = False
                for worker in getattr(batches, "_workers", ()):
                    worker.terminate()
                self._iterator = None
            raise


class _Failure:
    """An error in a worker, in place of a batch."""

    def __init__(self, error: UserError) -> None:
        self.error = error


_EXPLAINED = (UserError, OSError, MemoryError)


def _explained(error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, MemoryError):
        return UserError(
            "there is not enough memory to read data; use fewer `data.workers` or a smaller "
            "`training.batch_size`"
        )
    return UserError(f"data cannot be read: {error}")


class _Set(Dataset[Any]):
    """A set for a worker, which returns its errors: torch would wrap them in a traceback."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        try:
            if hasattr(self._samples, "__getitems__"):
                return list(self._samples.__getitems__(positions))
            return [self._samples[position] for position in positions]
        except _EXPLAINED as error:
            return [_Failure(_explained(error))]

    def __len__(self) -> int:
        return len(self._samples)


class _Stream(IterableDataset[Any]):
    """As `_Set`, for a stream."""

    def __init__(self, samples: ShardStream) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._samples
        except _EXPLAINED as error:
            failure = _Failure(_explained(error))
            while True:
                yield failure


def _collate(samples: Sequence[Any]) -> Batch | _Failure:
    """As `collate`, unless something failed."""
    try:
        return next((one for one in samples if isinstance(one, _Failure)), None) or collate(samples)
    except _EXPLAINED as error:
        return _Failure(_explained(error))


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
        return _Loader(None, dataset, collate_fn=collate, pin_memory=pin_memory, **batching)
    guarded = _Stream(dataset) if isinstance(dataset, ShardStream) else _Set(dataset)
    # Python ends daemonic children at exit by SIGTERM and waits for them: obey that one.
    exiting = multiprocessing.Event()
    atexit.register(exiting.set)
    return _Loader(
        exiting,
        guarded,
        collate_fn=_collate,
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
