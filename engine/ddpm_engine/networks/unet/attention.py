"""Self-attention over the pixels of a feature map, and the kernels that can compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.norm import GroupNorm

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key, value, each `[B, L, heads, D]` → softmax(query keyᵀ / √D) value, likewise."""


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with torch's kernels; in half precision the softmax is taken in float32.

    See `Attend` for the shapes.
    """
    # These transposes are views; torch's fused kernels take and return such strides.
    return F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    ).transpose(1, 2)


def choose_attention(name: str, head_dims: Iterable[int]) -> Attend:
    """Return the attention kernel of that name.

    Args:
        name: `"sdpa"`, `"xformers"`, or `"auto"`: xformers if it can serve here, else sdpa.
        head_dims: the head widths it must serve; xformers is tried on each.

    Raises:
        UserError: xformers was asked for and cannot serve; the message says why.
    """
    if name == "sdpa":
        return attend_sdpa
    try:
        return _probe_xformers(head_dims)
    except UserError:
        if name == "auto":
            return attend_sdpa
        raise


def _probe_xformers(head_dims: Iterable[int]) -> Attend:
    """Try xformers forward and backward in the precisions that every CUDA device has."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise UserError(
            f"attention='xformers', but xformers cannot be imported ({error}): install it with "
            "pip install 'ddpm-engine[xformers]', or use attention='sdpa'"
        ) from error
    if not torch.cuda.is_available():
        raise UserError(
            "attention='xformers', but xformers runs on CUDA devices only and there is none here: "
            "use attention='sdpa'"
        )
    for dtype in (torch.float16, torch.float32):
        for head_dim in head_dims:
            x = torch.zeros(1, 16, 1, head_dim, dtype=dtype, device="cuda", requires_grad=True)
            try:
                with torch.enable_grad():
                    memory_efficient_attention(x, x, x).sum().backward()
            # What an unsupported device or shape raises has changed from release to release.
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"attention='xformers', but xformers failed on this device with {dtype} and "
                    f"heads of {head_dim} channels ({error}): use attention='sdpa'"
                ) from error
    attend: Attend = memory_efficient_attention
    return attend


class Attention(nn.Module):
    """Multi-head self-attention with a residual connection: `[B, C, H, W]` → same shape.

    Args:
        channels: C.
        config: head width and epsilon.
        attend: the kernel, from `choose_attention`.
        groups: of the GroupNorm that comes first, or None for none.
        divisor: the residual sum is divided by it.
    """

    def __init__(
        self,
        channels: int,
        config: UNetConfig,
        attend: Attend,
        groups: int | None,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads = channels // (config.attention_head_dim or channels)
        self.attend, self.divisor = attend, divisor
        self.group_norm = (
            None if groups is None else GroupNorm(groups, channels, config.norm_eps, "none")
        )
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Let every pixel attend to every pixel: `[B, C, H, W]` to the same."""
        normalised = x if self.group_norm is None else self.group_norm(x)
        # A channels-last map is already [B, HW, C] in memory: both reshapes are views.
        tokens = normalised.flatten(2).transpose(1, 2)
        query, key, value = (
            project(tokens).unflatten(2, (self.heads, -1))
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = self.to_out[0](self.attend(query, key, value).flatten(2))
        y = x + attended.transpose(1, 2).unflatten(2, x.shape[2:])
        return y if self.divisor == 1 else y / self.divisor
