"""An optimizer step over flat buffers: clipping, AdamW, averages and shadow."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.config import OptimizerConfig
from ddpm_engine.training.optimizer import AdamW, Clipping
from ddpm_engine.training.strategies.flat_state import FlatState


class FlatOptimizer:
    """Updates a `FlatState`: on a GPU in one kernel, elsewhere by torch's own AdamW.

    Args:
        state: updated in place.
        config: of the run.
        whole: whether the gradients will come as one flat buffer, or one for each segment.
    """

    def __init__(self, state: FlatState, config: OptimizerConfig, whole: bool) -> None:
        self._state, self._config = state, config
        buffers = state.weights, state.exp_avg, state.exp_avg_sq
        # The views are kept: making a thousand of them takes longer than some steps.
        weights, exp_avg, exp_avg_sq = (
            [flat] if whole else list(state.views(flat).values()) for flat in buffers
        )
        self._adamw = AdamW(config, weights, exp_avg, exp_avg_sq, state.step)

    def update(
        self,
        gradients: list[Tensor],
        divisor: Tensor | float,
        learning_rate: Tensor,
        ema_weights: Tensor,
        skip: Tensor,
    ) -> Clipping:
        """Take one step, without waiting for a GPU; the gradients are used up.

        Args:
            gradients: of the precision of their weights, master or shadow.
            divisor: number that they must be divided by.
            learning_rate: 0-dim, float32 or wider.
            ema_weights: `[K]`, float32 or wider.
            skip: not zero: nothing changes, 0-dim float32.
        """
        state = self._state
        gradients = [g.to(state.weights.dtype) for g in gradients]
        norm = torch.nn.utils.get_total_norm(gradients)
        clipping = Clipping.of(norm, divisor, self._config.clip_norm, skip)
        self._adamw.update(gradients, clipping, learning_rate)
        weights = (ema_weights * (1 - clipping.skip)).to(state.averages.dtype)
        state.averages.lerp_(state.weights, weights[:, None])
        state.refresh()
        return clipping
