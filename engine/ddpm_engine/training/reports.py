"""What steps report, read by the host while the next one runs."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import IntEnum

import torch

_SLOTS = 2
"""Reports that the host's memory holds: that of the step under way, and the one before it."""


class Column(IntEnum):
    """Columns of the row that a step leaves on the device."""

    LOSS = 0
    """Mean loss of a rank's micro-batches, summed over the ranks."""
    STOPS = 1
    """Number of ranks that a signal has asked to stop."""
    REPLACED = 2
    """Number of unreadable samples that were replaced, on all ranks."""
    GRAD_NORM = 3
    """Global norm of the gradient before clipping."""


@dataclass(frozen=True)
class Report:
    """What became of one optimizer step; the same on every rank."""

    step: int
    """Optimizer steps done, this one included."""
    loss_sum: float
    """Mean loss of each rank, summed over the ranks."""
    stops: int
    """Number of ranks that a signal has asked to stop."""
    replaced: int
    """Number of unreadable samples that were replaced, on all ranks."""
    grad_norm: float
    """Global norm of the gradient before clipping; if not finite, the step was skipped."""

    @property
    def finite(self) -> bool:
        """Whether the step was taken."""
        return math.isfinite(self.grad_norm)


class Reports:
    """The reports on their way from the device to the host, in the order of their steps.

    Every step writes the same `row`. It is copied to page-locked memory behind the step, and the
    host waits for that copy alone, when it asks for the report.

    Args:
        device: where steps run.
        dtype: of the row.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        on_gpu = device.type == "cuda"
        self.row = torch.zeros(len(Column), dtype=dtype, device=device)
        self._copies = torch.zeros(_SLOTS, len(Column), dtype=dtype, pin_memory=on_gpu)
        self._arrived = [torch.cuda.Event() for _ in range(_SLOTS)] if on_gpu else None
        self._steps: deque[int] = deque()

    def __len__(self) -> int:
        """Return the number of reports that have been sent and not yet read."""
        return len(self._steps)

    def send(self, step: int) -> None:
        """Send the row to the host, once the device has written it.

        Args:
            step: optimizer steps done, the one that writes the row included.

        Raises:
            RuntimeError: as many reports as there is room for have not been read.
        """
        if len(self._steps) == _SLOTS:
            raise RuntimeError("a report would be overwritten before it is read")
        self._copies[step % _SLOTS].copy_(self.row, non_blocking=True)
        if self._arrived is not None:
            self._arrived[step % _SLOTS].record()
        self._steps.append(step)

    def read(self) -> Report:
        """Wait for the oldest report that has not been read, and return it."""
        step = self._steps.popleft()
        if self._arrived is not None:
            self._arrived[step % _SLOTS].synchronize()
        row = self._copies[step % _SLOTS].tolist()
        return Report(
            step,
            loss_sum=row[Column.LOSS],
            stops=int(row[Column.STOPS]),
            replaced=int(row[Column.REPLACED]),
            grad_norm=row[Column.GRAD_NORM],
        )
