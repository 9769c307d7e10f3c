"""The engine's U-Net as a textbook has it: each pass an operation of torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_engine.networks import linear
from ddpm_engine.networks.unet import blocks, features, unet
from ddpm_engine.networks.unet.blocks import Downsample
from ddpm_engine.networks.unet.features import Features
from ddpm_engine.networks.unet.norm import GroupNorm
from ddpm_kernels.dropout import Dropout


@contextmanager
def plain_network() -> Iterator[None]:
    """Let networks concatenate, convolve with biases, add, normalise and drop by torch alone.

    In eager code and in compiled. What surrounds the network keeps its operations.
    """
    with ExitStack() as stack:
        for module in (linear, blocks, features, unet):
            stack.enter_context(patch.object(module, "takes_op", lambda _: False))
        stack.enter_context(patch.object(features, "residual_sum", _sum))
        stack.enter_context(patch.object(GroupNorm, "forward", _norm))
        stack.enter_context(patch.object(Downsample, "forward", _downsample))
        yield


def _norm(
    self: GroupNorm,
    *inputs: Features,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, tuple[Features, ...]]:
    x = inputs[0].map if len(inputs) == 1 else torch.cat([each.map for each in inputs], dim=1)
    h = x if before is None else x + before[:, :, None, None]
    y = F.group_norm(h, self.groups, self.weight, self.bias, self.eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    y = F.silu(y) if self.activation == "silu" else y
    return y if dropout is None else F.dropout(y, dropout.probability, True), inputs


def _sum(h: Tensor, x: Tensor | None, bias: None, divisor: float) -> tuple[Tensor, None]:
    y = h if x is None else x + h
    return y if divisor == 1 else y / divisor, None


def _downsample(self: Downsample, x: Features) -> Features:
    if not self.crops:
        return Features(self.conv(x.map))
    h = F.pad(x.map, (0, 1, 0, 1))
    return Features(F.conv2d(h, self.conv.weight, self.conv.bias, stride=2))
