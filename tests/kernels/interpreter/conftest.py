"""Triton's interpreter runs the kernels themselves on a CPU: `TRITON_INTERPRET=1 pytest` here.

It must be set before a kernel's module is imported, so these tests have a process of their own.
With `THOROUGH=1` the properties are tried on ten times as many examples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from ddpm_kernels.dispatch import force_ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

THOROUGH = os.environ.get("THOROUGH") == "1"
settings.register_profile(
    "interpreter",
    max_examples=300 if THOROUGH else 30,
    derandomize=True,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
if INTERPRETED:
    settings.load_profile("interpreter")

GUARD = 256
"""Elements before and after a guarded tensor."""

Guarded = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _on_the_kernel_path() -> Iterator[None]:
    with force_ops():
        yield


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    """Copy a tensor, same strides, into memory with poisoned pages on both sides.

    Floating tensors are surrounded by NaN, integers by their largest value; a kernel that reads
    beyond its tensor spoils its result. After the test the pages must be as they were, so one that
    writes there fails.
    """
    pages: list[tuple[Tensor, float]] = []

    def place(tensor: Tensor) -> Tensor:
        poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        page = torch.full((GUARD + extent + GUARD,), poison, dtype=tensor.dtype)
        inside = page.as_strided(tensor.shape, tensor.stride(), GUARD)
        inside.copy_(tensor)
        pages.append((page, poison))
        return inside

    yield place
    for page, poison in pages:
        for side in (page[:GUARD], page[-GUARD:]):
            untouched = side.isnan() if page.is_floating_point() else side == poison
            assert bool(untouched.all()), "a kernel wrote outside of its tensor"
