"""What a run measures between two log lines."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Meters:
    """Sums since the last log line; saved with a checkpoint, so that a resumed run logs the same.

    Args:
        steps: optimizer steps taken.
        skipped: steps skipped because a gradient was not finite.
        loss: sum of the losses of the steps taken.
        grad_norm: sum of their gradient norms.
        seconds: time in steps.
        waiting: part of it that was spent waiting for data, seconds.
        checkpoint_stall_seconds: time that training waited for checkpoints.
        checkpoint_write_seconds: time that checkpoints took in the background.
    """

    steps: int = 0
    skipped: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    seconds: float = 0.0
    waiting: float = 0.0
    checkpoint_stall_seconds: float = 0.0
    checkpoint_write_seconds: float = 0.0

    def add(self, loss: float, grad_norm: float) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self.loss += loss
        self.grad_norm += grad_norm

    def add_time(self, seconds: float, waiting: float = 0.0) -> None:
        """Count time in steps, and the part of it that was spent waiting for data, in seconds."""
        self.seconds += seconds
        self.waiting += waiting

    @property
    def mean_loss(self) -> float | None:
        """Per step taken; None if there is none, or if it is not finite."""
        return self._mean(self.loss)

    @property
    def mean_grad_norm(self) -> float | None:
        """Per step taken; None as for the loss."""
        return self._mean(self.grad_norm)

    def _mean(self, total: float) -> float | None:
        return total / self.steps if self.steps and math.isfinite(total) else None

    @property
    def steps_per_second(self) -> float:
        """Skipped steps included."""
        return max(self.steps + self.skipped, 1) / max(self.seconds, 1e-9)

    @property
    def data_wait_percent(self) -> float:
        """Share of the time in steps that was spent waiting for data."""
        return 100 * self.waiting / max(self.seconds, 1e-9)

    def state(self) -> dict[str, float]:
        """As JSON values, for `of_state`; a checkpoint has null where one is not finite."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Meters:
        """Invert `state`.

        Raises:
            TypeError: it is not such a state.
        """
        known: dict[str, Any] = {n: math.nan if v is None else v for n, v in state.items()}
        return cls(**known)
