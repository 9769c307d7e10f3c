"""Save checkpoints in the background while training continues."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from ddpm_engine.checkpoints.parts import Part
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.errors import NotFiniteError


@dataclass(frozen=True)
class Saved:
    """Result of one save."""

    step: int
    seconds: float
    """Time from the end of the copy to the rename or the failure."""
    error: OSError | None
    """Why it failed, on every rank alike; None if the checkpoint was written."""


class BackgroundSaver:
    """Save checkpoints from a thread; training waits only while tensors are copied.

    At most one save is in flight, so memory holds at most one copy and a slow disk slows training
    down instead of piling up saves.

    Args:
        store: destination. On several ranks its process group must be used for nothing else: the
            thread communicates over it while training communicates over other groups.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._flight: _Flight | None = None

    def start(self, step: int, parts: Mapping[str, Part], state: Mapping[str, Any]) -> None:
        """Copy tensors to host memory and start writing; arguments as in `CheckpointStore.save`.

        Raises:
            RuntimeError: the result of the previous save has not been taken with `finished`.
        """
        if self._flight is not None:
            raise RuntimeError("a checkpoint is in flight")
        copies = {name: _to_host(part) for name, part in parts.items()}
        self._flight = _Flight(self._store, step, copies, dict(state))
        self._flight.start()

    @property
    def step(self) -> int | None:
        """Step of the save in flight; None if there is none."""
        return None if self._flight is None else self._flight.step

    def finished(self, wait: bool = False) -> Saved | None:
        """Take the result of a save that has ended since the last call; None if none has.

        Args:
            wait: wait for the save in flight, if there is one.

        Raises:
            BaseException: any error of the save but an OSError.
        """
        flight = self._flight
        if flight is None or (flight.is_alive() and not wait):
            return None
        if isinstance(flight.error, NotFiniteError) and not wait:
            return None  # it ends the run, so all ranks must raise it at the same step
        flight.join()
        self._flight = None
        if flight.error is not None and not isinstance(flight.error, OSError):
            raise flight.error
        return Saved(flight.step, flight.seconds, flight.error)

    def finish(self) -> Saved | None:
        """Wait for the save in flight; if it failed, try it once more, now, from the same copies.

        Raises:
            BaseException: any error of the save but an OSError.
        """
        flight = self._flight
        saved = self.finished(wait=True)
        if flight is None or saved is None or saved.error is None:
            return saved
        flight.run()
        self._flight = flight
        return self.finished(wait=True)


class _Flight(Thread):
    """The thread of one save."""

    def __init__(
        self, store: CheckpointStore, step: int, parts: Mapping[str, Part], state: dict[str, Any]
    ) -> None:
        # A daemon, so that a process whose training has failed can exit.
        super().__init__(name=f"checkpoint of step {step}", daemon=True)
        self.step = step
        self.seconds = 0.0
        self.error: BaseException | None = None
        self._save = (store, parts, state)

    def run(self) -> None:
        store, parts, state = self._save
        started = time.perf_counter()
        self.error = None
        try:
            store.save(self.step, parts, state)
        except BaseException as error:
            self.error = error
        self.seconds += time.perf_counter() - started


def _to_host(part: Part) -> Part:
    """Copy tensors to host memory, contiguous, page-locked where they come from a GPU."""
    copies: dict[str, Tensor] = {
        name: tensor.detach().to(
            "cpu", non_blocking=True, copy=True, memory_format=torch.contiguous_format
        )
        for name, tensor in part.items()
    }
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return copies
