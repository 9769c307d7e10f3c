"""Saving checkpoints while training goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from ddpm_engine.checkpoints.store import CheckpointStore, Part


@dataclass(frozen=True)
class Saved:
    """How one save ended."""

    step: int
    seconds: float
    """From the end of the copy to the rename, or to the failure."""
    error: OSError | None
    """Why it failed: the same save fails on every rank. None if the checkpoint is there."""


class BackgroundSaver:
    """Saves checkpoints from a thread; training waits only while tensors are copied.

    At most one save is in flight: memory holds one copy, and a slow disk slows training down
    rather than falling behind without end.

    Args:
        store: where to. On several ranks its process group must be one that nothing else uses,
            since the thread talks over it while training talks over the others.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._flight: _Flight | None = None

    def start(self, step: int, parts: Mapping[str, Part], state: Mapping[str, Any]) -> None:
        """Copy the tensors to host memory and begin to write; arguments as `CheckpointStore.save`.

        Raises:
            RuntimeError: the save before this one has not been asked for with `finished`.
        """
        if self._flight is not None:
            raise RuntimeError("a checkpoint is in flight")
        copies = {name: _to_host(part) for name, part in parts.items()}
        self._flight = _Flight(self._store, step, copies, dict(state))
        self._flight.start()

    @property
    def step(self) -> int | None:
        """Of the save in flight; None if there is none."""
        return None if self._flight is None else self._flight.step

    def finished(self, wait: bool = False) -> Saved | None:
        """The save that has ended since this was last asked; None if none has.

        Args:
            wait: for the save in flight, if there is one.

        Raises:
            BaseException: whatever, other than an OSError, went wrong while saving.
        """
        flight = self._flight
        if flight is None or (flight.is_alive() and not wait):
            return None
        flight.join()
        self._flight = None
        if flight.error is not None and not isinstance(flight.error, OSError):
            raise flight.error
        return Saved(flight.step, flight.seconds, flight.error)


class _Flight(Thread):
    """One save."""

    def __init__(
        self, store: CheckpointStore, step: int, parts: Mapping[str, Part], state: dict[str, Any]
    ) -> None:
        # A daemon: a process whose training has failed must be able to end.
        super().__init__(name=f"checkpoint of step {step}", daemon=True)
        self.step = step
        self.seconds = 0.0
        self.error: BaseException | None = None
        self._save = (store, parts, state)

    def run(self) -> None:
        store, parts, state = self._save
        started = time.perf_counter()
        try:
            store.save(self.step, parts, state)
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - started
        del self._save  # the copies


def _to_host(part: Part) -> Part:
    """Copies in host memory, page-locked where they come from a GPU, in contiguous layout."""
    copies: dict[str, Tensor] = {
        name: tensor.detach().to(
            "cpu", non_blocking=True, copy=True, memory_format=torch.contiguous_format
        )
        for name, tensor in part.items()
    }
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return copies
