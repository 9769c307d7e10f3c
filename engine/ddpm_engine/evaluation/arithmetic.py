"""The arithmetic that metrics are computed in, whatever the defaults of this process are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ARITHMETIC = {"convolutions": "float32", "matrix products": "float32", "distances": "float64"}
"""Of feature networks, of the likelihood and of what is computed of features; for reports."""


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products of NVIDIA GPUs in float32, not in TF32.

    TF32 keeps ten bits of each factor, and torch convolves in it by default: enough to move the
    features that a Fréchet distance is made of. Afterwards everything is as it was.
    """
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed
