"""The factor that keeps float16 gradients above the smallest number that float16 can hold."""

from __future__ import annotations

from typing import Any

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
"""Steps in a row without overflow after which the scale is doubled."""


class LossScale:
    """A power of two for the loss, which gradients are divided by before they are used.

    It is halved, though not below 1, by every step whose gradients are not finite, and doubled
    after `GROWTH_STEPS` others in a row (Micikevicius et al., "Mixed Precision Training", 2018;
    the rule and the figures are those of `torch.amp.GradScaler`).

    It is a number on the host, and every rank has the same: `update` is told what the global norm
    of the gradients says, which is one value on all of them, whatever the strategy shards.
    """

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self._steps = 0

    def update(self, finite: bool) -> None:
        """Take note of a step, and whether its gradients were finite."""
        if not finite:
            self.value, self._steps = max(self.value / 2, 1.0), 0
            return
        self._steps += 1
        if self._steps == GROWTH_STEPS:
            self.value, self._steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"value": self.value, "steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take on what `state` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        self.value, self._steps = float(state["value"]), int(state["steps"])
