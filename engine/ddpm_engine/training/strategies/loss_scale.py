"""Loss scaling, which keeps float16 gradients from underflowing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
"""Consecutive steps without overflow after which the scale is doubled."""


class LossScale:
    """A power of two that multiplies the loss; gradients are divided by it before they are used.

    It is halved, but not below 1, by every step whose gradients are not finite, and doubled after
    `GROWTH_STEPS` other steps in a row (Micikevicius et al., "Mixed Precision Training", 2018; rule
    and constants are those of `torch.amp.GradScaler`).

    It lives on the device, so that nobody waits for it, and is the same on every rank, because
    `update` depends on the global norm of the gradients only, whatever the strategy shards.

    Args:
        device: of the gradients.
    """

    value: Tensor
    """The scale, 0-dim float32."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST_SCALE, device=device)
        self._steps = torch.zeros((), device=device)

    def update(self, finite: Tensor, skip: Tensor) -> None:
        """Count a step, without waiting for the device.

        Args:
            finite: whether its gradients were finite, 0-dim bool.
            skip: nothing changes where it is not zero, 0-dim float32.
        """
        steps = self._steps + 1
        grows = steps == GROWTH_STEPS
        # Powers of two and counts: every product and difference below is exact.
        factor = torch.where(finite, 1.0 + grows.float(), torch.full_like(self.value, 0.5))
        value = (self.value * factor).clamp(min=1.0)
        steps = steps * (finite & ~grows)
        counts = skip == 0
        self.value.copy_(torch.where(counts, value, self.value))
        self._steps.copy_(torch.where(counts, steps, self._steps))

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values; waits for the device."""
        return {"value": float(self.value), "steps": int(self._steps)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            KeyError, TypeError, ValueError: it is not such a state.
        """
        value, steps = float(state["value"]), int(state["steps"])
        self.value.fill_(value)
        self._steps.fill_(steps)


def backward(loss: Tensor, pieces: int, scale: LossScale | None) -> None:
    """Add the gradients of a micro-batch to those of its step.

    Args:
        loss: mean loss of the micro-batch, 0-dim.
        pieces: micro-batches of the step, whose gradients are averaged.
        scale: multiplies the loss, and so the gradients; None: nothing does.
    """
    if pieces > 1:  # each of these is a launch
        loss = loss / pieces
    (loss if scale is None else loss * scale.value).backward()
