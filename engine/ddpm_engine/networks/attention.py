"""Kernels that can compute attention, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_engine.errors import UserError

AttentionKernel = Literal["sdpa", "xformers", "auto"]
"""torch's kernels, those of xformers, or the latter where they can serve."""


class Attend(Protocol):
    """An attention kernel: softmax(query keyᵀ / √D) value, head by head."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /
    ) -> Tensor:
        """Attend.

        Args:
            query: `[B, L, heads, D]`.
            key: `[B, M, heads, D]`.
            value: likewise.
            mask: bool `[B, M]`, False for keys that get no attention, such as padding; each row has
                a True. None: all count.

        Returns:
            `[B, L, heads, D]`.
        """


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
    """Attend with torch's kernels; in half precision the softmax is taken in float32.

    See `Attend` for the shapes.
    """
    # These transposes are views; torch's fused kernels take and return such strides.
    return F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None if mask is None else mask[:, None, None, :],
    ).transpose(1, 2)


def choose_attention(name: str, head_dims: Iterable[int], masked: bool = False) -> Attend:
    """Return the attention kernel of that name.

    Args:
        name: `"sdpa"`, `"xformers"`, or `"auto"`: xformers if it can serve here, else sdpa.
        head_dims: the head widths it must serve; xformers is tried on each.
        masked: whether it is to be called with masks; xformers is tried with one, too.

    Raises:
        UserError: xformers was asked for and cannot serve; the message says why.
    """
    if name == "sdpa":
        return attend_sdpa
    try:
        return _probe_xformers(head_dims, masked)
    except UserError:
        if name == "auto":
            return attend_sdpa
        raise


def _probe_xformers(head_dims: Iterable[int], masked: bool) -> Attend:
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

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
        bias = () if mask is None else (_as_bias(mask, query),)
        attended: Tensor = memory_efficient_attention(query, key, value, *bias)
        return attended

    for dtype in (torch.float16, torch.float32):
        for head_dim in head_dims:
            x = torch.zeros(1, 16, 1, head_dim, dtype=dtype, device="cuda", requires_grad=True)
            mask = torch.zeros(1, 16, dtype=torch.bool, device="cuda")
            try:
                with torch.enable_grad():
                    attend(x, x, x, ~mask if masked else None).sum().backward()
            # What an unsupported device or shape raises has changed from release to release.
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"attention='xformers', but xformers failed on this device with {dtype} and "
                    f"heads of {head_dim} channels ({error}): use attention='sdpa'"
                ) from error
    return attend


def _as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """What xformers adds to the products of `query` and keys: `[B, heads, L, M]`, 0 or -inf."""
    batch, keys = mask.shape
    # Its rows must begin at multiples of 16 bytes.
    bias = query.new_zeros(batch, 1, 1, keys + -keys % 8)[..., :keys]
    bias = bias.masked_fill_(~mask[:, None, None, :], float("-inf"))
    return bias.expand(-1, query.shape[2], query.shape[1], -1)
