"""To which pass of a step an operation belongs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

CONVOLUTIONS = "convolutions"
MATRICES = "linear layers, attention"
ACCUMULATED = "accumulating products"
CONV_BIAS = "convolution biases"
BIAS_GRADIENTS = "bias gradients"
LAYOUT = "layout copies"
NORM, NORM_BACKWARD = "norm forward", "norm backward"
RESIDUAL, CONDITION = "residual sums", "condition adds"
ACCUMULATION, CONDITION_GRADIENTS = "gradient accumulation", "condition gradients"
CASTS = "casts"
OPTIMIZER = "optimizer, averages"
NOISE = "draws, noise, loss"
MODULATE, MODULATE_BACKWARD = "residual, norm, modulation", "residual, norm, modulation backward"
OTHER = "other"

_BY_NAME = {
    "ddpm.modulate": MODULATE,
    "ddpm.modulate_backward": MODULATE_BACKWARD,
    "aten.cat": "concatenation",
    "aten.native_dropout": "dropout",
    "aten.native_dropout_backward": "dropout",
    "aten.upsample_nearest2d": "resampling",
    "aten.upsample_nearest2d_backward": "resampling",
    "aten.constant_pad_nd": "resampling",
    "aten.slice_backward": "resampling",
    "aten.native_group_norm": NORM,
    "aten.native_group_norm_backward": NORM_BACKWARD,
    "ddpm.residual_sum": RESIDUAL,
    "ddpm.group_norm_silu": NORM,
    "ddpm.group_norm_silu_backward": NORM_BACKWARD,
}
_MATRICES = frozenset(
    f"aten.{name}"
    for name in (
        "mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
    )
)  # fmt: skip


def is_compute(name: str) -> bool:
    """Whether an operation is a convolution or a matrix product: its bytes are not counted."""
    return name in _MATRICES or name.startswith("aten.convolution")


def pass_of(name: str, arguments: tuple[Any, ...], out: Any, part: str) -> str:
    """Name the pass.

    Args:
        name: of the operation, without overload.
        arguments: positional ones.
        out: its result.
        part: of the step: "noise", "network", "backward" or "optimizer".
    """
    if part == "optimizer":
        return OPTIMIZER
    if name in _MATRICES:
        return MATRICES
    if name in _BY_NAME:
        return _BY_NAME[name]
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if name == "aten._to_copy" and out.dtype != tensors[0].dtype:
        return CASTS
    if part == "noise":
        return NOISE
    features = bool(tensors) and tensors[0].dim() == 4
    if name in ("aten.add", "aten.add_") and features and len(tensors) > 1:
        if part == "backward":
            return ACCUMULATION
        return RESIDUAL if tensors[0].shape == tensors[1].shape else CONDITION
    if part == "backward" and name == "aten.add" and len(tensors) > 1:
        return ACCUMULATION
    if part == "backward" and name == "aten.sum":
        return CONDITION_GRADIENTS if features and out.dim() > 1 else BIAS_GRADIENTS
    if name == "aten.silu" and features:
        return NORM
    if name == "aten.silu_backward" and features:
        return NORM_BACKWARD
    if name == "aten.clone" and features:
        return LAYOUT
    if part == "backward" and name.startswith("ddpm."):
        return NOISE
    return OTHER
