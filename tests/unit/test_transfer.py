"""What is on its way to the host, on a device that stands for a GPU."""

from __future__ import annotations

import torch

from ddpm_engine.images.grid import to_levels, to_uint8
from ddpm_engine.images.transfer import to_host


def test_levels_stay_where_they_are_and_are_those_of_the_host() -> None:
    images = torch.linspace(-1.2, 1.2, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    levels = to_levels(images)
    assert levels.dtype == torch.uint8
    assert levels.is_contiguous()
    assert (to_host(levels)() == to_uint8(images)).all()
    assert to_levels(images.to("meta")).device.type == "meta"
