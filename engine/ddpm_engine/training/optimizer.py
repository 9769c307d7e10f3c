"""The optimizer of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_engine.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make torch's fused AdamW over all weights, for whoever takes steps on its own."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


@dataclass(frozen=True)
class Clipping:
    """What becomes of a step's gradients, decided on the device."""

    norm: Tensor
    """Global norm of the averaged gradients before clipping, 0-dim."""
    factor: Tensor
    """Factor from the gradients that there are to those to use, 0-dim, in their precision."""
    finite: Tensor
    """Whether the norm is finite, 0-dim bool."""
    skip: Tensor
    """1 if the step must change nothing, since it is not finite or the caller says so, else 0;
    0-dim float32."""

    @classmethod
    def of(cls, norm: Tensor, divisor: Tensor | float, clip_norm: float, skip: Tensor) -> Clipping:
        """Decide.

        Args:
            norm: global norm of the gradients that there are, 0-dim, float32 or wider.
            divisor: number that they must be divided by, as the loss scale; 0-dim if a tensor.
            clip_norm: global norm that larger gradients are scaled down to.
            skip: not zero: the caller wants nothing to change, 0-dim.
        """
        norm = norm / divisor
        finite = norm.isfinite()
        # As `torch.nn.utils.clip_grad_norm_`, which could otherwise divide by zero.
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0) / divisor
        return cls(norm, factor, finite, (~finite | (skip != 0)).float())


class AdamW:
    """Torch's fused AdamW over tensors that somebody else keeps; it never waits for a GPU.

    Args:
        config: of the run.
        weights: of any shapes, dense, float32 or wider; updated.
        exp_avg: first moments, shaped like them; updated.
        exp_avg_sq: second moments, shaped like them; updated.
        step: updates done, 0-dim float32; updated.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        weights: list[Tensor],
        exp_avg: list[Tensor],
        exp_avg_sq: list[Tensor],
        step: Tensor,
    ) -> None:
        self._config = config
        self._state = weights, exp_avg, exp_avg_sq
        self._step = step

    @torch.no_grad()
    def update(self, gradients: list[Tensor], clipping: Clipping, learning_rate: Tensor) -> None:
        """Take one step; the gradients are used up.

        Args:
            gradients: shaped like the weights, in their precision and memory order.
            clipping: of these gradients.
            learning_rate: 0-dim, float32 or wider.
        """
        weights, exp_avg, exp_avg_sq = self._state
        scale = None
        if weights[0].is_cpu:  # to the bits of torch's clipping; the kernel would not be faster
            # Never by NaN, which would stay in the gaps of a flat buffer.
            torch._foreach_mul_(gradients, clipping.factor.nan_to_num())
        else:
            scale, learning_rate = clipping.factor.reciprocal(), learning_rate.float()
        self._step += 1 - clipping.skip
        torch._fused_adamw_(
            weights, gradients, exp_avg, exp_avg_sq, [], [self._step] * len(weights),
            lr=learning_rate, beta1=self._config.betas[0], beta2=self._config.betas[1],
            weight_decay=self._config.weight_decay, eps=self._config.eps,
            amsgrad=False, maximize=False, grad_scale=scale, found_inf=clipping.skip,
        )  # fmt: skip
