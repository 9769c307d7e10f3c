"""Feature maps as the U-Net's layers hand them on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_engine.networks.linear import split_bias
from ddpm_kernels import Moments, owe, residual_sum
from ddpm_kernels.dispatch import takes_op


class Features(NamedTuple):
    """A feature map, and what the pass that wrote it leaves to those that read it.

    A bias was added where the map was written, but its gradient, the sum of the map's over samples
    and pixels, is made by whatever writes the map's: norms sum on their way. So every reader pays
    its share: a norm by itself, anything else by `settled`.
    """

    map: Tensor
    """`[B, C, H, W]`."""
    moments: Moments | None = None
    """Of the map, for the norm that reads it; None: that norm takes them."""
    bias: Tensor | None = None
    """`[C]`, contained in the map, to which the map's readers owe a gradient."""

    def settled(self) -> Features:
        """The same for any reader: the bias's gradient is summed in a pass of its own."""
        return self._replace(map=owe(self.map, self.bias), bias=None)


def residual(
    h: Tensor,
    x: Tensor | None,
    *biases: Tensor | None,
    divisor: float = 1.0,
    settled: bool = False,
) -> Features:
    """Add what ends a residual branch to what it passes by, in one pass.

    Args:
        h: `[B, C, H, W]`.
        x: the same shape, or None: there is nothing to pass by.
        biases: `[C]` each, of the layers that ended in `h` and `x`; None where it is added already.
        divisor: the sum is divided by it.
        settled: whether its readers are to owe nothing.

    Returns:
        (h + x + biases) / divisor.
    """
    given = [bias for bias in biases if bias is not None]
    if x is None and not given:
        return Features(h)
    bias = sum(given[1:], start=given[0]) if given else None
    y, moments = residual_sum(owe(h, bias) if settled else h, x, bias, divisor)
    if settled:
        bias = None
    return Features(y, moments, bias if bias is None or divisor == 1 else bias / divisor)


def convolve(convolution: nn.Conv2d, x: Tensor) -> Features:
    """Convolve `[B, C, H, W]` where a norm may follow but no residual sum."""
    h, bias = split_bias(convolution, x)
    return residual(h, None, bias)


def joined(parts: tuple[Features, ...]) -> tuple[Features, ...]:
    """Concatenate maps, `[B, C_i, H, W]` each, where no kernel reads several as one."""
    if len(parts) == 1 or takes_op(parts[0].map):
        return parts
    return (Features(torch.cat([part.map for part in parts], dim=1)),)
