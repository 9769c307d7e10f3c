"""An optimizer step over flat buffers: clipping, AdamW, averages and shadow."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.config import OptimizerConfig
from ddpm_engine.training.optimizer import AdamW, Clipping
from ddpm_engine.training.strategies.flat_state import FlatState
from ddpm_kernels import adamw_step, gradient_norm
from ddpm_kernels.dispatch import takes_op


class FlatOptimizer:
    """Updates a `FlatState`: on a GPU by one kernel, elsewhere by torch's own AdamW.

    Args:
        state: updated in place.
        config: of the run.
        whole: whether the gradients will come as one flat buffer, or one for each segment.
    """

    def __init__(self, state: FlatState, config: OptimizerConfig, whole: bool) -> None:
        self._state, self._config = state, config
        self._offsets = [0] if whole else [segment.offset for segment in state.segments]
        # The views are kept: making a thousand of them takes longer than some steps.
        weights, exp_avg, exp_avg_sq = (
            [flat] if whole else list(state.views(flat).values())
            for flat in (state.weights, state.exp_avg, state.exp_avg_sq)
        )
        self._adamw = AdamW(config, weights, exp_avg, exp_avg_sq, state.step)

    @torch.no_grad()
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
            gradients: as `Gradients.take` returns them, in the precision of their weights, master
                or shadow.
            divisor: number that they must be divided by; 0-dim if a tensor.
            learning_rate: 0-dim, float32 or wider.
            ema_weights: `[K]`, float32 or wider: share of the new weights in each average.
            skip: not zero: nothing changes, 0-dim float32.
        """
        update = self._fused if takes_op(self._state.weights) else self._by_torch
        return update(gradients, divisor, learning_rate, ema_weights, skip)

    def _fused(
        self,
        gradients: list[Tensor],
        divisor: Tensor | float,
        learning_rate: Tensor,
        ema_weights: Tensor,
        skip: Tensor,
    ) -> Clipping:
        state, config = self._state, self._config
        dtype = state.weights.dtype
        clipping = Clipping.of(gradient_norm(gradients), divisor, config.clip_norm, skip)
        adamw_step(
            gradients, self._offsets, state.weights, state.exp_avg, state.exp_avg_sq,
            state.averages, state.shadow, state.step, learning_rate.to(dtype),
            ema_weights.to(dtype), clipping.factor.reciprocal(), clipping.skip,
            betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
        )  # fmt: skip
        return clipping

    def _by_torch(
        self,
        gradients: list[Tensor],
        divisor: Tensor | float,
        learning_rate: Tensor,
        ema_weights: Tensor,
        skip: Tensor,
    ) -> Clipping:
        state = self._state
        gradients = [gradient.to(state.weights.dtype) for gradient in gradients]
        norm = torch.nn.utils.get_total_norm(gradients)
        clipping = Clipping.of(norm, divisor, self._config.clip_norm, skip)
        self._adamw.update(gradients, clipping, learning_rate)
        shares = (ema_weights * (1 - clipping.skip)).to(state.averages.dtype)
        state.averages.lerp_(state.weights, shares[:, None])
        state.refresh()
        return clipping
