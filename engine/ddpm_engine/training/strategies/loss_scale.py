"""Loss scaling, which keeps float16 gradients from underflowing."""

from __future__ import annotations

from typing import Any

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
"""Consecutive steps without overflow after which the scale is doubled."""


class LossScale:
    """A power of two that multiplies the loss; gradients are divided by it before they are used.

    It is halved, but not below 1, by every step whose gradients are not finite, and doubled after
    `GROWTH_STEPS` other steps in a row (Micikevicius et al., "Mixed Precision Training", 2018; rule
    and constants are those of `torch.amp.GradScaler`).

    It is a number on the host and the same on every rank, because `update` depends on the global
    norm of the gradients only, whatever the strategy shards.
    """

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self._steps = 0

    def update(self, finite: bool) -> None:
        """Count a step, given whether its gradients were finite."""
        if not finite:
            self.value, self._steps = max(self.value / 2, 1.0), 0
            return
        self._steps += 1
        if self._steps == GROWTH_STEPS:
            self.value, self._steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"value": self.value, "steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            KeyError, TypeError, ValueError: it is not such a state.
        """
        self.value, self._steps = float(state["value"]), int(state["steps"])
