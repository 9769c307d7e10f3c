"""How many kernels torch's operations launch on CUDA.

Read off torch's sources, for the sizes of these networks. An operation that is in no table counts
as one launch and is named in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NONE = frozenset(
    f"aten.{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
        "_reshape_alias", "set_", "resize_", "detach_", "lift_fresh",
    )
)  # fmt: skip
"""Neither launch anything nor move memory, as views do not."""
HOST_READS = frozenset({"aten._local_scalar_dense", "aten.is_nonzero", "aten.equal"})
"""The host waits for the device."""
ONE = frozenset(
    f"aten.{name}"
    for name in (
        # elementwise
        "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "abs", "pow", "square",
        "sqrt", "rsqrt", "reciprocal", "exp", "log", "sin", "cos", "sigmoid", "silu",
        "silu_backward", "clamp", "clamp_", "clamp_min", "clamp_max", "maximum", "minimum",
        "where", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not",
        "bitwise_and", "bitwise_not", "bitwise_or", "isfinite", "isnan", "isinf", "lerp",
        "lerp_", "addcmul",
        "addcdiv", "rsub", "remainder", "floor", "round", "mse_loss_backward",
        # copies, fills, random numbers
        "clone", "copy_", "_to_copy", "fill_", "zero_", "zeros", "zeros_like", "new_zeros", "ones",
        "ones_like", "full", "full_like", "new_full", "arange", "scalar_tensor", "flip",
        "repeat", "rand", "randn", "randn_like", "randint", "normal_", "uniform_", "bernoulli_",
        # look-ups, joins, reductions
        "index", "index_select", "gather", "embedding", "cat", "stack", "sum", "mean", "amax",
        "amin", "any", "all", "linalg_vector_norm", "_softmax", "mse_loss",
        # matrices, attention, resampling, dropout
        "mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "upsample_nearest2d",
        "upsample_nearest2d_backward", "native_dropout", "native_dropout_backward",
    )
)  # fmt: skip
SEVERAL = {
    # zeros; copy
    "aten.slice_backward": 2,
    # moments of the groups; scale and offset of each channel; y
    "aten.native_group_norm": 3,
    # sums of each channel; factors of each channel; dx; dγ and dβ
    "aten.native_group_norm_backward": 4,
    # zeros; sums
    "aten.embedding_dense_backward": 2,
    # row sums of dy y; dq, dk and dv; conversion of dq
    "aten._scaled_dot_product_flash_attention_backward": 3,
    "aten._scaled_dot_product_efficient_attention_backward": 3,
}

_CHUNK, _BLOCKS = 65536, 320
_TENSORS = (110, 64, 48, 36, 30)
"""Of one launch of a `_foreach` operation over 1, 2, … lists (`MultiTensorApply.cuh`)."""


def foreach_launches(tensors: Sequence[Tensor], lists: int) -> int:
    """Count the launches of an operation over lists of tensors.

    A launch takes at most 320 chunks of 65,536 elements, of a limited number of tensors.

    Args:
        tensors: of one list.
        lists: that the operation reads and writes.
    """
    launches = blocks = taken = 0
    for tensor in tensors:
        taken += 1
        chunks = -(-tensor.numel() // _CHUNK)
        while chunks:
            room = min(chunks, _BLOCKS - blocks)
            chunks, blocks = chunks - room, blocks + room
            full = blocks == _BLOCKS
            if full or (taken == _TENSORS[lists - 1] and not chunks):
                launches, blocks = launches + 1, 0
                # A tensor that goes on takes a place of the next launch, too.
                taken = int(chunks > 0)
    return launches + (blocks > 0)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether cuDNN can take `[N, C, H, W]` as it is."""
    return tensor.is_contiguous(memory_format=torch.channels_last)


def launches_of(name: str, arguments: tuple[Any, ...]) -> int | None:
    """Count the launches of an operation other than a convolution; None: not known.

    Args:
        name: without overload, `aten.add`.
        arguments: positional ones.
    """
    if name in NONE or name in HOST_READS:
        return 0
    if name in ONE:
        return 1
    if name == "aten.constant_pad_nd":  # a fill and a copy, or the copy of a part
        return 2 if max(arguments[1]) > 0 else 1
    if name == "aten._fused_adamw_":
        return foreach_launches(arguments[0], 4)
    if name.startswith("aten._foreach_"):
        lists = [argument for argument in arguments if isinstance(argument, list | tuple)]
        lists = [each for each in lists if each and isinstance(each[0], Tensor)]
        written = 0 if name.endswith("_") else 1
        if name == "aten._foreach_norm":  # and a launch that adds the chunks' norms
            return foreach_launches(lists[0], 1) + 1
        return foreach_launches(lists[0], len(lists) + written)
    return SEVERAL.get(name)
