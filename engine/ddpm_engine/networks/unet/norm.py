"""GroupNorm by the fused kernel."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddpm_engine.networks.base import RecomputedNorm
from ddpm_engine.networks.recipes import set_recipe
from ddpm_engine.networks.unet.features import Features
from ddpm_kernels import group_norm_silu, group_norm_silu_residual
from ddpm_kernels.dropout import Dropout

_NOTHING = (None, None, None)
"""Map, moments and bias where there is no second map."""


class GroupNorm(RecomputedNorm):
    """GroupNorm with the activation that follows it, of one map or of several as if concatenated.

    The parameters are those of `torch.nn.GroupNorm`; the statistics are float32 in any precision.
    """

    def __init__(
        self, groups: int, channels: int, eps: float, activation: Literal["silu", "none"] = "silu"
    ) -> None:
        super().__init__()
        self.groups, self.eps, self.activation = groups, eps, activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        *inputs: Features,
        before: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, tuple[Features, ...]]:
        """Normalise and activate.

        Args:
            inputs: one map `[N, C, H, W]`, or two, `[N, C_i, H, W]`, of C channels together.
            before: `[N, C]`, added to each pixel first.
            scale: `[N, C]`; what is normalised is multiplied by 1 + `scale`.
            shift: `[N, C]`, added then; given exactly when `scale` is.
            dropout: what to drop of the output.

        Returns:
            `[N, C, H, W]` in the inputs' dtype, and the inputs for whatever else reads them: the
            gradients of both are added where the norm writes its own, and biases paid.
        """
        one, *others = inputs
        (x, known, owed), (skip, skip_known, skip_owed) = one, others[0] if others else _NOTHING
        arguments = (
            x, self.groups, self.weight, self.bias, scale, shift, self.eps, self.activation
        )  # fmt: skip
        options: dict[str, Any] = {
            "skip": skip, "before": before, "dropout": dropout, "moments": (known, skip_known),
        }  # fmt: skip
        y, x, skip = group_norm_silu_residual(*arguments, **options, owed=(owed, skip_owed))
        if self.recomputed and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            set_recipe(y, partial(group_norm_silu, *arguments, **options))
        return y, (Features(x),) if skip is None else (Features(x), Features(skip))

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.groups}, {len(self.weight)}, eps={self.eps}, activation={self.activation!r}"
