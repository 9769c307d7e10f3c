"""The indexing that elementwise kernels share: layouts, the width of offsets, scalars."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_kernels.tiling import as_scalar, is_wide, layout_of


def meta(*shape: int) -> Tensor:
    """Channels-last, at sizes no test could allocate."""
    return torch.empty(shape, device="meta").contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("tensor", "channels", "expected"),
    [
        (None, 3, "dense"),
        (meta(2, 3, 4, 5), 3, "dense"),
        (meta(2, 6, 4, 5), 3, "pixels"),
        (meta(2, 6, 4, 5)[:, 3:], 3, "pixels"),
        (meta(2, 6, 4, 5)[:, ::2], 3, "pixels"),
        (torch.empty(2, 3, 4, 5, device="meta"), 3, "pixels"),
        (torch.empty(2, 1, 4, 5, device="meta"), 1, "dense"),
        (meta(2, 3, 4, 5).transpose(2, 3), 3, "strided"),
        (meta(2, 3, 4, 5)[..., :4], 3, "strided"),
        (meta(2, 3, 4, 5)[..., ::2, :], 3, "strided"),
        (meta(4, 3, 4, 5)[::2], 3, "dense"),
        (meta(2, 6, 1, 1), 3, "dense"),
        (meta(2, 3, 1, 5)[..., ::2], 3, "pixels"),
        (torch.empty(3, 2, 3, 4, 5, device="meta"), 3, "pixels"),
    ],
)
def test_layout(tensor: Tensor | None, channels: int, expected: str) -> None:
    assert layout_of(tensor, channels) == expected


@pytest.mark.parametrize(
    ("tensor", "wide"),
    [
        (None, False),
        (meta(0, 1, 2**15, 2**16), False),
        (meta(70000, 3, 128, 128), False),  # only the batch is large
        (meta(1, 1, 2**15, 2**16), True),
        (meta(1, 1, 1, 2**31 - 1100), False),
        (meta(1, 1, 1, 2**31 - 1000), True),  # the tile passes 2³¹
        (meta(1, 4, 2**14, 2**15), True),
        (meta(1, 2, 3, 2**30)[..., :3], True),  # few elements, far apart
        (meta(3, 2, 3, 3).expand(5, 3, 2, 3, 3), False),
    ],
)
def test_offsets_are_wide_where_they_must_be(tensor: Tensor | None, wide: bool) -> None:
    assert is_wide(1024, meta(1, 1, 1, 1), tensor) == wide


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63)])
def test_scalars(value: int) -> None:
    cpu = torch.device("cpu")
    for scalar in (as_scalar(value, cpu), as_scalar(torch.tensor(value), cpu)):
        assert scalar.dtype == torch.int64
        assert scalar.shape == ()
        assert scalar.item() == value
