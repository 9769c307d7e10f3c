"""The parts of the benchmark of the host's time run, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.host_overhead import (
    ONE_OF_MANY,
    in_tree,
    no_convolutions,
    operations,
    stand_ins,
)
from torch import nn

from ddpm_engine.errors import UserError
from ddpm_kernels.dispatch import force_ops

ROOT = Path(__file__).resolve().parents[2]


def test_every_operation_runs() -> None:
    with force_ops():
        for call in operations().values():
            call()


def test_convolutions_compute_nothing_and_come_back() -> None:
    layer = nn.Conv2d(2, 4, 3, stride=2, padding=1)
    x = torch.rand(1, 2, 8, 8, requires_grad=True)
    computed = layer(x)
    with no_convolutions():
        y = layer(x)
        assert y.shape == computed.shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert stand_ins(nn.Sequential(layer, layer), calls=2) > 0
    assert torch.equal(layer(x), computed)


@pytest.mark.slow
def test_a_tree_is_measured() -> None:
    """Of a step, the stand-ins are a part."""
    found = in_tree(ROOT, calls=50, steps=4)
    assert all(time > 0 for time in found.values())
    assert ONE_OF_MANY in found
    assert found["convolutions' stand-ins"] < found["training step"]


def test_no_tree(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkout"):
        in_tree(tmp_path, calls=1, steps=0)
