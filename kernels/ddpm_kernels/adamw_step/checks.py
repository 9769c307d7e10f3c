"""What `adamw_step` and `gradient_norm` ask of their tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_dense(gradient: Tensor) -> None:
    """Check that a tensor's elements follow each other in memory, in whatever order.

    Args:
        gradient: of any shape.

    Raises:
        ValueError: there are gaps between them, or some share memory.
    """
    # Nearly all are so, and this is quicker.
    if gradient.is_contiguous() or (
        gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
    ):
        return
    distance = 1
    for stride, size in sorted(zip(gradient.stride(), gradient.shape, strict=True)):
        if size != 1:
            if stride != distance and gradient.numel():
                raise ValueError(
                    f"a gradient of shape {list(gradient.shape)} has strides "
                    f"{list(gradient.stride())}; its elements must follow each other in memory"
                )
            distance *= size


def check_buffers(
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: Tensor,
    shadow: Tensor | None,
    ema_weights: Tensor,
) -> None:
    """Check the flat buffers of `adamw_step` against each other.

    Args:
        weights: `[N]`.
        exp_avg: `[N]`.
        exp_avg_sq: `[N]`.
        averages: `[K, N]`.
        shadow: `[M]`, M ≤ N, or None.
        ema_weights: `[K]`.

    Raises:
        ValueError: a shape, a dtype or a layout is not what `adamw_step` says.
    """
    count, kept = weights.numel(), averages.shape[0]
    for name, tensor, shape in (
        ("weights", weights, (count,)),
        ("exp_avg", exp_avg, (count,)),
        ("exp_avg_sq", exp_avg_sq, (count,)),
        ("averages", averages, (kept, count)),
        ("ema_weights", ema_weights, (kept,)),
    ):
        if tensor.shape != shape or tensor.dtype != weights.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides "
                f"{list(tensor.stride())}, not {weights.dtype} {list(shape)} and contiguous"
            )
    if shadow is not None and (shadow.ndim != 1 or shadow.numel() > count):
        raise ValueError(f"shadow is {list(shadow.shape)}; it must be [M] with M at most {count}")
    if shadow is not None and not shadow.is_contiguous():
        raise ValueError(f"shadow has strides {list(shadow.stride())}; it must be contiguous")


def check_segments(sizes: Sequence[int], offsets: Sequence[int], count: int) -> None:
    """Check that segments of `sizes` elements ascend within `count` and do not overlap.

    Raises:
        ValueError: they do not.
    """
    if len(sizes) != len(offsets):
        raise ValueError(f"there are {len(sizes)} gradients and {len(offsets)} offsets")
    end = 0
    for size, offset in zip(sizes, offsets, strict=True):
        if offset < end:
            raise ValueError(f"the segment at {offset} begins before the end of another, {end}")
        end = offset + size
    if end > count:
        raise ValueError(f"a segment ends at {end}, the weights at {count}")
