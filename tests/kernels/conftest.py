"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def lay_out() -> Callable[[Tensor, str], Tensor]:
    """Give a tensor other strides and the same values."""

    def strided(tensor: Tensor, layout: str) -> Tensor:
        if layout == "nhwc":
            return tensor.contiguous(memory_format=torch.channels_last)
        if layout == "columns":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "view":  # of every other column of a larger tensor, and not from its start
            batch, channels, height, width = tensor.shape
            larger = tensor.new_zeros(batch + 1, channels + 2, height + 1, 2 * width + 1)
            view = larger[1:, 1:-1, 1:, 1::2]
            view.copy_(tensor)
            return view
        assert layout == "nchw"
        return tensor.contiguous()

    return strided
